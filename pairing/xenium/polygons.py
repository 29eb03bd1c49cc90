"""Outlines of cells and nuclei: tables of vertices to polygons, one ring each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import shapely

from pairing.xenium.columns import (
    column_names,
    encoded,
    floats_of,
    read_rows,
    read_table,
    refuse_not_finite,
)
from shards.errors import BadInput

# Read at a time: of a million cells there are 25 million.
_VERTICES = 2_000_000


@dataclass(frozen=True, slots=True)
class PolygonTable:
    """n polygons in the order of their label; `polygon` is None where a ring encloses nothing.

    `label_id` int64 raster label (-1 where the table has none), `cell_id` text, `mean_um` (n, 2)
    mean of the vertices, `closed` whether the last vertex of the ring is its first.
    """

    label_id: npt.NDArray[np.int64]
    cell_id: npt.NDArray[np.object_]
    polygon: npt.NDArray[np.object_]
    mean_um: npt.NDArray[np.float64]
    closed: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.label_id)

    @property
    def has_labels(self) -> bool:
        return bool((self.label_id >= 0).all())


class _OpenRing(BadInput):
    """Vertices of one cell, in so far as they were read, that make no closed rings."""


def read_polygons(path: Path) -> PolygonTable:
    """Polygons of a vertex table (cell_id, vertex_x, vertex_y, label_id), vertices in µm.

    Rings are told apart by `label_id`: two nuclei of one cell share its `cell_id`, and taken
    together their vertices make one wrong ring. Without `label_id` (XOA 1.x and early builds of
    2.0) a ring ends where it meets its first vertex again. Raises BadInput where it does not, and
    on vertices without a position.
    """
    has_label = "label_id" in column_names(path)
    parts, keys = list[PolygonTable](), list[npt.NDArray[Any]]()
    first_row = 0
    try:
        for table in _whole_rings(path, has_label, _VERTICES):
            parts.append(_polygons(path, table, has_label, first_row))
            keys.append(parts[-1].label_id if has_label else pd.unique(parts[-1].cell_id))
            first_row += len(table)
        lie_apart = len(parts) > 1 and bool(pd.Series(np.concatenate(keys)).duplicated().any())
    except _OpenRing:  # of the file, or of a part that holds some vertices of a ring alone
        lie_apart = True
    if lie_apart:
        parts = [_polygons(path, t, has_label, 0) for t in _whole_rings(path, has_label, None)]
    if not parts:
        return NO_POLYGONS
    columns = (np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(PolygonTable))
    joined = PolygonTable(*columns)
    order = np.argsort(joined.label_id, kind="stable")
    if np.any(np.diff(order) < 0):
        joined = PolygonTable(*(getattr(joined, f.name)[order] for f in fields(PolygonTable)))
    return joined


def _whole_rings(path: Path, has_label: bool, n_rows: int | None) -> Iterator[pa.Table]:
    """The table of vertices, about so many rows at a time, cut between rings, or between cells."""
    numbers = ["vertex_x", "vertex_y", *["label_id"] * has_label]
    if n_rows is None:
        yield read_table(path, ["cell_id"], numbers)
        return
    rest: pa.Table | None = None
    for rows in read_rows(path, ["cell_id"], numbers, n_rows):
        table = rows if rest is None else pa.concat_tables([rest, rows])
        key = table["label_id"].to_numpy() if has_label else _cells(path, table)[1]
        begins = np.flatnonzero(key[1:] != key[:-1]) + 1
        last = int(begins[-1]) if len(begins) else 0
        if last:
            yield table.slice(0, last)
        rest = table.slice(last)
    if rest is not None and len(rest):
        yield rest


def _cells(path: Path, table: pa.Table) -> tuple[pa.StringArray, npt.NDArray[np.integer[Any]]]:
    return encoded(path, "cell_id", table.column("cell_id"))


def _polygons(path: Path, table: pa.Table, has_label: bool, first_row: int) -> PolygonTable:
    """Polygons of whole rings, whose vertices are the rows of a file from `first_row` on."""
    names, cell = _cells(path, table)
    # float32 in Parquet, and so the same from csv.
    axes = [floats_of(path, f"vertex_{axis}", table).astype(np.float32) for axis in "xy"]
    vertices = np.stack(axes, axis=1).astype(np.float64)
    for axis, values in zip("xy", vertices.T, strict=True):
        refuse_not_finite(path, f"vertex_{axis}", values, first_row)
    label = None
    if has_label:
        numbers = floats_of(path, "label_id", table)
        refuse_not_finite(path, "label_id", numbers, first_row)
        label = numbers.astype(np.int64)
    key, _ = pd.factorize(cell if label is None else label, sort=has_label)
    if np.any(np.diff(key) < 0):
        order = np.argsort(key, kind="stable")
        key, cell, vertices = key[order], cell[order], vertices[order]
        label = None if label is None else label[order]
    ring = key if has_label else _rings_by_closure(path, key, vertices)
    first = np.flatnonzero(np.diff(ring, prepend=-1))
    cell_id = names.to_numpy(zero_copy_only=False).astype(object)[cell[first]]
    label_id = np.full(len(first), -1) if label is None else label[first]
    return polygons_of(label_id, cell_id, vertices, first)


def polygons_of(
    label_id: npt.NDArray[np.int64],
    cell_id: npt.NDArray[np.object_],
    vertices_um: npt.NDArray[np.float64],
    first: npt.NDArray[np.int64],
) -> PolygonTable:
    """Polygons of rings that lie one after the other, each from its row in `first` on."""
    count = np.diff(first, append=len(vertices_um))
    sums = np.add.reduceat(vertices_um, first) if len(first) else np.zeros((0, 2))
    closed = (vertices_um[first] == vertices_um[first + count - 1]).all(axis=1)
    polygon = np.full(len(first), None, dtype=object)
    # Imported segmentations may have rings of fewer than three corners, which enclose nothing.
    drawable = count - closed >= 3
    rings = shapely.linearrings(
        vertices_um[np.repeat(drawable, count)],
        indices=np.repeat(np.arange(int(drawable.sum())), count[drawable]),
    )
    drawn = shapely.polygons(rings)
    # Simplified outlines may cross themselves, and GEOS refuses to intersect those.
    crossed = ~shapely.is_valid(drawn)
    drawn[crossed] = [_largest_part(p) for p in drawn[crossed]]
    polygon[drawable] = drawn
    return PolygonTable(label_id, cell_id, polygon, sums / count[:, None], closed)


_NO_ROWS = np.zeros(0, np.int64)
NO_POLYGONS = polygons_of(_NO_ROWS, _NO_ROWS.astype(object), np.zeros((0, 2)), _NO_ROWS)


def _largest_part(crossed: shapely.Polygon) -> shapely.Polygon | None:
    parts = shapely.get_parts(shapely.make_valid(crossed))
    polygons = [p for p in shapely.get_parts(parts) if isinstance(p, shapely.Polygon)]
    return max(polygons, key=lambda p: p.area, default=None)


def _rings_by_closure(
    path: Path, cell: npt.NDArray[np.int64], vertices: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """For every vertex the number of its ring, counted on; `cell` ascends."""
    first = np.flatnonzero(np.diff(cell, prepend=-1))
    count = np.diff(first, append=len(cell))
    closing = (vertices == vertices[np.repeat(first, count)]).all(axis=1)
    closing[first] = False
    begins = np.zeros(len(cell), bool)
    begins[first] = True
    # Nearly all cells have one ring, which closes at its end or not at all.
    n_closing = np.add.reduceat(closing.astype(np.int64), first) if len(first) else first
    several = (n_closing > 1) | ((n_closing == 1) & ~closing[first + count - 1])
    for row, n in zip(first[several].tolist(), count[several].tolist(), strict=True):
        begins[[row + i for i in _beginnings(path, vertices[row : row + n])]] = True
    return np.cumsum(begins) - 1


def _beginnings(path: Path, vertices: npt.NDArray[np.float64]) -> list[int]:
    """First rows of the closed rings that the vertices of one cell make."""
    rows = [0]
    while rows[-1] < len(vertices):
        here = rows[-1]
        again = np.flatnonzero((vertices[here + 1 :] == vertices[here]).all(axis=1))
        if len(again):
            rows.append(here + int(again[0]) + 2)
        elif len(rows) > 1 and (vertices[-1] == vertices[rows[-2]]).all():
            # No second ring: the first one passes through its first vertex on its way.
            rows[-1] = len(vertices)
        else:
            raise _OpenRing(
                path,
                expected="label_id, or rings that end at their first vertex",
                found="vertices of one cell that make no closed rings",
                remedy="give the run with its cells.zarr.zip, or export it again with a current "
                "Xenium Ranger",
            )
    return rows[:-1]
