"""Nuclei of one small picture in memory, by the same windows and steps as those of a slide."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from segmentation.config import GRID_PX
from segmentation.dynamics import Labels
from segmentation.nuclei import find_nuclei, halo_px
from segmentation.stain import Normalisation, NormalisationKind, Rgb, percentiles_of
from segmentation.windows import N_CHANNELS, Output, Predictor, WindowGrid, blended


class PictureNetwork(Predictor, Protocol):
    """What of a network a picture needs."""

    mpp: float
    window_px: int
    overlap_px: int
    any_window: bool
    normalisation: NormalisationKind


def find_in_picture(network: PictureNetwork, rgb: Rgb) -> tuple[Labels, npt.NDArray[np.float32]]:
    """Nuclei of a picture (Y, X, 3) at the network's pixel size, framed by white.

    Returns labels (Y, X) int32, 0 outside nuclei, numbered by centroid, y before x, and the logit
    (Y, X) of a pixel being nucleus.
    """
    height, width = rgb.shape[:2]
    window_px = network.window_px
    if network.any_window:  # one window over a small picture: nothing to blend
        whole_px = max(height, width) + network.overlap_px
        window_px = min(window_px, GRID_PX * -(-whole_px // GRID_PX))
    grid = WindowGrid.over((width, height), network.mpp, window_px, network.overlap_px)
    normalisation = (
        Normalisation(kind="optical_density")
        if network.normalisation == "optical_density"
        else percentiles_of(rgb.reshape(-1, 3), "the picture")
    )
    frame = ((window_px, window_px), (window_px, window_px), (0, 0))
    framed = np.pad(rgb, frame, constant_values=255)

    def output_of(window: tuple[int, int]) -> Output:
        x0, y0, x1, y1 = (v + window_px for v in grid.box(*window))
        output = np.zeros((N_CHANNELS, window_px, window_px), np.float16)
        output[:3] = network.predict(framed[None, y0:y1, x0:x1], normalisation)[0]
        return output

    halo = halo_px(network.mpp)
    core = (0, 0, width, height)
    field = blended(grid, (-halo, -halo, width + halo, height + halo), output_of)
    found = find_nuclei(field, (-halo, -halo), core, network.mpp, "cpu")
    number = np.zeros(int(found.piece_YX.max()) + 1, np.int32)
    number[found.number] = np.arange(1, len(found) + 1)
    inner = slice(halo, halo + height), slice(halo, halo + width)
    return number[found.piece_YX[inner]], field.logit_YX[inner]
