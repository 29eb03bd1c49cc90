"""Pictures with known blemishes: simulated and real tissue at the patches' scale, spoiled here.

Folds are the simulator's own. Ink and defocus are painted here, on simulated and real tissue alike:
ink by Beer-Lambert over what is there, defocus as a Gaussian, and then noise and JPEG as a scanner
would add them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import simplejpeg
from PIL import Image
from scipy.spatial import cKDTree

from benchmarks.registration.aligned import aligned
from benchmarks.registration.pairs import SLIDE, simulated
from pairing.quality import Scores, measure
from pairing.simulate.params import SlideParams
from pairing.slide import open_slide

Rgb = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

MPP, SIZE_PX = 0.25, 224
SLIDE_MPP = 0.2738
N_CELLS = 1200
# By convention a tile of nuclei has the pixel size at which its median nucleus is this wide.
NUCLEUS_UM = 8.0
# Optical densities of red, green and blue of one layer of ink: the complement of its colour.
INKS: Final = {
    "blue": (1.00, 0.62, 0.18),
    "cyan": (1.00, 0.25, 0.10),
    "green": (1.00, 0.42, 0.75),
    "black": (1.00, 1.00, 1.00),
    "navy": (1.00, 0.85, 0.40),
    "red": (0.05, 0.90, 0.80),
}
INK_LAYERS = (0.5, 1.5)
STROKE_UM = (150.0, 500.0)
NOISE_GREY = 1.8
JPEG_QUALITY = 85
FOLDS_UM = (15.0, 25.0, 40.0, 60.0)
# Of CMU-1-Small-Region at MPP, (x0, y0, x1, y1): no ink to be seen here. Green marking dye lies
# along the other margins, as pathologists put it on.
UNMARKED_PX = (0, 1400, 2200, 5922)


@dataclass(frozen=True, slots=True)
class Sheet:
    """A picture at MPP and patches in it: corners (n, 2) in its pixels.

    `share` is the true share of each patch that is spoiled, where that is known. `points` is, of a
    simulated section, the truth of the cells that the patches are of, row by row.
    """

    name: str
    rgb: Rgb
    corners_px: I64
    share: F64 | None = None
    points: pd.DataFrame | None = None

    def scores(self) -> Scores:
        return measure(self.rgb, MPP, self.corners_px, SIZE_PX)

    def patches(self) -> Iterator[Rgb]:
        for x, y in self.corners_px.tolist():
            yield self.rgb[y : y + SIZE_PX, x : x + SIZE_PX]


def simulated_sheet(out: Path, seed: int, *, registered: bool = False, **slide: float) -> Sheet:
    """Patches of the instrument's cells of a simulated section, where truth puts them.

    `registered`: where the registration puts them instead, and `points` has its `error_um`.
    """
    made = simulated(out, N_CELLS, seed, SlideParams.model_validate({"mpp": SLIDE_MPP, **slide}))
    points = made.points[~made.points["stranger"]].reset_index(drop=True)
    place_px = points[["x_px", "y_px"]].to_numpy()
    if registered:
        found = aligned(made.pair()).alignment
        um = points[["x_um", "y_um"]].to_numpy()
        assert found.he_px_from_xenium_um is not None, f"seed {seed}: no place was found"
        place_px = found.he_px_from_xenium_um(um)
        points = points.assign(error_um=found.error_um(um))
    with open_slide(made.folder / SLIDE) as opened:
        rgb = _resampled(opened.read((0, 0, *opened.size_px)), SLIDE_MPP)
    centres = place_px * SLIDE_MPP / MPP
    corners = np.floor(centres - SIZE_PX / 2).astype(np.int64)
    inside = ((corners >= 0) & (corners + SIZE_PX <= np.array(rgb.shape[1::-1]))).all(axis=1)
    return Sheet(f"seed {seed}", rgb, corners[inside], None, points[inside])


def under_fold(sheet: Sheet) -> Sheet:
    """With a `share` of 1 where a cell lies in the fold, 0 far from it, NaN beside it."""
    assert sheet.points is not None
    folded = sheet.points["folded"].to_numpy()
    near = cKDTree(sheet.corners_px[folded]).query(sheet.corners_px)[0] < SIZE_PX
    return replace(sheet, share=np.where(folded, 1.0, np.where(near, np.nan, 0.0)))


def real_sheet(path: Path) -> Sheet:
    """A real slide, cut on a grid where it shows tissue."""
    with open_slide(path) as opened:
        rgb = _resampled(opened.read((0, 0, *opened.size_px)), opened.mpp)
    return _on_grid(path.stem, rgb, SIZE_PX // 2)


def unmarked(sheet: Sheet) -> Sheet:
    """The patches of CMU-1-Small-Region where a person sees no ink."""
    low, high = np.array(UNMARKED_PX[:2]), np.array(UNMARKED_PX[2:])
    inside = ((sheet.corners_px >= low) & (sheet.corners_px + SIZE_PX <= high)).all(axis=1)
    return replace(sheet, corners_px=sheet.corners_px[inside])


def tile_sheets(folder: Path) -> list[Sheet]:
    """The real tiles with hand-made nuclei, of many stains and scanners."""
    sheets = []
    for path in sorted(folder.glob("*_he.png")):
        rgb = np.asarray(Image.open(path).convert("RGB"))
        labels = np.asarray(Image.open(str(path).replace("_he.png", "_labels.png")))
        area = np.bincount(labels.ravel())[1:]
        mpp = NUCLEUS_UM / (2 * np.sqrt(np.median(area[area > 0]) / np.pi))
        sheet = _on_grid(path.name.removesuffix("_he.png")[:8], _resampled(rgb, float(mpp)), 56)
        if len(sheet.corners_px):
            sheets.append(sheet)
    return sheets


def defocused(sheet: Sheet, sigma_um: float, rng: np.random.Generator) -> Sheet:
    """The whole sheet out of focus."""
    blurred = cv2.GaussianBlur(sheet.rgb, (0, 0), sigma_um / MPP)
    return replace(sheet, rgb=_scanned(np.asarray(blurred, np.float32), rng))


def inked(sheet: Sheet, ink: str, rng: np.random.Generator) -> Sheet:
    """Strokes of a pen over a third of it or so; `share` is the part of each patch under ink."""
    height, width = sheet.rgb.shape[:2]
    cover = np.zeros((height, width), np.uint8)
    while cover.mean() < 0.3:
        ends = rng.uniform((0, 0), (width, height), (3, 2)).astype(np.int32)
        thick = round(rng.uniform(*STROKE_UM) / MPP)
        cv2.polylines(cover, [ends], isClosed=False, color=1, thickness=thick)
    coarse = rng.uniform(0.8, 1.2, (max(2, height // 400), max(2, width // 400)))
    uneven = cv2.resize(coarse.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    soft = cv2.GaussianBlur(cover.astype(np.float32), (0, 0), rng.uniform(2, 8) / MPP)
    colour = np.array(INKS[ink]) * rng.uniform(0.9, 1.1, 3) * rng.uniform(*INK_LAYERS)
    density = (soft * uneven)[..., None] * colour.astype(np.float32)
    light = (sheet.rgb.astype(np.float32) + 1) * 10**-density - 1
    return replace(sheet, rgb=_scanned(light, rng), share=_covered(cover, sheet.corners_px))


def folded_twice(sheet: Sheet, rng: np.random.Generator) -> Sheet:
    """Bands where another part of the sheet lies over it: two layers, as most real folds start."""
    height, width = sheet.rgb.shape[:2]
    cover = np.zeros((height, width), np.uint8)
    while cover.mean() < 0.1:
        ends = rng.uniform((0, 0), (width, height), (2, 2)).astype(np.int32)
        thick = round(rng.choice(FOLDS_UM) / MPP)
        cv2.polylines(cover, [ends], isClosed=False, color=1, thickness=thick)
    other = np.roll(sheet.rgb, rng.integers(200, 800, 2).tolist(), (0, 1)).astype(np.float32)
    light = sheet.rgb.astype(np.float32)
    light = np.where(cover[..., None], (light + 1) * (other + 1) / 256 - 1, light)
    return replace(sheet, rgb=_scanned(light, rng), share=_covered(cover, sheet.corners_px))


def _covered(cover: Rgb, corners_px: I64) -> F64:
    box = cv2.integral(cover)
    x, y = corners_px.T
    under = box[y + SIZE_PX, x + SIZE_PX] - box[y, x + SIZE_PX] - box[y + SIZE_PX, x] + box[y, x]
    return np.asarray(under / SIZE_PX**2, np.float64)


def _resampled(rgb: Rgb, mpp: float) -> Rgb:
    size = tuple(round(n * mpp / MPP) for n in rgb.shape[1::-1])
    return np.array(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))


def _scanned(light: F32, rng: np.random.Generator) -> Rgb:
    noisy = light + np.float32(NOISE_GREY) * rng.standard_normal(light.shape, dtype=np.float32)
    rgb = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    jpeg = simplejpeg.encode_jpeg(rgb, quality=JPEG_QUALITY, colorsubsampling="420")
    return np.asarray(simplejpeg.decode_jpeg(jpeg, colorspace="RGB"))


def _on_grid(name: str, rgb: Rgb, step_px: int) -> Sheet:
    x, y = (np.arange(0, n - SIZE_PX + 1, step_px) for n in rgb.shape[1::-1])
    corners = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.int64)
    shown = [
        (rgb[b : b + SIZE_PX, a : a + SIZE_PX].min(axis=2) < 200).mean() > 0.2
        for a, b in corners.tolist()
    ]
    return Sheet(name, rgb, corners[np.array(shown, bool)])
