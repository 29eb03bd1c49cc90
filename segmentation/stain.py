"""Colours to what a network and a table need: densities, a slide's own scale, haematoxylin."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from pairing.slide import Slide
from shards.errors import BadInput
from shards.schema import Record

Rgb = npt.NDArray[np.uint8]
Pixels = npt.NDArray[np.float32]

# The ends of Cellpose's own scale.
_PERCENTILES: Final = (1.0, 99.0)
# Nuclei are several pixels wide here, so that the percentiles know them.
_SCALE_MPP: Final = 2.0
# As many windows of tissue, evenly chosen, tell the scale of a slide of any size.
_SCALE_WINDOWS, _SCALE_WINDOW_PX = 64, 256

# Optical densities of red, green and blue per unit of haematoxylin and eosin, and a third
# direction at right angles (Ruifrok and Johnston, Anal Quant Cytol Histol 2001;23:291).
_HE = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
_STAINS = np.vstack([_HE, np.cross(_HE[0], _HE[1])])
_STAINS /= np.linalg.norm(_STAINS, axis=1, keepdims=True)
_HAEMATOXYLIN_OF_DENSITY = np.linalg.inv(_STAINS)[:, 0].astype(np.float32)

_DENSITY_OF_LEVEL = -np.log10(np.maximum(np.arange(256), 1) / 255.0).astype(np.float32)


NormalisationKind = Literal["optical_density", "percentiles"]


class Normalisation(Record):
    """How the pixels of one slide become the input of a network, the same for every window.

    `optical_density`: absorbance of each channel against a white of 255. `percentiles`: `low` and
    `high` of each channel become 0 and 1.
    """

    kind: NormalisationKind
    low: tuple[float, float, float] = (0.0, 0.0, 0.0)
    high: tuple[float, float, float] = (255.0, 255.0, 255.0)

    def __call__(self, rgb: Rgb) -> Pixels:
        """(…, 3) pixels to the network's input, float32."""
        if self.kind == "optical_density":
            return optical_density(rgb)
        low, high = np.array(self.low, np.float32), np.array(self.high, np.float32)
        scaled: Pixels = (rgb.astype(np.float32) - low) / (high - low)
        return scaled


def optical_density(rgb: Rgb) -> Pixels:
    """(…, 3) pixels to absorbance, base 10, against a white of 255; glass is 0."""
    density: Pixels = _DENSITY_OF_LEVEL[rgb]
    return density


def haematoxylin(rgb: Rgb, glass: npt.NDArray[np.uint8]) -> Pixels:
    """(Y, X) amount of haematoxylin: its optical density where it alone is, 0 on glass.

    `rgb` (Y, X, 3); `glass` (3,) the slide's own. By the stain vectors of Ruifrok and Johnston,
    whatever the slide's own are: a figure to compare nuclei of one slide by.
    """
    density = optical_density(rgb) - optical_density(glass)
    parts = [density[..., c] * _HAEMATOXYLIN_OF_DENSITY[c] for c in range(3)]
    amount: Pixels = parts[0] + parts[1] + parts[2]
    return amount


def percentile_scale(
    slide: Slide, tissue: npt.NDArray[np.bool_], tissue_mpp: float
) -> Normalisation:
    """The 1st and 99th percentile of each channel over the slide's tissue, at 2 µm a pixel.

    `tissue` (Y, X) at `tissue_mpp`. Of a large slide 64 windows of 0.5 mm, evenly chosen among
    those with tissue. Raises BadInput where a channel is of one value.
    """
    slide, _ = slide.tolerant()
    shrink = _SCALE_MPP / tissue_mpp
    side = round(_SCALE_WINDOW_PX * shrink)
    corners = [
        (y, x)
        for y in range(0, tissue.shape[0], side)
        for x in range(0, tissue.shape[1], side)
        if tissue[y : y + side, x : x + side].any()
    ]
    chosen = np.unique(
        np.linspace(0, len(corners) - 1, min(len(corners), _SCALE_WINDOWS)).astype(int)
    )
    samples = []
    for y, x in (corners[i] for i in chosen):
        x0, y0 = round(x / shrink), round(y / shrink)
        rgb = slide.read_at((x0, y0, x0 + _SCALE_WINDOW_PX, y0 + _SCALE_WINDOW_PX), _SCALE_MPP)
        rows, columns = (
            start + (np.arange(_SCALE_WINDOW_PX) * shrink).astype(int) for start in (y, x)
        )
        # A window may reach outside the slide, where no tissue is.
        rows, columns = rows[rows < tissue.shape[0]], columns[columns < tissue.shape[1]]
        samples.append(rgb[: len(rows), : len(columns)][tissue[np.ix_(rows, columns)]])
    return percentiles_of(np.concatenate(samples), slide.path)


def percentiles_of(rgb: Rgb, where: object) -> Normalisation:
    """The 1st and 99th percentile of each channel of (n, 3) pixels.

    Raises BadInput, which names `where`, if a channel is of one value.
    """
    low, high = np.percentile(rgb, _PERCENTILES, axis=0)
    if (high <= low).any():
        raise BadInput(
            where,
            expected="tissue of more than one colour",
            found=f"channels from {low.tolist()} to {high.tolist()}",
            remedy="check that it is a stained H&E",
        )
    return Normalisation(kind="percentiles", low=tuple(low.tolist()), high=tuple(high.tolist()))
