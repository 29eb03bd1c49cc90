"""Slides for the benchmark: one simulated square, again and again, as JPEG tiles of 0.25 µm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile

from pairing.simulate.tile import labelled_tile

SLIDE_MPP = 0.25
TILE_PX = 512
# A square of 0.5 mm: tissue of some 1,500 nuclei.
SQUARE_PX = 2048
SEED = 770_001


def write_slide(path: Path, n_squares: int) -> Path:
    """A slide of `n_squares` squares along each side, unless it is there."""
    if path.is_file():
        return path
    square, _ = labelled_tile(SEED, SQUARE_PX, SLIDE_MPP)

    def tiles() -> Iterator[npt.NDArray[np.uint8]]:
        per_square = SQUARE_PX // TILE_PX
        for row in range(n_squares * per_square):
            for column in range(n_squares * per_square):
                y, x = (k % per_square * TILE_PX for k in (row, column))
                yield square[y : y + TILE_PX, x : x + TILE_PX]

    side = n_squares * SQUARE_PX
    aside = path.with_name(f"part-{path.name}")
    tifffile.imwrite(
        aside, tiles(), shape=(side, side, 3), dtype=np.uint8, tile=(TILE_PX, TILE_PX),
        photometric="rgb", compression="jpeg", compressionargs={"level": 90}, ome=True,
        metadata={"axes": "YXS", "PhysicalSizeX": SLIDE_MPP, "PhysicalSizeY": SLIDE_MPP},
    )  # fmt: skip
    aside.rename(path)
    return path
