"""Flags from scores: by thresholds alone, relative to the run, and of what could be told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairing.flags import Thresholds, with_flags
from pairing.quality import SCORES

NAN = float("nan")


def patches(**scores: list[float]) -> pd.DataFrame:
    """The index of patches with these scores; others are as they should be."""
    n = len(next(iter(scores.values())))
    good = {"sharpness": 1.0, "pen_share": 0.0, "dark_od": 0.4, "centre_tissue": 1.0}
    columns = {name: scores.get(name, [good[name]] * n) for name in SCORES}
    return pd.DataFrame(columns, dtype=np.float32).assign(edge=False, damaged_tile=False)


def line(n: int, step_um: float = 10.0) -> Any:
    return np.stack([np.arange(n) * step_um, np.zeros(n)], axis=1)


def test_each_score_has_its_flag_at_its_threshold() -> None:
    index = patches(sharpness=[0.2, 0.4, 1.0, NAN], pen_share=[0.5, 0.05, NAN, 0.0])
    found = with_flags(index, line(4), Thresholds(blurred_below=0.4, pen_above=0.0625))
    assert found["blurred"].tolist() == [True, False, False, False]
    assert found["pen"].tolist() == [True, False, False, False]
    found = with_flags(index, line(4), Thresholds(blurred_below=0.1, pen_above=0.0))
    assert found["blurred"].tolist() == [False] * 4
    assert found["pen"].tolist() == [True, True, False, False]


def test_darkness_is_that_of_the_run() -> None:
    for thickness in (0.5, 1.0, 3.0):
        dark = [0.2 * thickness * v for v in (1.0, 1.0, 0.8, 2.5, 1.25, NAN)]
        found = with_flags(patches(dark_od=dark), line(6), Thresholds(fold_above=2.0))
        # The median of the five is 1.
        assert found["dark_ratio"].tolist()[:5] == pytest.approx([1.0, 1.0, 0.8, 2.5, 1.25])
        assert found["fold"].tolist() == [False, False, False, True, False, False]


def test_a_tear_is_told_by_the_cells_around() -> None:
    # Nine cells 10 µm apart, of which the fifth lies on glass: those within 25 µm of it see that.
    tissue = [1.0] * 9
    tissue[4] = 0.2
    found = with_flags(patches(centre_tissue=tissue), line(9), Thresholds(torn_above=0.2))
    expected = [0, 0, 1 / 5, 1 / 5, 1 / 5, 1 / 5, 1 / 5, 0, 0]
    assert found["glass_share"].tolist() == pytest.approx(expected)
    assert not found["torn"].any()
    found = with_flags(patches(centre_tissue=tissue), line(9), Thresholds(torn_above=0.15))
    assert found["torn"].tolist() == [2 <= i <= 6 for i in range(9)]
    # Further apart than that each has only itself.
    found = with_flags(patches(centre_tissue=tissue), line(9, 30.0), Thresholds())
    assert found["torn"].tolist() == [i == 4 for i in range(9)]


def test_what_is_told_of_one_donor_is_the_same_without_the_others() -> None:
    index = patches(dark_od=[0.4, 0.9, 0.4, 1.2, 0.8], centre_tissue=[1.0, 0.0, 1.0, 0.0, 1.0])
    donor = np.array([0, 1, 0, 1, -1], np.int32)
    among = with_flags(index, line(5), Thresholds(), donor)
    for number in (0, 1, -1):
        of = donor == number
        alone = with_flags(index[of], line(5)[of], Thresholds())
        pd.testing.assert_frame_equal(among[of], alone)


def test_a_cell_whose_middle_tells_nothing_counts_for_none() -> None:
    found = with_flags(patches(centre_tissue=[0.0, NAN, 1.0]), line(3), Thresholds())
    assert found["glass_share"].tolist() == pytest.approx([0.5, NAN, 0.5], nan_ok=True)


def test_patches_without_scores_bear_no_flag() -> None:
    index = patches(sharpness=[NAN] * 3)
    index[list(SCORES)] = NAN
    found = with_flags(index, line(3), Thresholds())
    assert not found[["blurred", "pen", "fold", "torn"]].to_numpy().any()
    assert found[["dark_ratio", "glass_share"]].isna().to_numpy().all()


scores = st.lists(st.tuples(*[st.floats(0, 2, width=32)] * 3), min_size=1, max_size=30)


@given(scores, st.floats(0, 1), st.floats(0, 1))
def test_a_looser_threshold_flags_no_more(
    values: list[tuple[float, float, float]], one: float, other: float
) -> None:
    sharpness, pen, tissue = (list(v) for v in zip(*values, strict=True))
    index = patches(sharpness=sharpness, pen_share=pen, centre_tissue=tissue)
    low, high = sorted((one, other))
    strict = Thresholds(blurred_below=high, pen_above=low, fold_above=1 + low, torn_above=low)
    loose = Thresholds(blurred_below=low, pen_above=high, fold_above=1 + high, torn_above=high)
    flags = ["blurred", "pen", "fold", "torn"]
    few, many = (with_flags(index, line(len(index)), t)[flags] for t in (loose, strict))
    assert not (few & ~many).to_numpy().any()
