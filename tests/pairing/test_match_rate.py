"""The match rate predicted: its formula against shapely, its squares against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from pairing.match_rate import (
    FAR_BELOW,
    MIN_NUCLEI,
    REGION_UM,
    MatchRate,
    PlacedNuclei,
    chance_within_reach,
    far_below,
    iou_of_discs,
    match_rates,
    matches_by_chance,
    reach_per_radius,
)
from pairing.match_tiles import MIN_IOU

radii = st.floats(0.5, 20)
errors = st.floats(0, 1e6)


def iou(distance: float, radius: float, other: float) -> float:
    return float(iou_of_discs(*(np.array([v]) for v in (distance, radius, other)))[0])


def reached(radius_um: float, error_um: float) -> float:
    return float(chance_within_reach(np.array([radius_um]), np.array([error_um]))[0])


# ---------------------------------------------------------------- discs


@given(st.floats(0, 3), radii, radii)
def test_the_iou_of_discs_is_that_of_shapely(times: float, radius: float, other: float) -> None:
    distance = times * max(radius, other)
    # A polygon of 1,024 corners has all but 6e-6 of the area of its disc.
    a = shapely.Point(0, 0).buffer(radius, quad_segs=256)
    b = shapely.Point(distance, 0).buffer(other, quad_segs=256)
    assert iou(distance, radius, other) == pytest.approx(
        a.intersection(b).area / a.union(b).area, abs=1e-4
    )


def test_discs_within_one_another_and_apart() -> None:
    assert iou(0, 3, 3) == pytest.approx(1)
    assert iou(0, 1, 2) == pytest.approx(1 / 4)
    assert iou(0.9, 1, 2) == pytest.approx(1 / 4)
    assert iou(3, 1, 2) == pytest.approx(0)
    assert iou(50, 1, 2) == pytest.approx(0)
    # A lens of two thirds of pi minus half the root of three, of discs whose rims meet the centres.
    lens = 2 * np.pi / 3 - np.sqrt(3) / 2
    assert iou(1, 1, 1) == pytest.approx(lens / (2 * np.pi - lens))


def test_discs_of_one_size_reach_1_41_radii() -> None:
    assert reach_per_radius() == pytest.approx(1.41, abs=0.005)
    assert iou(4 * reach_per_radius(), 4, 4) == pytest.approx(MIN_IOU)


# ---------------------------------------------------------------- the error


@given(radii, errors, errors)
def test_a_larger_error_never_predicts_more(radius: float, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 0 <= reached(radius, high) <= reached(radius, low) <= 1


@given(radii, radii, errors)
def test_a_larger_nucleus_is_never_harder_to_hit(one: float, other: float, error: float) -> None:
    small, large = sorted((one, other))
    assert reached(small, error) <= reached(large, error)


def test_no_error_and_one_that_was_not_assessed_miss_nothing() -> None:
    assert reached(3, 0) == reached(3, np.nan) == 1
    # The root mean square error as large as the reach: a share of 1/e lies beyond.
    assert reached(1, reach_per_radius()) == pytest.approx(1 - 1 / np.e)


def test_errors_that_are_drawn_as_they_are_defined_match_as_often() -> None:
    rng = np.random.default_rng(0)
    n, radius, error_um = 200_000, 3.5, 4.0
    # Root mean square 4 µm: along each axis a standard deviation of 4 / sqrt(2).
    distance = np.hypot(*rng.normal(0, error_um / np.sqrt(2), (2, n)))
    matched = iou_of_discs(distance, np.full(n, radius), np.full(n, radius)) >= MIN_IOU
    assert matched.mean() == pytest.approx(reached(radius, error_um), abs=0.005)


# ---------------------------------------------------------------- far below


@given(*[st.floats(0, 1)] * 3)
def test_far_below_is_nearer_to_chance(found: float, predicted: float, by_chance: float) -> None:
    told = far_below(*(np.array([v]) for v in (found, predicted, by_chance)))[0]
    if told:
        assert predicted > by_chance
        assert found - by_chance < FAR_BELOW * (predicted - by_chance)
    if found >= predicted:
        assert not told


def test_unknown_rates_are_not_far_below() -> None:
    nothing = np.array([np.nan])
    assert not far_below(nothing, nothing, nothing)[0]


def a_rate(**changes: float) -> MatchRate:
    values = {
        "n_nuclei": 1000,
        "found": 0.8,
        "available": 0.9,
        "predicted": 0.9,
        "by_chance": 0.3,
        "in_far_squares": 0.0,
        **changes,
    }
    return MatchRate.model_validate(values)


def test_what_is_told_of_a_run() -> None:
    assert a_rate().faults == ()
    (fault,) = a_rate(found=0.35).faults
    assert "35% of 1,000 nuclei" in fault
    assert "gives up to 90%, chance 30%" in fault
    assert a_rate(found=0.35, n_nuclei=MIN_NUCLEI - 1).faults == ()
    (fault,) = a_rate(in_far_squares=0.11).faults
    assert fault.startswith("11% of the nuclei lie in squares of 200 µm")
    (fault,) = a_rate(found=0.4, available=0.44, predicted=0.44, by_chance=0.15).faults
    assert fault.startswith("at most 44% of 1,000 nuclei can have an H&E nucleus")


# ---------------------------------------------------------------- squares

# 100 nuclei in each of two squares, so far apart that none lies on another's place aside.
ONE = np.stack(np.meshgrid(np.arange(10) * 20.0 + 5, np.arange(10) * 20.0 + 5), -1).reshape(-1, 2)
LATTICE_UM = np.concatenate([ONE, ONE + np.array([REGION_UM, 0])])
AREA_UM2 = np.pi * 3.0**2
ALL = np.ones(200, bool)
NO_ERROR = np.full(200, 0.1)


def placed(um: np.ndarray) -> PlacedNuclei:
    return PlacedNuclei(um, np.full(len(um), AREA_UM2))


def test_each_square_has_its_own_rates() -> None:
    matched = np.arange(200) % 4 != 0
    matched[100:] = np.arange(100) % 2 == 0
    # All of the left square are on the H&E, of the right one the first half.
    rate, regions = match_rates(
        placed(LATTICE_UM), placed(LATTICE_UM[:150]), matched, NO_ERROR, ALL
    ) or pytest.fail("no rates")
    assert regions["x_um"].tolist() == [0, REGION_UM]
    assert regions["y_um"].tolist() == [0, 0]
    assert regions["n_nuclei"].tolist() == [100, 100]
    assert regions["found"].tolist() == [0.75, 0.5]
    assert regions["predicted"].tolist() == [1.0, 0.5]
    assert rate.n_nuclei == 200
    assert (rate.found, rate.available, rate.predicted) == (0.625, 0.75, 0.75)
    assert rate.in_far_squares == 0


def test_more_nuclei_on_the_slide_than_the_instrument_has_predict_no_more_than_all() -> None:
    he = placed(np.concatenate([LATTICE_UM, LATTICE_UM + 0.5]))
    rate, _ = match_rates(placed(LATTICE_UM), he, ALL, NO_ERROR, ALL) or pytest.fail("no rates")
    assert rate.available == 1


def test_nuclei_beyond_reach_are_predicted_to_match_by_chance() -> None:
    # On the places aside of all nuclei of the left square there is an H&E nucleus in one direction.
    aside = LATTICE_UM + 15.0 * np.array([np.cos(0.3), np.sin(0.3)])
    by_chance = matches_by_chance(placed(LATTICE_UM), placed(aside))
    assert (by_chance >= 0.25).all()
    far_off = np.full(200, 1e9)
    rate, _ = match_rates(placed(LATTICE_UM), placed(aside), ~ALL, far_off, ALL) or pytest.fail(
        "no rates"
    )
    assert rate.predicted == pytest.approx(rate.by_chance)
    assert not rate.is_far_below


def test_a_square_of_few_nuclei_is_null_and_one_far_below_is_told() -> None:
    few = LATTICE_UM[: 100 + MIN_NUCLEI - 1]
    n = len(few)
    rate, regions = match_rates(
        placed(few), placed(few), np.arange(n) >= 100, NO_ERROR[:n], ALL[:n]
    ) or pytest.fail("no rates")
    assert regions["n_nuclei"].tolist() == [100, MIN_NUCLEI - 1]
    assert regions[["found", "predicted", "by_chance"]].isna().all(axis=1).tolist() == [False, True]
    assert rate.in_far_squares == 1


def test_nuclei_that_do_not_count_stand_for_the_density_alone() -> None:
    counted = np.arange(200) < 60
    matched = np.arange(200) < 30
    rate, regions = match_rates(
        placed(LATTICE_UM), placed(LATTICE_UM[:50]), matched, NO_ERROR, counted
    ) or pytest.fail("no rates")
    assert regions["n_nuclei"].tolist() == [60]
    assert (rate.n_nuclei, rate.found, rate.available) == (60, 0.5, 0.5)
    assert match_rates(placed(LATTICE_UM), placed(LATTICE_UM), ALL, NO_ERROR, ~ALL) is None


def test_an_outline_that_encloses_nothing_matches_nothing() -> None:
    instrument = PlacedNuclei(LATTICE_UM, np.zeros(200))
    rate, _ = match_rates(instrument, placed(LATTICE_UM), ~ALL, NO_ERROR, ALL) or pytest.fail(
        "none"
    )
    assert (rate.predicted, rate.by_chance) == (0, 0)


def test_without_nuclei_on_the_slide_nothing_is_predicted() -> None:
    none = placed(np.zeros((0, 2)))
    rate, _ = match_rates(placed(LATTICE_UM), none, ~ALL, NO_ERROR, ALL) or pytest.fail("no rates")
    assert (rate.predicted, rate.available, rate.by_chance) == (0, 0, 0)
    assert not rate.is_far_below
    assert len(rate.faults) == 1
