"""The global block grid: cores, halos, ownership, and which blocks show tissue at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pairing.geometry import Box
from pairing.slide import Slide
from segmentation.config import GRID_PX

# Tissue is looked for at this pixel size, and as much around it is segmented too.
_TISSUE_MPP = 8.0
_TISSUE_MARGIN_UM = 40.0
# Glass of one slide varies by less than this in any channel's optical density.
_TISSUE_OD = 0.04


@dataclass(frozen=True, slots=True)
class Block:
    """A unit of work: it owns the nuclei whose centroid lies in `core`, and reads `read`.

    Both are boxes on the grid of pixels of the network's mpp that starts at the slide's origin;
    cores don't overlap; `read` may reach outside the slide. `index` orders the blocks of a slide.
    """

    index: int
    core: Box
    read: Box

    def owns(self, x: float, y: float) -> bool:
        """Whether a position in grid pixels lies in the half-open core."""
        x0, y0, x1, y1 = self.core
        return x0 <= x < x1 and y0 <= y < y1


def plan_blocks(slide: Slide, mpp: float, block_px: int, halo_px: int) -> list[Block]:
    """Blocks of `block_px` that cover all tissue of the slide, each with `halo_px` around it.

    Sizes in pixels of `mpp`, multiples of 16. Row by row; blocks of nothing but glass are left out
    before they are numbered. At the right and lower border of the slide cores are smaller.
    """
    if block_px % GRID_PX or halo_px % GRID_PX:
        raise ValueError(f"block and halo are multiples of {GRID_PX}, not {block_px}, {halo_px}")
    tissue = tissue_mask(slide)
    width, height = (math.ceil(n_px * slide.mpp / mpp) for n_px in slide.size_px)
    cell = mpp / _TISSUE_MPP
    blocks: list[Block] = []
    for y0 in range(0, height, block_px):
        for x0 in range(0, width, block_px):
            x1, y1 = (
                min(start + block_px, start + GRID_PX * -(-(end - start) // GRID_PX))
                for start, end in ((x0, width), (y0, height))
            )
            columns = slice(int(x0 * cell), math.ceil(x1 * cell))
            rows = slice(int(y0 * cell), math.ceil(y1 * cell))
            if tissue[rows, columns].any():
                read = (x0 - halo_px, y0 - halo_px, x1 + halo_px, y1 + halo_px)
                blocks.append(Block(len(blocks), (x0, y0, x1, y1), read))
    return blocks


def tissue_mask(slide: Slide) -> npt.NDArray[np.bool_]:
    """(Y, X) at 8 µm a pixel: what absorbs more than the slide's glass, and 40 µm around it.

    What is damaged in the file counts as glass.
    """
    slide, _ = slide.tolerant()
    width, height = (math.ceil(n_px * slide.mpp / _TISSUE_MPP) for n_px in slide.size_px)
    rgb = slide.read_at((0, 0, width, height), _TISSUE_MPP).astype(np.float64)
    density = np.log10((slide.background + 1.0) / (rgb + 1.0)).max(axis=2)
    margin = round(_TISSUE_MARGIN_UM / _TISSUE_MPP)
    # One-pixel specks are dust or noise of the scanner.
    tissue = ndimage.binary_opening(density > _TISSUE_OD, np.ones((2, 2)))
    near: npt.NDArray[np.bool_] = ndimage.maximum_filter(tissue, 2 * margin + 1)
    return near
