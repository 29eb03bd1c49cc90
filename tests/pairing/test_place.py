"""A section's place among points: found from nowhere, refined, weighed, and its errors known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial import cKDTree

from pairing.registration.coarse import find_candidates
from pairing.registration.evidence import hold_out, weigh_evidence
from pairing.registration.growth import fit_affine
from pairing.registration.he_nuclei import Blobs
from pairing.registration.place import Fit
from tests.pairing.nuclei_pairs import PointPair, point_pair, section, sparse_pair, wave


def errors_um(pair_true_um: np.ndarray, fit: Fit, xenium_um: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.norm(fit(xenium_um) - pair_true_um, axis=1))


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_first_candidate_is_the_place(seed: int, mirror: bool) -> None:
    pair = point_pair(seed, mirror=mirror)
    first, second, *_ = find_candidates(pair.xenium_um, pair.he_um, pair.slide_um, 1.0, 4)
    off = np.linalg.norm(first.he_um_from_xenium_um(pair.xenium_um) - pair.true_um, axis=1)
    assert np.median(off) < 40
    assert first.correlation > second.correlation + 0.1


@pytest.mark.parametrize(
    ("seed", "largest_um", "most_um"), [(11, 0.0, 0.4), (12, 20.0, 0.9), (13, 25.0, 1.2)]
)
def test_a_stretched_section_is_found_and_its_errors_are_known(
    seed: int, largest_um: float, most_um: float
) -> None:
    pair = point_pair(seed, largest_um=largest_um, mirror=seed % 2 == 0)
    fit = pair.sides.found()
    assert fit is not None
    assert fit.is_clear
    error_um = errors_um(pair.true_um, fit, pair.xenium_um)
    assert np.median(error_um) < 0.4
    assert np.quantile(error_um, 0.95) < most_um
    told_um = fit.error_um(pair.xenium_um)
    assert (error_um[told_um <= 2] <= 2).mean() >= 0.98
    assert (told_um[error_um <= 2] <= 2).mean() >= 0.8
    # Root mean squares, told and true, of those that are sure.
    sure = told_um <= 2
    ratio = np.sqrt((error_um[sure] ** 2).mean() / (told_um[sure] ** 2).mean())
    assert 0.4 < ratio < 1.5


def test_the_same_nuclei_give_the_same_place_to_the_bit() -> None:
    pair = point_pair(14, largest_um=10.0)
    first, second = pair.sides.found(), pair.sides.found()
    assert first is not None
    assert second is not None
    assert np.array_equal(first(pair.xenium_um), second(pair.xenium_um))
    assert first.evidence == second.evidence


@pytest.mark.parametrize("seed", [21, 30])
def test_sparse_nuclei_are_found_among_many_pale_blobs_that_are_none(seed: int) -> None:
    pair = sparse_pair(seed)
    fit = pair.sides.found()
    assert fit is not None
    error_um = errors_um(pair.true_um, fit, pair.xenium_um)
    assert np.median(error_um) < 0.5
    assert np.quantile(error_um, 0.9) < 1.2
    assert ((error_um < 2) | (fit.error_um(pair.xenium_um) > 2)).mean() > 0.97


def test_pale_blobs_count_for_less_and_the_darkest_tenth_for_one() -> None:
    blobs = Blobs(np.zeros((11, 2)), np.arange(1, 12, dtype=np.float32) / 10)
    assert blobs.weight == pytest.approx([*np.arange(1, 11) / 10, 1.0])


@pytest.mark.slow
def test_another_section_fits_nowhere() -> None:
    pair, other = point_pair(15), point_pair(16)
    fit = replace(pair, he_um=other.he_um, slide_um=other.slide_um).sides
    found = fit.found()
    assert found is None or found.evidence.evidence < 0.05


@pytest.mark.slow
def test_the_next_section_has_no_evidence_at_its_very_place() -> None:
    """The same outline and density, other nuclei."""
    pair = point_pair(17)
    rng = np.random.default_rng(1)
    moved = pair.he_um + rng.uniform(-14, 14, pair.he_um.shape)
    fit = replace(pair, he_um=moved).sides.found()
    assert fit is None or fit.evidence.evidence < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.78, 1.31])
def test_a_wrong_pixel_size_is_found(scale: float) -> None:
    pair = point_pair(18, scale=scale)
    fit = pair.sides.found()
    assert fit is not None
    assert fit.is_clear
    affine, _ = fit_affine(pair.xenium_um, fit(pair.xenium_um), 1.0)
    assert np.sqrt(affine.area_scale) == pytest.approx(scale, rel=0.003)


def test_a_tear_is_right_on_both_sides_or_flagged() -> None:
    pair = point_pair(19)
    beyond = pair.xenium_um[:, 0] + 0.3 * pair.xenium_um[:, 1] > 900
    true_um = pair.true_um + np.where(beyond[:, None], (35.0, 0.0), 0.0)
    rng = np.random.default_rng(2)
    shown = rng.random(len(true_um)) > 0.3
    he_um = true_um[shown] + 0.6 * rng.standard_normal((shown.sum(), 2))
    torn = replace(
        pair, true_um=true_um, he_um=he_um, slide_um=(pair.slide_um[0] + 40, pair.slide_um[1])
    )
    fit = torn.sides.found()
    assert fit is not None
    error_um, told_um = errors_um(true_um, fit, torn.xenium_um), fit.error_um(torn.xenium_um)
    for side in (beyond, ~beyond):
        assert np.median(error_um[side]) < 0.5
    assert ((error_um <= 2) | (told_um > 2)).mean() >= 0.97


def test_a_missing_piece_is_not_sure_and_the_rest_is() -> None:
    pair = point_pair(20)
    gone = np.hypot(*(pair.xenium_um - (1000, 900)).T) < 150
    place = pair.true_um[gone]
    shown = cKDTree(place).query(pair.he_um)[0] > 12
    fit = replace(pair, he_um=pair.he_um[shown]).sides.found()
    assert fit is not None
    told_um = fit.error_um(pair.xenium_um)
    inner = np.hypot(*(pair.xenium_um - (1000, 900)).T) < 80
    assert (told_um[inner] > 2).all()
    far = np.hypot(*(pair.xenium_um - (1000, 900)).T) > 300
    assert (told_um[far] <= 2).mean() > 0.9


def test_what_is_left_of_a_section_is_found_and_the_rest_is_not_sure() -> None:
    pair = point_pair(23, largest_um=5.0, mirror=True, width_um=2400.0)
    middle = pair.true_um[int(np.argmin(np.hypot(*(pair.xenium_um - (1500, 700)).T)))]
    away = np.hypot(*(pair.true_um - middle).T)
    radius = np.quantile(away, 0.06)
    shown = np.hypot(*(pair.he_um - middle).T) < radius
    fit = replace(pair, he_um=pair.he_um[shown]).sides.found()
    assert fit is not None
    assert fit.is_clear
    left = away < radius - 20
    error_um = errors_um(pair.true_um, fit, pair.xenium_um)
    told_um = fit.error_um(pair.xenium_um)
    assert np.median(error_um[left]) < 0.5
    assert ((error_um <= 2) | (told_um > 2)).mean() >= 0.98
    assert fit.on_tissue(pair.xenium_um[left]).all()
    assert not fit.on_tissue(pair.xenium_um[away > radius + 80]).any()


def test_a_strip_too_thin_for_windows_is_followed() -> None:
    """A row of nuclei that leads away from the section, moved by 10 µm at its end."""
    pair = point_pair(24)
    rng = np.random.default_rng(3)
    corner = pair.xenium_um[np.argmax(pair.xenium_um @ (1, 1))]
    along = np.arange(20.0, 420.0, 9.0)
    strip = corner + np.stack([along, rng.uniform(0, 25, len(along))], axis=1)
    truly, _ = fit_affine(pair.xenium_um, pair.true_um, 1.0)
    at = truly(strip) + np.outer((along / 400) ** 2, (8.0, -6.0))
    he_um = np.concatenate([pair.he_um, at + 0.4 * rng.standard_normal(at.shape)])
    width, height = (he_um.max(axis=0) + 100).tolist()
    longer = PointPair(
        np.concatenate([pair.xenium_um, strip]),
        np.concatenate([pair.true_um, at]),
        he_um,
        (width, height),
    )
    fit = longer.sides.found()
    assert fit is not None
    error_um = errors_um(at, fit, strip)
    assert np.median(error_um) < 0.7
    assert error_um.max() < 4


def test_evidence_of_the_truth_and_of_chance() -> None:
    pair = point_pair(21, lost=0.25, strange=0.0, noise_um=0.3)
    tree = cKDTree(pair.he_um)
    right, local = weigh_evidence(pair.xenium_um, pair.true_um, tree, pair.slide_um)
    assert right.share == pytest.approx(0.75, abs=0.03)
    assert right.evidence > 0.6
    assert right.z > 20
    assert right.residual_um == pytest.approx(0.3 * np.sqrt(2 * np.log(2)), rel=0.1)
    assert local.support_at(pair.xenium_um).mean() == pytest.approx(1, abs=0.15)
    wrong, local = weigh_evidence(
        pair.xenium_um, pair.true_um + np.array([40, 9]), tree, pair.slide_um
    )
    assert abs(wrong.evidence) < 0.05
    assert abs(wrong.z) < 4


def test_of_cells_beside_the_slide_there_is_no_evidence() -> None:
    pair = point_pair(22)
    evidence, local = weigh_evidence(
        pair.xenium_um, pair.true_um + 1e5, cKDTree(pair.he_um), pair.slide_um
    )
    assert (evidence.n_held_out, evidence.share, evidence.residual_um) == (0, 0.0, None)
    assert (local.support_at(pair.xenium_um) == 0).all()


def test_a_third_is_held_out_by_its_name_alone() -> None:
    names = [f"aaaa{i:04d}-1" for i in range(3000)]
    held = hold_out(names)
    assert held.mean() == pytest.approx(1 / 3, abs=0.03)
    assert np.array_equal(hold_out(names[::-1])[::-1], held)


def test_nuclei_that_lie_in_a_row_are_no_reason_to_fall() -> None:
    x = np.linspace(0, 2000, 400)
    line = np.stack([x, np.zeros(400)], axis=1)
    fit = PointPair(line, line + 50, line + 50, (2100.0, 100.0)).sides.found()
    assert fit is None or np.isfinite(fit.error_um(line)).all()


def test_the_wave_of_these_tests_is_smooth() -> None:
    points = section(np.random.default_rng(0))
    strain = (wave(points + 1e-3, 20.0) - wave(points, 20.0)) / 1e-3
    assert np.abs(strain).max() < 0.3
