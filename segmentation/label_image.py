"""The label image of a slide: every pixel's nucleus, as OME-Zarr with a pyramid, and as TIFF."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
import zarr

from segmentation.blocks import Block
from segmentation.collect import read_masks
from segmentation.maps import Maps, Tasks
from segmentation.nuclei import max_travel_px
from segmentation.windows import WindowGrid

_CHUNK_PX = 1024
_TIFF_TILE_PX = 512
Chunk = tuple[int, int]  # row, column


def write_label_image(
    out: Path, kept: Path, blocks: Sequence[Block], grid: WindowGrid, maps: Maps
) -> None:
    """The nuclei of `collect_nuclei` in the new folder `out`, at the network's pixel size.

    OME-Zarr 0.5 (ngff.openmicroscopy.org/0.5): an image of labels, uint32, 0 where no nucleus is,
    and levels of half the size each, by every second pixel, down to one chunk. A task writes whole
    chunks, so that none is written twice.
    """
    width, height = grid.size_px
    shapes = [(height, width)]
    while max(shapes[-1]) > _CHUNK_PX:
        shapes.append((-(-shapes[-1][0] // 2), -(-shapes[-1][1] // 2)))
    root = zarr.open_group(out, mode="w", zarr_format=3, attributes=_metadata(grid, len(shapes)))
    for level, shape in enumerate(shapes):
        root.create_array(
            str(level), shape=shape, chunks=(_CHUNK_PX, _CHUNK_PX), dtype=np.uint32, fill_value=0,
            dimension_names=("y", "x"),
        )  # fmt: skip
        chunks = list(product(*(range(-(-n // _CHUNK_PX)) for n in shape)))
        if level == 0:
            paint = partial(_paint, out, kept, _blocks_by_chunk(blocks, grid))
        else:
            paint = partial(_shrink, out, level)
        for _ in maps(paint, Tasks(chunks, "chunks of labels")):
            pass


def _metadata(grid: WindowGrid, n_levels: int) -> dict[str, Any]:
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [
                {"type": "scale", "scale": [grid.mpp * 2**level, grid.mpp * 2**level]}
            ],
        }
        for level in range(n_levels)
    ]
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
    multiscale = {"name": "nuclei", "axes": axes, "datasets": datasets}
    return {"ome": {"version": "0.5", "multiscales": [multiscale], "image-label": {}}}


def _blocks_by_chunk(blocks: Sequence[Block], grid: WindowGrid) -> dict[Chunk, list[Block]]:
    """The blocks whose nuclei may reach into a chunk: a mask ends near its centroid."""
    reach = 2 * max_travel_px(grid.mpp) + 10
    found: dict[Chunk, list[Block]] = {}
    for block in blocks:
        x0, y0, x1, y1 = block.read_box(reach)
        for chunk in product(
            range(max(0, y0) // _CHUNK_PX, (y1 - 1) // _CHUNK_PX + 1),
            range(max(0, x0) // _CHUNK_PX, (x1 - 1) // _CHUNK_PX + 1),
        ):
            found.setdefault(chunk, []).append(block)
    return found


def _paint(out: Path, kept: Path, blocks: dict[Chunk, list[Block]], chunk: Chunk) -> None:
    labels = np.zeros((_CHUNK_PX, _CHUNK_PX), np.uint32)
    top, left = (k * _CHUNK_PX for k in chunk)
    masks = [m for block in blocks.get(chunk, []) for m in read_masks(kept, block)]
    for mask in masks:
        height, width = mask.mask_YX.shape
        y0, x0 = max(mask.top_px, top), max(mask.left_px, left)
        y1 = min(mask.top_px + height, top + _CHUNK_PX)
        x1 = min(mask.left_px + width, left + _CHUNK_PX)
        if y0 < y1 and x0 < x1:
            part = mask.mask_YX[
                y0 - mask.top_px : y1 - mask.top_px, x0 - mask.left_px : x1 - mask.left_px
            ]
            labels[y0 - top : y1 - top, x0 - left : x1 - left][part] = mask.nucleus_id
    _store(out, 0, chunk, labels)


def _shrink(out: Path, level: int, chunk: Chunk) -> None:
    finer: Any = zarr.open_array(out / str(level - 1), mode="r")
    side = 2 * _CHUNK_PX
    part = finer[chunk[0] * side : (chunk[0] + 1) * side, chunk[1] * side : (chunk[1] + 1) * side]
    _store(out, level, chunk, part[::2, ::2])


def _store(out: Path, level: int, chunk: Chunk, labels: npt.NDArray[np.uint32]) -> None:
    if labels.any():
        target: Any = zarr.open_array(out / str(level), mode="r+")
        top, left = (k * _CHUNK_PX for k in chunk)
        rows, columns = (
            min(_CHUNK_PX, n - o) for n, o in zip(target.shape, (top, left), strict=True)
        )
        target[top : top + rows, left : left + columns] = labels[:rows, :columns]


def write_label_tiff(out: Path, labels: Path, mpp: float) -> None:
    """The finest level of a label image as one tiled, compressed TIFF of uint32 with its mpp."""
    image: Any = zarr.open_array(labels / "0", mode="r")
    height, width = image.shape

    def tiles() -> Iterator[npt.NDArray[np.uint32]]:
        for y in range(0, height, _TIFF_TILE_PX):
            band = np.zeros((_TIFF_TILE_PX, -(-width // _TIFF_TILE_PX) * _TIFF_TILE_PX), np.uint32)
            rows = image[y : y + _TIFF_TILE_PX]
            band[: rows.shape[0], :width] = rows
            yield from np.split(band, band.shape[1] // _TIFF_TILE_PX, axis=1)

    tifffile.imwrite(
        out,
        tiles(),
        shape=(height, width),
        dtype=np.uint32,
        tile=(_TIFF_TILE_PX, _TIFF_TILE_PX),
        compression="deflate",
        bigtiff=True,
        ome=True,
        metadata={"axes": "YX", "PhysicalSizeX": mpp, "PhysicalSizeY": mpp},
    )
