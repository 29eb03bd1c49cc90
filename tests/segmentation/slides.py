"""Slides for tests of segmentation, simulated and of real tiles, and runs on them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pairing.simulate.tile import labelled_tile
from segmentation.config import SegmentationConfig
from segmentation.maps import InTurn
from segmentation.segment import Segmented, segment
from segmentation.tiles import read_tiles, resampled
from shards.artifact import Items

MPP = 0.5


def simulated_picture(path: Path, seed: int, size_px: int, mpp: float = MPP) -> Path:
    """A simulated H&E as PNG, without a pixel size of its own."""
    Image.fromarray(labelled_tile(seed, size_px, mpp)[0]).save(path)
    return path


def mosaic_of_real_tiles(path: Path, folder: Path, across: int = 8) -> Path:
    """All labelled tiles of a folder at 0.5 µm a pixel, side by side on white."""
    tiles = [resampled(tile, MPP).rgb for tile in read_tiles(folder)]
    side = max(max(tile.shape[:2]) for tile in tiles)
    page = np.full((side * -(-len(tiles) // across), side * across, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = side * (i // across), side * (i % across)
        page[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
    Image.fromarray(page).save(path)
    return path


def run(
    folder: Path,
    slide: Path,
    *,
    mpp: float | None = MPP,
    windows_of: Path | None = None,
    **how: Any,
) -> tuple[Segmented, pa.Table, bytes]:
    """Segment into `folder`, going on from what lies there: what was done, the table, its bytes.

    `windows_of` is the folder of an earlier run, stopped before its blocks, whose windows are taken
    over.
    """
    kept = folder / "kept"
    kept.mkdir(parents=True, exist_ok=True)
    for path in (windows_of / "kept").glob("windows-*") if windows_of else ():
        shutil.copyfile(path, kept / path.name)
    out = folder / "nuclei.parquet"
    done = segment(out, kept, slide, SegmentationConfig(), mpp=mpp, device="cpu", **how)
    return done, pq.read_table(out), out.read_bytes()


class WindowsAlone(InTurn):
    """Runs all windows and stops before the first block."""

    def __call__(self, fn: Callable[[Any], Any], items: Items[Any], /) -> Iterable[Any]:
        list(items)
        raise KeyboardInterrupt


def run_windows_alone(folder: Path, slide: Path) -> Path:
    """`folder`, in which the windows of a slide lie, to be taken over by others."""
    with pytest.raises(KeyboardInterrupt):
        run(folder, slide, maps=WindowsAlone())
    return folder


def on_seams(boxes: Iterable[tuple[int, int, int, int]], block_px: int) -> int:
    """How many half-open boxes (x0, y0, x1, y1) lie in more than one block."""
    return sum(
        x0 // block_px != (x1 - 1) // block_px or y0 // block_px != (y1 - 1) // block_px
        for x0, y0, x1, y1 in boxes
    )
