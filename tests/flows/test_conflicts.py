"""Runs that hold the same cells are told, with both names; neighbours on a slide are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flows.config import RunConfig, SplitSection
from flows.conflicts import RunOfCells, RunOnSlide, other_donors, overlaps, same_bundles
from shards.errors import BadInput, BadInputs


def he(run: str, donor: str = "D1") -> RunConfig:
    return RunConfig(
        id=run, xenium=Path(run), slide=Path("he.tif"), alignment=Path("a.csv"), donor=donor
    )


def morphology(run: str, donor: str = "D1") -> RunConfig:
    return RunConfig(id=run, xenium=Path(run), image="morphology", donor=donor)


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([(he("a"), "x"), (he("b", "D2"), "x")], "the donors 'D1' and 'D2'"),
        ([(he("a"), "x"), (morphology("b", "D2"), "x")], "the donors 'D1' and 'D2'"),
        ([(he("a"), "x"), (he("b"), "x")], "the same kind of image"),
        ([(morphology("a"), "x"), (morphology("b"), "x")], "the same kind of image"),
    ],
)
def test_one_bundle_in_two_runs_fails_both(runs: list[tuple[RunConfig, str]], words: str) -> None:
    found = same_bundles([*runs, (he("c", "D3"), "y")], SplitSection())
    assert set(found) == {"a", "b"}
    for fault in found.values():
        assert isinstance(fault, BadInput)
        assert words in fault.found
        assert "run a" in str(fault)
        assert "run b" in str(fault)


def test_a_bundle_with_its_slide_and_as_morphology_is_fine() -> None:
    assert (
        same_bundles([(he("a"), "x"), (morphology("b"), "x"), (he("c"), "y")], SplitSection()) == {}
    )


def test_two_names_of_one_donor_are_no_conflict() -> None:
    runs = [(he("a", "P left"), "x"), (morphology("b", "P right"), "x")]
    assert set(same_bundles(runs, SplitSection())) == {"a", "b"}
    assert same_bundles(runs, SplitSection(aliases={"P": ("P left", "P right")})) == {}


def test_files_of_donors_say_the_same_of_each_cell_of_a_bundle() -> None:
    def run(name: str, bundle: str, **donor_of: str) -> RunOfCells:
        several = RunConfig(id=name, xenium=Path(name), image="morphology", donors=Path("c.csv"))
        return RunOfCells(several, bundle, donor_of)

    a = run("a", "x", one="D1", two="D2", three="D3")
    assert other_donors([a, run("b", "x", one="D1", four="D9"), run("c", "y", one="D7")]) == {}
    found = other_donors([a, run("b", "x", one="D1", two="D4"), run("c", "y", one="D7")])
    assert set(found) == {"a", "b"}
    assert "1 of 2 cells have other donors, the first is two: 'D2' and 'D4'" in str(found["a"])


def test_donors_by_file_stand_against_one_donor() -> None:
    several = RunConfig(id="b", xenium=Path("b"), image="morphology", donors=Path("cores.csv"))
    found = same_bundles([(he("a"), "x"), (several, "x")], SplitSection())
    assert "'D1' and of cores.csv" in str(found["a"])


def test_three_runs_of_one_bundle_tell_of_each_pair() -> None:
    found = same_bundles([(he("a"), "x"), (he("b"), "x"), (he("c", "D2"), "x")], SplitSection())
    assert all(isinstance(f, BadInputs) and len(f.faults) == 2 for f in found.values())
    assert set(found) == {"a", "b", "c"}


MPP = 0.25


def tissue(n: int, x0_um: float, seed: int, *, per_mm2: float = 8000) -> np.ndarray:
    """Random centres in px in a square that starts at `x0_um`: closer than real cells may be."""
    side_um = np.sqrt(n / per_mm2 * 1e6)
    points_um = np.random.default_rng(seed).uniform(0, side_um, (n, 2))
    return (points_um + np.array([x0_um, 0])) / MPP


def side_um(n: int, per_mm2: float = 8000) -> float:
    return float(np.sqrt(n / per_mm2 * 1e6))


@pytest.mark.parametrize("n", [1, 4, 36, 300, 5000])
def test_regions_that_touch_go_through(n: int) -> None:
    for seed in range(10):
        a = RunOnSlide("a", "s", tissue(n, 0, seed), MPP)
        b = RunOnSlide("b", "s", tissue(n, side_um(n), seed + 100), MPP)
        assert overlaps([a, b]) == {}


@pytest.mark.parametrize("n", [5, 36, 300, 5000])
def test_the_same_cells_carried_over_twice_overlap(n: int) -> None:
    centres = tissue(n, 0, 0, per_mm2=1000)
    again = centres + np.random.default_rng(1).normal(0, 2 / MPP, centres.shape)
    found = overlaps([RunOnSlide("a", "s", centres, MPP), RunOnSlide("b", "s", again, MPP)])
    assert set(found) == {"a", "b"}
    assert f"of {n} cells of" in str(found["a"])
    assert "run a and run b overlap" in str(found["b"])


def test_a_fifth_of_the_smaller_run_is_enough_and_other_cells_count_too() -> None:
    small, n = tissue(300, 0, 0), 300
    large = tissue(5000, 0.8 * side_um(n), 1)
    found = overlaps([RunOnSlide("large", "s", large, MPP), RunOnSlide("small", "s", small, MPP)])
    assert "cells of small lie" in str(found["large"])


def test_another_slide_or_no_cells_never_overlap() -> None:
    centres = tissue(300, 0, 0)
    a, b = RunOnSlide("a", "s", centres, MPP), RunOnSlide("b", "t", centres, MPP)
    empty = RunOnSlide("c", "s", np.zeros((0, 2)), MPP)
    assert overlaps([a, b, empty]) == {}
