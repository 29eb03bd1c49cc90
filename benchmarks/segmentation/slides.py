"""Slides for the benchmark: one simulated square, shifted each time, as JPEG tiles of 0.25 µm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import tifffile

from pairing.simulate.tile import labelled_tile

SLIDE_MPP = 0.25
TILE_PX = 512
# A square of 0.5 mm: tissue of some 1,500 nuclei.
SQUARE_PX = 2048
SEED = 770_001
# Each square is the one before, moved on by so much: files of equal tiles count as damaged. A
# whole number of pixels of every level.
SHIFT_PX = 48


def write_slide(path: Path, n_squares: int) -> Path:
    """A slide of `n_squares` squares along each side, levels of 1, 4 and 16, unless it is there."""
    if path.is_file():
        return path
    square, _ = labelled_tile(SEED, SQUARE_PX, SLIDE_MPP)
    aside = path.with_name(f"part-{path.name}")
    sizes = {"PhysicalSizeX": SLIDE_MPP, "PhysicalSizeY": SLIDE_MPP}
    with tifffile.TiffWriter(aside, ome=True) as writer:
        for downsample in (1, 4, 16):
            side = SQUARE_PX // downsample
            seen = cv2.resize(square, (side, side), interpolation=cv2.INTER_AREA)
            tile_px = min(TILE_PX, side)
            first: dict[str, Any] = {"subifds": 2, "metadata": {"axes": "YXS", **sizes}}
            writer.write(
                _tiles(np.asarray(seen, np.uint8), tile_px, n_squares, SHIFT_PX // downsample),
                shape=(n_squares * side, n_squares * side, 3), dtype=np.uint8,
                tile=(tile_px, tile_px), photometric="rgb", compression="jpeg",
                compressionargs={"level": 90}, subfiletype=int(downsample > 1),
                **(first if downsample == 1 else {}),
            )  # fmt: skip
    aside.rename(path)
    return path


def _tiles(
    square: npt.NDArray[np.uint8], tile_px: int, n_squares: int, shift_px: int
) -> Iterator[npt.NDArray[np.uint8]]:
    per_square = square.shape[0] // tile_px
    for row in range(n_squares * per_square):
        for column in range(n_squares * per_square):
            number = row // per_square * n_squares + column // per_square
            y, x = (k % per_square * tile_px for k in (row, column))
            rows = np.arange(y, y + tile_px) - number * shift_px
            yield square[:, x : x + tile_px].take(rows, axis=0, mode="wrap")
