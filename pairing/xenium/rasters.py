"""Cells and nuclei as label rasters: centroids, owners, and which label lies at a position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pairing.xenium.files import parsed

# Side of the blocks in which a raster is walked: whole chunks, 64 MB of uint32.
_BLOCK_PX = 4096


class LabelRaster(Protocol):
    """A label image, sliceable without reading all of it: a zarr array or a numpy array."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, key: Any) -> Any: ...


class StoredRaster:
    """A zarr array that is read as it is sliced; BadInput names `path` where it is damaged."""

    def __init__(self, path: Path, array: Any) -> None:
        self._path = path
        self._array = array
        self.shape: tuple[int, ...] = array.shape
        self.chunks: tuple[int, ...] = array.chunks

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        with parsed(self._path):
            block: npt.NDArray[Any] = self._array[key]
            return block


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


def labels_at(labels: LabelRaster, positions_px: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Label under each (x, y), (n, 2) in px; 0 outside of the raster. Read block by block."""
    column, row = np.floor(positions_px).astype(np.int64).reshape(-1, 2).T
    height, width = labels.shape
    found = np.zeros(len(row), np.int64)
    inside = np.flatnonzero((column >= 0) & (row >= 0) & (column < width) & (row < height))
    step_y, step_x = _block_shape(labels)
    block = row[inside] // step_y * (width // step_x + 1) + column[inside] // step_x
    order = np.argsort(block, kind="stable")
    for here in np.split(inside[order], np.flatnonzero(np.diff(block[order])) + 1):
        if len(here):
            y0, x0 = row[here].min(), column[here].min()
            pixels = np.asarray(labels[y0 : row[here].max() + 1, x0 : column[here].max() + 1])
            found[here] = pixels[row[here] - y0, column[here] - x0]
    return found


def _block_shape(labels: LabelRaster) -> tuple[int, int]:
    chunk_h, chunk_w = getattr(labels, "chunks", (_BLOCK_PX, _BLOCK_PX))
    return max(_BLOCK_PX // chunk_h, 1) * chunk_h, max(_BLOCK_PX // chunk_w, 1) * chunk_w


def _blocks(labels: LabelRaster) -> Iterator[tuple[tuple[int, int], npt.NDArray[Any]]]:
    height, width = labels.shape
    step_y, step_x = _block_shape(labels)
    for y in range(0, height, step_y):
        for x in range(0, width, step_x):
            yield (y, x), np.asarray(labels[y : y + step_y, x : x + step_x])
