"""Where nuclei lie on an H&E, found as dark blobs: enough to register by, and cheap."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from pairing.geometry import Box, Points
from pairing.slide import Slide

F32 = npt.NDArray[np.float32]
OpenSlide = Callable[[], AbstractContextManager[Slide]]

# Blobs are looked for at about this resolution; a level of the pyramid that is near is taken as is.
WORK_MPP, _WORK_MPP_RANGE = 0.5, (0.4, 0.65)
# A nucleus of 6 to 10 µm answers strongest to a difference of Gaussians of about these sigmas.
SIGMA_UM, _SIGMA_RATIO = 2.2, 1.6
_APART_UM = 2.5
# Nuclei are those blobs that answer at least this share of what the darkest tenth does.
_MIN_SHARE = 0.2
_MIN_RESPONSE = 0.01  # optical density: less is noise of any camera
_BLOCK_PX = 2048
_OVERVIEW_UM = 8.0
_TISSUE_OD = 0.03
# -log10((v + 1) / 256), of the channel that haematoxylin absorbs most and eosin least.
_OD = (-np.log10((np.arange(256) + 1) / 256)).astype(np.float32)
_RED = 0


@dataclass(frozen=True, slots=True)
class Blobs:
    """n dark blobs: level-0 pixels of their middles, and how strongly they answered (OD)."""

    px: Points
    response: F32

    def __len__(self) -> int:
        return len(self.px)

    @property
    def weight(self) -> npt.NDArray[np.float64]:
        """(n,) what each counts for, at most 1: pale blobs are nuclei less often."""
        return np.minimum(self.response.astype(np.float64) / _strong(self.response), 1)


def find_he_nuclei(open_slide: OpenSlide, threads: int | None = None) -> Blobs:
    """Dark blobs of the size of nuclei on the whole slide, from left to right in rows of blocks.

    Read at about 0.5 µm per pixel from the level of the pyramid that is nearest, where the slide
    shows anything; red optical density, maxima of a difference of Gaussians, fitted by a parabola.
    What of the slide is damaged is read as glass. The same whatever the number of `threads`.
    """
    with open_slide() as slide:
        slide.require_rgb()
        mpp = _work_mpp(slide)
        blocks = _blocks_on_tissue(slide, mpp)
        step = mpp / slide.mpp
    n = threads or os.cpu_count() or 1

    def of_every_nth(first: int) -> list[tuple[Points, F32]]:
        with open_slide() as slide:
            reader, _ = slide.tolerant()
            return [_in_block(reader, box, mpp) for box in blocks[first::n]]

    cv2.setNumThreads(1)
    with ThreadPoolExecutor(n) as pool:
        parts = list(pool.map(of_every_nth, range(n)))
    found = [parts[i % n][i // n] for i in range(len(blocks))]
    if not found:
        return Blobs(np.zeros((0, 2)), np.zeros(0, np.float32))
    px, response = (np.concatenate(side) for side in zip(*found, strict=True))
    kept = response >= _MIN_SHARE * _strong(response)
    return Blobs(px[kept] * step, response[kept])


def _strong(response: F32) -> float:
    """What the darkest tenth answers at least."""
    return float(np.quantile(response, 0.9)) if len(response) else 0.0


def _work_mpp(slide: Slide) -> float:
    """A resolution that needs no resampling, where the pyramid has one that will do."""
    for level in slide.levels:
        mpp = slide.mpp * level.downsample
        if _WORK_MPP_RANGE[0] <= mpp <= _WORK_MPP_RANGE[1]:
            return mpp
    return max(WORK_MPP, slide.mpp)


def _blocks_on_tissue(slide: Slide, mpp: float) -> list[Box]:
    """Boxes of the grid of `mpp` that tile the slide where it is not glass."""
    width, height = (int(np.ceil(n * slide.mpp / mpp)) for n in slide.size_px)
    columns, rows = (int(np.ceil(n * slide.mpp / _OVERVIEW_UM)) for n in slide.size_px)
    overview = slide.tolerant()[0].read_at((0, 0, columns, rows), _OVERVIEW_UM)
    glass = _OD[slide.background[_RED]]
    stained = _OD[overview[..., _RED]] - glass > _TISSUE_OD
    boxes = []
    for y in range(0, height, _BLOCK_PX):
        for x in range(0, width, _BLOCK_PX):
            box = (x, y, min(x + _BLOCK_PX, width), min(y + _BLOCK_PX, height))
            x0, y0, x1, y1 = (v * mpp / _OVERVIEW_UM for v in box)
            if stained[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))].any():
                boxes.append(box)
    return boxes


def _in_block(slide: Slide, box: Box, mpp: float) -> tuple[Points, F32]:
    """(n, 2) middles in the pixels of the grid and (n,) responses of the blobs of one block."""
    sigma = SIGMA_UM / mpp
    halo = int(np.ceil(4 * _SIGMA_RATIO * sigma)) + 2
    x0, y0, x1, y1 = box
    density = _OD[slide.read_at((x0 - halo, y0 - halo, x1 + halo, y1 + halo), mpp)[..., _RED]]
    inner = cv2.GaussianBlur(density, (0, 0), sigma)
    outer = cv2.GaussianBlur(density, (0, 0), _SIGMA_RATIO * sigma)
    response: F32 = np.asarray(inner - outer, np.float32)
    side = 2 * max(1, round(_APART_UM / mpp / 2)) + 1
    around = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    peaks = (response >= cv2.dilate(response, around)) & (response > _MIN_RESPONSE)
    y, x = np.nonzero(peaks[halo:-halo, halo:-halo])
    y, x = y + halo, x + halo
    at = response[y, x]
    dx = _parabola(response[y, x - 1], at, response[y, x + 1])
    dy = _parabola(response[y - 1, x], at, response[y + 1, x])
    corner = np.array([x0 - halo + 0.5, y0 - halo + 0.5])
    return np.stack([x + dx, y + dy], axis=1) + corner, at


def _parabola(before: F32, at: F32, after: F32) -> npt.NDArray[np.float64]:
    """Where between -0.5 and 0.5 the parabola through three values has its peak."""
    bend = (before - at) + (after - at)
    shift = 0.5 * (before - after) / np.where(bend < 0, bend, -1)
    return np.asarray(np.clip(np.where(bend < 0, shift, 0), -0.5, 0.5), np.float64)
