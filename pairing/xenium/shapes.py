"""Cells and nuclei as polygons and as label rasters: vertex tables, centroids, owners."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
import shapely

from pairing.xenium.files import parsed

# Side of the blocks in which a raster is walked: whole chunks, 64 MB of uint32.
_BLOCK_PX = 4096


class LabelRaster(Protocol):
    """A label image, sliceable without reading all of it: a zarr array or a numpy array."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, key: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class PolygonTable:
    """Polygons in the order of their label; `polygon` is None where a ring encloses nothing.

    `label_id` int64 raster label (-1 where the table has none), `cell_id` text, `mean_um` (n, 2)
    mean of the vertices.
    """

    label_id: npt.NDArray[np.int64]
    cell_id: npt.NDArray[np.object_]
    polygon: npt.NDArray[np.object_]
    mean_um: npt.NDArray[np.float64]


def read_polygons(path: Path) -> PolygonTable:
    """Polygons of a vertex table (cell_id, vertex_x, vertex_y, label_id), vertices in µm.

    Rings are told apart by `label_id`: two nuclei of one cell share its `cell_id`, and taken
    together their vertices make one wrong ring. Without `label_id` by `cell_id`, which is right
    for cells alone.
    """
    # Identifiers as a dictionary: a million cells have 25 rows each.
    with parsed(path):
        table = pq.read_table(path, read_dictionary=["cell_id"]).to_pandas()
    has_label = "label_id" in table.columns
    key, _ = pd.factorize(table["label_id" if has_label else "cell_id"], sort=has_label)
    if np.any(np.diff(key) < 0):
        order = np.argsort(key, kind="stable")
        table, key = table.iloc[order], key[order]
    vertices = table[["vertex_x", "vertex_y"]].to_numpy(np.float64)
    first = np.flatnonzero(np.diff(key, prepend=-1))
    count = np.diff(first, append=len(key))
    sums = np.add.reduceat(vertices, first) if len(first) else np.zeros((0, 2))
    closed = (vertices[first] == vertices[first + count - 1]).all(axis=1)
    polygon = np.full(len(first), None, dtype=object)
    # Imported segmentations may have rings of fewer than three corners, which enclose nothing.
    drawable = count - closed >= 3
    rings = shapely.linearrings(
        vertices[np.repeat(drawable, count)],
        indices=np.repeat(np.arange(int(drawable.sum())), count[drawable]),
    )
    drawn = shapely.polygons(rings)
    # Simplified outlines may cross themselves, and GEOS refuses to intersect those.
    crossed = ~shapely.is_valid(drawn)
    drawn[crossed] = [_largest_part(p) for p in drawn[crossed]]
    polygon[drawable] = drawn
    labels = table["label_id"].to_numpy(np.int64)[first] if has_label else np.full(len(first), -1)
    return PolygonTable(
        label_id=labels,
        cell_id=table["cell_id"].iloc[first].to_numpy(object),
        polygon=polygon,
        mean_um=sums / count[:, None],
    )


def _largest_part(crossed: shapely.Polygon) -> shapely.Polygon | None:
    parts = shapely.get_parts(shapely.make_valid(crossed))
    polygons = [p for p in shapely.get_parts(parts) if isinstance(p, shapely.Polygon)]
    return max(polygons, key=lambda p: p.area, default=None)


@dataclass(frozen=True, slots=True)
class LabelMoments:
    """Per label value: pixels, and their mean position in px (nothing for 0, the background)."""

    n_px: npt.NDArray[np.int64]
    centroid_px: npt.NDArray[np.float64]


def label_moments(labels: LabelRaster) -> LabelMoments:
    """Pixels and centroid of every label value, walked block by block (NaN where it has none)."""
    sums = np.zeros((3, 1))
    for (y0, x0), block in _blocks(labels):
        flat = np.flatnonzero(block)
        values = block.ravel()[flat].astype(np.int64)
        y, x = np.divmod(flat, block.shape[1])
        part = [np.bincount(values, w) for w in (None, x + (x0 + 0.5), y + (y0 + 0.5))]
        grown = np.zeros((3, max(sums.shape[1], len(part[0]))))
        grown[:, : sums.shape[1]] = sums
        grown[:, : len(part[0])] += part
        sums = grown
    n = sums[0]
    centroid = np.full((len(n), 2), np.nan)
    centroid[n > 0] = (sums[1:, n > 0] / n[n > 0]).T
    return LabelMoments(n_px=n.astype(np.int64), centroid_px=centroid)


def label_owners(inner: LabelRaster, outer: LabelRaster) -> npt.NDArray[np.int64]:
    """For every value of `inner` the value of `outer` that covers most of it; 0 where none does.

    Both rasters are on one grid; of two that cover the same number of pixels the lower value wins.
    """
    shares: dict[tuple[int, int], int] = {}
    largest = 0
    for (y0, x0), block in _blocks(inner):
        inside = block > 0
        if not inside.any():
            continue
        over = np.asarray(outer[y0 : y0 + block.shape[0], x0 : x0 + block.shape[1]])
        pairs = np.stack([block[inside], over[inside]]).astype(np.int64)
        values, counts = np.unique(pairs, axis=1, return_counts=True)
        largest = max(largest, int(values[0, -1]))
        for a, b, n in zip(*values.tolist(), counts.tolist(), strict=True):
            shares[a, b] = shares.get((a, b), 0) + n
    owners = np.zeros(largest + 1, np.int64)
    best = np.zeros(largest + 1, np.int64)
    for (a, b), n in sorted(shares.items()):
        if b > 0 and n > best[a]:
            owners[a], best[a] = b, n
    return owners


def _blocks(labels: LabelRaster) -> Iterator[tuple[tuple[int, int], npt.NDArray[Any]]]:
    height, width = labels.shape
    chunk_h, chunk_w = getattr(labels, "chunks", (_BLOCK_PX, _BLOCK_PX))
    step_y = max(_BLOCK_PX // chunk_h, 1) * chunk_h
    step_x = max(_BLOCK_PX // chunk_w, 1) * chunk_w
    for y in range(0, height, step_y):
        for x in range(0, width, step_x):
            yield (y, x), np.asarray(labels[y : y + step_y, x : x + step_x])


def nuclei_table(
    label_id: npt.NDArray[np.int64],
    cell_index: npt.NDArray[np.int64],
    polygons: PolygonTable,
    moments: LabelMoments | None,
    pixel_size_um: float,
) -> pd.DataFrame:
    """Nuclei (label_id, cell_index, x_um, y_um, area_um2, polygon), one row a nucleus.

    Centroid and area are the mask's where `moments` has pixels of the label, else the polygon's
    (a ring that encloses nothing: the mean of its vertices, area 0, an empty polygon). Labels
    with neither pixels nor polygon are no nuclei.
    """
    nuclei = pd.DataFrame({"label_id": label_id, "cell_index": cell_index})
    known = pd.DataFrame(
        {
            "label_id": polygons.label_id,
            "x_um": polygons.mean_um[:, 0],
            "y_um": polygons.mean_um[:, 1],
            "polygon": polygons.polygon,
        }
    )
    nuclei = nuclei.merge(known, on="label_id", how="left", validate="one_to_one")
    shapes = np.array(
        [p if isinstance(p, shapely.Polygon) else shapely.Polygon() for p in nuclei["polygon"]],
        dtype=object,
    )
    nuclei["polygon"] = shapes
    drawn = ~shapely.is_empty(shapes)
    centroid = shapely.centroid(shapes[drawn])
    nuclei.loc[drawn, "x_um"] = shapely.get_x(centroid)
    nuclei.loc[drawn, "y_um"] = shapely.get_y(centroid)
    nuclei["area_um2"] = shapely.area(shapes)
    if moments is not None:
        label = nuclei["label_id"].to_numpy()
        held = label < len(moments.n_px)
        held[held] = moments.n_px[label[held]] > 0
        nuclei.loc[held, ["x_um", "y_um"]] = moments.centroid_px[label[held]] * pixel_size_um
        nuclei.loc[held, "area_um2"] = moments.n_px[label[held]] * pixel_size_um**2
    nuclei = nuclei[nuclei["x_um"].notna()].reset_index(drop=True)
    return nuclei[["label_id", "cell_index", "x_um", "y_um", "area_um2", "polygon"]]
