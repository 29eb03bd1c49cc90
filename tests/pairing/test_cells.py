"""Neighbours and matches against definitions written out plainly."""

from __future__ import annotations

import contextlib
import pickle
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from pairing.cells import find_neighbors
from pairing.geometry import Affine
from pairing.match import match_nuclei
from pairing.match_tiles import MIN_IOU, MatchTiles, mapped_pairs
from pairing.outlines import StoredOutlines
from pairing.warp import Warp

# Whole numbers, so that many points share a place and many pairs a distance.
points = npst.arrays(
    np.float64, st.tuples(st.integers(0, 25), st.just(2)), elements=st.integers(0, 12).map(float)
)


@given(points, st.integers(0, 8), st.floats(0.5, 15))
def test_neighbors_are_the_nearest_others_within_the_radius(
    positions_um: np.ndarray, k: int, radius_um: float
) -> None:
    found = find_neighbors(positions_um, k, radius_um)
    assert found.shape == (len(positions_um), k)
    for i, row in enumerate(found):
        away = [
            (float(np.hypot(*(p - positions_um[i]))), j)
            for j, p in enumerate(positions_um)
            if j != i
        ]
        want = sorted(pair for pair in away if pair[0] <= radius_um)[:k]
        got = [int(j) for j in row if j >= 0]
        assert list(row[len(got) :]) == [-1] * (k - len(got))
        # Of places that many cells share any choice is as near as another.
        distances = [float(np.hypot(*(positions_um[j] - positions_um[i]))) for j in got]
        assert distances == pytest.approx([d for d, _ in want])
        assert len(set(got)) == len(got)
        assert i not in got


def square(x: float, y: float, side: float = 10.0) -> shapely.Polygon:
    return shapely.box(x, y, x + side, y + side)


def he_table(*polygons: shapely.Polygon) -> pa.Table:
    return pa.table(
        {
            "nucleus_id": pa.array(range(100, 100 + len(polygons)), pa.int64()),
            "area_um2": [p.area * 0.25 for p in polygons],
            "polygon_px": [shapely.to_wkb(p) for p in polygons],
        }
    )


def test_one_to_one_by_best_score() -> None:
    instrument_um = [square(0, 0), square(8, 0), square(50, 50), square(100, 100)]
    he_px_from_xenium_um = Affine.similarity(2.0, 0.0, (100.0, 0.0))
    # The first H&E nucleus overlaps two instrument nuclei and belongs to the second; the second
    # one, worse for the first instrument nucleus, is what is left for it; nothing is at (100, 100).
    moved = [square(9, 0), square(2, 1), square(50, 50), square(108, 108)]
    he = he_table(*(shapely.transform(p, he_px_from_xenium_um) for p in moved))
    matched = match_nuclei(instrument_um, he, he_px_from_xenium_um, mpp=0.5)
    assert matched["he_nucleus_id"].tolist()[:3] == [101, 100, 102]
    assert matched["he_nucleus_id"].isna().tolist() == [False, False, False, True]
    assert matched["he_iou"][1] == pytest.approx(90 / 110)
    assert matched["he_iou"][0] == pytest.approx(72 / 128)
    assert matched["he_iou"][2] == pytest.approx(1.0)
    assert matched["he_distance_um"][1] == pytest.approx(1.0)
    assert matched["he_area_um2"][2] == pytest.approx(100.0)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 25),
    st.integers(0, 2**32 - 1),
    st.sampled_from([9.0, 30.0, 100.0]),
    st.integers(0, 5),
)
def test_tiles_and_who_finds_their_pairs_change_nothing(
    n: int, seed: int, side_um: float, n_before: int
) -> None:
    rng = np.random.default_rng(seed)
    at = rng.uniform(-40, 40, (n, 2))
    own = [square(x, y, side) for (x, y), side in zip(at, rng.uniform(3, 20, n), strict=True)]
    theirs = [square(x, y, 9) for x, y in (at + rng.normal(0, 3, (n, 2)))]
    he_px_from_xenium_um = Warp(Affine.similarity(2.0, 0.3, (-50.0, 10.0)))
    he = he_table(*(shapely.transform(p, he_px_from_xenium_um) for p in theirs))
    whole = match_nuclei([*own, shapely.Polygon()], he, he_px_from_xenium_um, mpp=0.5)
    went_on: list[str] = []

    def backwards(fn: Any, tiles: Any) -> Iterator[str]:
        for tile in reversed(list(tiles)):
            went_on.append(tile.name)
            yield pickle.loads(pickle.dumps(fn))(pickle.loads(pickle.dumps(tile)))

    def stopped(fn: Any, tiles: Any) -> Iterator[str]:
        return (fn(tile) for tile in islice(tiles, n_before))

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr("pairing.match_tiles._SIDE_UM", side_um)
        patch.setattr("pairing.match_tiles._AT_A_TIME", 7)
        kept, path = Path(name), Path(name, "nuclei.parquet")
        pq.write_table(he, path, row_group_size=6)
        stored = StoredOutlines(path)
        tiles = MatchTiles(np.array(own, object), stored, he_px_from_xenium_um, 0.5)
        with contextlib.suppress(FileNotFoundError):  # of the first that was not made
            list(mapped_pairs(kept, stopped, he_px_from_xenium_um, tiles))
        find = partial(mapped_pairs, kept, backwards, he_px_from_xenium_um)
        rest = he.drop_columns("polygon_px")
        parts = match_nuclei(
            [*own, shapely.Polygon()], rest, he_px_from_xenium_um, 0.5, stored, find
        )
    assert went_on == tiles.names[n_before:][::-1]
    pd.testing.assert_frame_equal(parts, whole)


def test_a_touch_is_no_match() -> None:
    side = 10.0
    shift = side * (1 - 2 * MIN_IOU / (1 + MIN_IOU)) + 0.01
    matched = match_nuclei([square(0, 0)], he_table(square(shift, 0)), Affine.scale(1.0), mpp=1.0)
    assert matched["he_nucleus_id"].isna().all()
    assert matched["he_iou"].isna().all()


def test_no_nuclei_on_either_side() -> None:
    assert len(match_nuclei([], he_table(square(0, 0)), Affine.scale(1.0), mpp=1.0)) == 0
    none = match_nuclei([square(0, 0)], he_table(), Affine.scale(1.0), mpp=1.0)
    assert none["he_nucleus_id"].isna().all()


def test_a_self_crossing_outline_keeps_its_area() -> None:
    bow_tie = shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])
    matched = match_nuclei([bow_tie], he_table(square(0, 0)), Affine.scale(1.0), mpp=1.0)
    assert matched["he_iou"][0] == pytest.approx(0.5)


def test_of_equal_overlaps_the_first_row_has_the_nucleus() -> None:
    one = Affine.scale(1.0)
    both = match_nuclei([square(-4, 0), square(4, 0)], he_table(square(0, 0)), one, mpp=1.0)
    assert both["he_nucleus_id"].notna().tolist() == [True, False]
    other = match_nuclei([square(0, 0)], he_table(square(4, 0), square(-4, 0)), one, mpp=1.0)
    assert other["he_nucleus_id"].tolist() == [100]


# Whole numbers, so that many overlaps are equal.
places = st.lists(st.tuples(st.integers(0, 16), st.integers(0, 16)), max_size=9)


@given(places, places)
def test_no_pair_is_left_that_beats_what_both_have(
    of_instrument: list[tuple[int, int]], of_he: list[tuple[int, int]]
) -> None:
    instrument = [square(*xy, side=8) for xy in of_instrument]
    he = [square(*xy, side=8) for xy in of_he]
    matched = match_nuclei(instrument, he_table(*he), Affine.scale(1.0), mpp=1.0)
    taken = [int(i) - 100 for i in matched["he_nucleus_id"].dropna()]
    assert len(set(taken)) == len(taken)
    own = matched["he_iou"].fillna(0).to_numpy()
    others = np.zeros(len(he))
    others[taken] = own[matched["he_nucleus_id"].notna()]
    for i, a in enumerate(instrument):
        for j, b in enumerate(he):
            iou = a.intersection(b).area / a.union(b).area
            if iou >= MIN_IOU:
                assert max(own[i], others[j]) >= iou - 1e-12
