"""Nuclei and labels: rings without a label, masks of every release, which label lies where."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from pairing.xenium import open_xenium
from pairing.xenium.polygons import read_polygons
from pairing.xenium.rasters import labels_at
from shards.errors import BadInput
from tests.pairing.handmade import (
    CELL_IDS,
    SQUARE,
    Bundle,
    rings,
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle(tmp_path / "outs")


# ---------------------------------------------------------------- rings without label_id

BOW = np.array([[0, 0], [4, 0], [0, 0], [0, 4], [4, 4], [0, 0]])  # meets its first vertex midway


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(3, 9), min_size=1, max_size=12),
    st.integers(1, 30),
    st.integers(1, 25),
    st.booleans(),
    st.sampled_from(["in order", "by label, not in order", "apart", "by turns"]),
    st.integers(0, 2**32 - 1),
)
def test_outlines_are_the_same_however_many_rows_are_read_at_a_time(
    corners: list[int], n_rows: int, row_group: int, has_label: bool, order: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    number = np.repeat(np.arange(len(corners)), np.array(corners) + 1)
    turn = np.concatenate([np.append(np.arange(n), 0) * 2 * np.pi / n for n in corners])
    label = rng.permutation(len(corners)) if order != "in order" else np.arange(len(corners))
    table = pd.DataFrame(
        {
            "cell_id": [f"cell-{i // 2}" for i in number],
            "vertex_x": (number * 10 + np.cos(turn)).astype(np.float32),
            "vertex_y": np.sin(turn).astype(np.float32),
            "label_id": label[number] + 1,
        }
    )
    if order == "apart" and len(corners) > 2:
        halves = number % 2 if has_label else (number // 2) % 2
        table = table.iloc[np.argsort(halves[::-1], kind="stable")]
    if order == "by turns":  # a vertex of each cell, then the next
        table = table.iloc[np.argsort(table.groupby("cell_id").cumcount(), kind="stable")]
    if not has_label:
        table = table.drop(columns="label_id")
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        path = Path(name, "nucleus_boundaries.parquet")
        table.to_parquet(path, row_group_size=row_group)
        whole = told_of(path)
        patch.setattr("pairing.xenium.polygons._VERTICES", n_rows)
        assert told_of(path) == whole


def told_of(path: Path) -> list[Any] | str:
    """All that is read, or why not."""
    try:
        found = read_polygons(path)
    except BadInput as error:
        return str(error)
    polygons = [shapely.to_wkt(p) if p is not None else "" for p in found.polygon]
    columns = (found.label_id, found.cell_id, polygons, found.mean_um.tolist(), found.closed)
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize(
    ("vertices", "areas"),
    [
        ([SQUARE], [16]),
        ([SQUARE[:-1]], [16]),  # never closed
        ([SQUARE, SQUARE + 10, SQUARE * 2 + 20], [16, 16, 64]),
        ([BOW], [8]),
        ([SQUARE + 10, BOW], [16, 8]),
        ([SQUARE[[0, 0, 1, 2, 3, 0]]], [16]),  # its first vertex twice
        ([SQUARE[[0, 1, 0]]], [0]),
    ],
)
def test_rings_end_where_they_close(
    vertices: list[npt.NDArray[Any]], areas: list[float], bundle: Bundle
) -> None:
    """Of a cell between two others, whose rows need not follow each other."""
    own = rings(*((0, CELL_IDS[1], v) for v in vertices))
    other = rings((0, CELL_IDS[2], SQUARE))
    bundle.nuclei = pd.concat([other[:2], own, other[2:]]).drop(columns="label_id")
    del bundle.cells["nucleus_count"]
    with open_xenium(bundle.write()) as run:
        nuclei, cells = run.read_nuclei(), run.read_cells()
    assert nuclei["cell_index"].tolist() == [2] + [1] * len(areas)
    assert nuclei["area_um2"].tolist() == [16, *areas]
    assert cells["n_nuclei"].tolist() == [0, len(areas), 1]


@pytest.mark.parametrize("counted_nuclei", [False, True])
def test_rings_that_nothing_tells_apart_are_refused(counted_nuclei: bool, bundle: Bundle) -> None:
    """A closed ring and an open one; two open ones, which the number of nuclei tells of."""
    first = SQUARE[:-1] if counted_nuclei else SQUARE
    bundle.nuclei = rings((0, CELL_IDS[0], first), (0, CELL_IDS[0], SQUARE[:-1] + 10))
    del bundle.nuclei["label_id"]
    if not counted_nuclei:
        del bundle.cells["nucleus_count"]
    with open_xenium(bundle.write()) as run, pytest.raises(BadInput, match="label_id"):
        run.read_nuclei()


# ---------------------------------------------------------------- masks


def masks_of(bundle: Bundle) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Nuclei and cells on 20 x 60 px of 0.5 µm: cells of 16 px around their centres, one nucleus
    in the first and two in the last.
    """
    bundle.experiment["pixel_size"] = 0.5
    bundle.cells["y_centroid"] = 5.0
    bundle.cells["x_centroid"] = [5.0, 15, 25]
    nuclei, cells = np.zeros((2, 20, 60), np.uint32)
    for i in range(3):
        cells[2:18, 20 * i + 2 : 20 * i + 18] = i + 1
    nuclei[4:8, 4:8], nuclei[4:8, 44:48], nuclei[10:14, 46:50] = 1, 2, 3
    bundle.nuclei = rings(
        *((i, CELL_IDS[i], SQUARE / 2 + (x, y)) for i, x, y in [(0, 2, 2), (2, 22, 2), (2, 23, 5)])
    )
    bundle.nuclei["label_id"] = np.repeat([1, 2, 3], len(SQUARE))
    return nuclei, cells


CENTRES = [[3, 3], [23, 3], [24, 6]]
VERTICES = np.stack([np.pad((SQUARE / 2 + (x - 1, y - 1)).ravel(), (0, 4)) for x, y in CENTRES])
POLYGON_SETS = {
    "polygon_sets__0__cell_index": np.array([0, 2, 2], np.uint32),
    "polygon_sets__0__num_vertices": np.array([5, 5, 5], np.int32),
    "polygon_sets__0__vertices": VERTICES.astype(np.float32),
    "polygon_sets__1__cell_index": np.array([0, 1, 2], np.uint32),
    "polygon_sets__1__num_vertices": np.array([0, 0, 0], np.int32),
    "polygon_sets__1__vertices": np.zeros((3, 14), np.float32),
}
OWNERS: dict[str, tuple[dict[str, Any], str]] = {
    "since 2.0": (POLYGON_SETS, "text"),
    "since 1.3": ({"seg_mask_value": np.array([1, 2, 3], np.uint32)}, "bytes"),
    "before": ({}, "numbers"),
}


@pytest.mark.parametrize("release", OWNERS)
@pytest.mark.parametrize("absent", [None, "label_id", "outlines", "number"])
def test_owners_of_labels(release: str, absent: str | None, bundle: Bundle) -> None:
    owners, bundle.text = OWNERS[release]
    nuclei_mask, cell_mask = masks_of(bundle)
    bundle.cells["nucleus_count"] = [1, 0, 2]
    if absent == "label_id":
        del bundle.nuclei["label_id"]
    if absent == "number":
        del bundle.cells["nucleus_count"]
    path = bundle.write()
    if absent == "outlines":
        (path / "nucleus_boundaries.parquet").unlink()
    bundle.write_masks(masks__0=nuclei_mask, masks__1=cell_mask, **owners)
    with open_xenium(path) as run:
        assert run.label_cell_index("cell").tolist() == [-1, 0, 1, 2]
        assert run.label_cell_index("nucleus").tolist() == [-1, 0, 2, 2]
        cells, nuclei = run.read_cells(), run.read_nuclei()
        assert cells["n_nuclei"].tolist() == [1, 0, 2]
        assert run.layout == "Xenium bundle with label masks"
    assert nuclei["label_id"].tolist() == [1, 2, 3]
    assert nuclei["cell_index"].tolist() == [0, 2, 2]
    assert nuclei[["x_um", "y_um"]].to_numpy().tolist() == CENTRES
    assert nuclei["area_um2"].tolist() == [4, 4, 4]
    without = absent == "outlines" and release != "since 2.0"
    assert shapely.area(nuclei["polygon"].to_numpy()).tolist() == ([0] * 3 if without else [4] * 3)


def test_labels_of_cells_in_another_order(bundle: Bundle) -> None:
    nuclei_mask, cell_mask = masks_of(bundle)
    path = bundle.write()
    shuffled = np.array([0, 7, 5, 6], np.uint32)[cell_mask]
    values = np.array([7, 5, 6], np.uint32)
    bundle.write_masks(masks__0=nuclei_mask, masks__1=shuffled, seg_mask_value=values)
    with open_xenium(path) as run:
        assert run.label_cell_index("cell").tolist() == [-1, -1, -1, -1, -1, 1, 2, 0]
        assert run.label_cell_index("nucleus").tolist() == [-1, 0, 2, 2]


def test_outlines_of_cells_in_the_store_of_masks(bundle: Bundle) -> None:
    nuclei_mask, cell_mask = masks_of(bundle)
    path = bundle.write()
    sets = POLYGON_SETS | {
        "polygon_sets__1__num_vertices": np.array([5, 5, 0], np.int32),
        "polygon_sets__1__vertices": VERTICES.astype(np.float32),
    }
    bundle.write_masks(masks__0=nuclei_mask, masks__1=cell_mask, **sets)
    with open_xenium(path) as run:
        first, second, third = run.read_cell_polygons()
    assert first is not None
    assert second is not None
    assert (first.bounds, second.bounds, third) == ((2, 2, 4, 4), (22, 2, 24, 4), None)


@given(seed=st.integers(0, 10**6), height=st.integers(1, 40), width=st.integers(1, 40))
def test_labels_at_positions(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 9, (height, width)).astype(np.uint32)
    positions = rng.uniform(-5, 45, (100, 2))
    x, y = np.floor(positions).astype(int).T
    inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
    expected = np.where(inside, labels[np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)], 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pairing.xenium.rasters._BLOCK_PX", 7)
        np.testing.assert_array_equal(labels_at(labels, positions), expected)
