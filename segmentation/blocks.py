"""The blocks of a slide: cores, halos, ownership; and where a slide shows tissue at all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pairing.geometry import Box
from pairing.slide import Slide
from segmentation.windows import WindowGrid

# Tissue is looked for at this pixel size, and as much around it is segmented too.
TISSUE_MPP = 8.0
_TISSUE_MARGIN_UM = 40.0
# Glass of one slide varies by less than this in any channel's optical density.
_TISSUE_OD = 0.04


@dataclass(frozen=True, slots=True)
class Block:
    """A unit of work: it owns the nuclei whose centroid lies in the half-open `core`.

    On the grid of pixels of the network's mpp that starts at the slide's origin; cores don't
    overlap. `name` tells its size and place.
    """

    name: str
    core: Box

    def read_box(self, halo_px: int) -> Box:
        """The core and a halo, possibly reaching outside the slide."""
        x0, y0, x1, y1 = self.core
        return x0 - halo_px, y0 - halo_px, x1 + halo_px, y1 + halo_px


def plan_blocks(grid: WindowGrid, block_px: int) -> list[Block]:
    """Blocks of `block_px` over every shown window, row by row, cut off at the slide's end."""
    width, height = grid.size_px
    blocks = []
    for y0, x0 in product(range(0, height, block_px), range(0, width, block_px)):
        core = x0, y0, min(x0 + block_px, width), min(y0 + block_px, height)
        if grid.touching(core):
            name = f"block-{block_px}-{y0 // block_px:05d}-{x0 // block_px:05d}"
            blocks.append(Block(name, core))
    return blocks


def tissue_mask(slide: Slide) -> npt.NDArray[np.bool_]:
    """(Y, X) at 8 µm a pixel: what absorbs more than the slide's glass, and 40 µm around it.

    What is damaged in the file counts as glass.
    """
    slide, _ = slide.tolerant()
    width, height = (math.ceil(n_px * slide.mpp / TISSUE_MPP) for n_px in slide.size_px)
    rgb = slide.read_at((0, 0, width, height), TISSUE_MPP).astype(np.float64)
    density = np.log10((slide.background + 1.0) / (rgb + 1.0)).max(axis=2)
    margin = round(_TISSUE_MARGIN_UM / TISSUE_MPP)
    # One-pixel specks are dust or noise of the scanner.
    tissue = ndimage.binary_opening(density > _TISSUE_OD, np.ones((2, 2)))
    near: npt.NDArray[np.bool_] = ndimage.maximum_filter(tissue, 2 * margin + 1)
    return near
