"""How hard simulated slides are for methods that need no training."""
# mypy: disable-error-code=no-untyped-call

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import tifffile
from skimage.color import rgb2hed

from benchmarks.calibration.slides import MPP, Rgb, read_slide
from benchmarks.nuclei_scores import Counts, labels_like, large_enough, matched, otsu_watershed

F64 = npt.NDArray[np.float64]
Grey = npt.NDArray[np.uint8]
MORPHOLOGY_UM = 0.2125
TILE_PX = 320
MIN_NUCLEI_OF_TILE = 20
# A competent user's settings: many features, Lowe's ratio, as loose as 5 µm.
N_FEATURES = 20_000
RATIO = 0.8
RANSAC_UM = 5.0
MPPS = (0.5, 1.0, 2.0)


def otsu_counts(folder: Path, mpp: float) -> Counts:
    """Otsu + watershed on every tile of a simulated slide with nuclei, pooled.

    Labels smaller than the methods look for are left out: rims of nuclei that others cover.
    """
    rgb = read_slide(folder / "he.ome.tif", mpp)
    labels = labels_like(folder / "truth" / "he_nuclei.tif", rgb)
    total = Counts()
    for y in range(0, rgb.shape[0] - TILE_PX + 1, TILE_PX):
        for x in range(0, rgb.shape[1] - TILE_PX + 1, TILE_PX):
            tile = slice(y, y + TILE_PX), slice(x, x + TILE_PX)
            truth = large_enough(labels[tile], MPP)
            if truth.max() >= MIN_NUCLEI_OF_TILE:
                total += matched(truth, otsu_watershed(rgb[tile], MPP))
    return total


@dataclass(frozen=True, slots=True)
class Alignment:
    """An affine found between DAPI and H&E and its median error over all cells in µm."""

    how: str
    n_matches: int
    n_inliers: int
    error_um: float


@dataclass(frozen=True, slots=True)
class Cells:
    """True places of the instrument's cells: (n, 2) µm in the Xenium frame and on the slide."""

    um: F64
    slide_um: F64

    @classmethod
    def read(cls, folder: Path, mpp: float) -> Cells:
        cells = pd.read_parquet(folder / "truth" / "cells.parquet")
        return cls(
            cells[["x_um", "y_um"]].to_numpy(np.float64),
            cells[["x_px", "y_px"]].to_numpy(np.float64) * mpp,
        )

    def error_um(self, slide_from_um: npt.NDArray[np.floating]) -> float:
        """Median distance of the cells from where a (2, 3) affine puts them."""
        found = self.um @ slide_from_um[:, :2].T + slide_from_um[:, 2]
        return float(np.median(np.hypot(*(found - self.slide_um).T)))

    def best_affine_error_um(self) -> float:
        """Of the affine that fits the true places best by least squares."""
        design = np.column_stack([self.um, np.ones(len(self.um))])
        return self.error_um(np.linalg.lstsq(design, self.slide_um, rcond=None)[0].T)

    def given_error_um(self, path: Path, mpp: float) -> float:
        """Of the matrix that comes with the slide, morphology px from slide px."""
        morphology_px_from_he_px = np.loadtxt(path, delimiter=",")
        he_px_from_um = np.linalg.inv(morphology_px_from_he_px) @ np.diag(
            [1 / MORPHOLOGY_UM, 1 / MORPHOLOGY_UM, 1.0]
        )
        return self.error_um(mpp * he_px_from_um[:2])


def sift_alignments(folder: Path, mpp: float) -> Iterator[Alignment]:
    """SIFT + RANSAC at each pixel size, way to see the H&E, and mirror image."""
    cells = Cells.read(folder, mpp)
    slide = read_slide(folder / "he.ome.tif", mpp)
    focus = folder / "outs" / "morphology_focus" / "morphology_focus_0000.ome.tif"
    with tifffile.TiffFile(focus, is_ome=False) as file:
        dapi = file.series[0].levels[0].asarray()
    for at_mpp in MPPS:
        shrink = MPP / at_mpp
        he = cv2.resize(slide, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
        views = _views_of_he(np.asarray(he, np.uint8))
        scale = MORPHOLOGY_UM / at_mpp
        small = cv2.resize(dapi, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        bright = _stretched(small.astype(np.float32))
        for mirror in (False, True):
            seen = bright[:, ::-1] if mirror else bright
            for name, view in views.items():
                n_matches, n_inliers, affine = _sift_ransac(seen, view, at_mpp)
                how = f"{at_mpp:g} µm/px, {name}{', mirrored' if mirror else ''}"
                error = np.inf
                if affine is not None:
                    flip = np.diag([-1.0 if mirror else 1.0, 1.0, 1.0])
                    flip[0, 2] = seen.shape[1] if mirror else 0.0
                    px_from_um = np.diag([1 / at_mpp, 1 / at_mpp, 1.0])
                    error = cells.error_um(at_mpp * affine @ flip @ px_from_um)
                yield Alignment(how, n_matches, n_inliers, float(error))


def _views_of_he(rgb: Rgb) -> dict[str, Grey]:
    """Nuclei bright, as in DAPI."""
    haematoxylin = rgb2hed(rgb)[..., 0].astype(np.float32)
    return {
        "inverted grey": _stretched(255.0 - cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)),
        "haematoxylin": _stretched(haematoxylin),
    }


def _stretched(picture: npt.NDArray[np.floating]) -> Grey:
    low, high = np.percentile(picture, (1, 99.8))
    flat = np.clip((picture - low) / (high - low), 0, 1) * 255
    return np.asarray(cv2.createCLAHE(2.0, (16, 16)).apply(flat.astype(np.uint8)), np.uint8)


def _sift_ransac(src: Grey, dst: Grey, mpp: float) -> tuple[int, int, F64 | None]:
    """Matches, inliers and the (2, 3) affine from `src` to `dst`, None where there is none."""
    sift = cv2.SIFT.create(nfeatures=N_FEATURES, contrastThreshold=0.02)
    src_points, src_words = sift.detectAndCompute(np.ascontiguousarray(src), None)
    dst_points, dst_words = sift.detectAndCompute(dst, None)
    # FLANN's trees are drawn at random.
    cv2.setRNGSeed(0)
    pairs = cv2.FlannBasedMatcher({"algorithm": 1, "trees": 4}, {"checks": 64}).knnMatch(
        src_words, dst_words, k=2
    )
    good = [a for a, b in pairs if a.distance < RATIO * b.distance]
    if len(good) < 3:
        return len(good), 0, None
    from_px = np.array([src_points[m.queryIdx].pt for m in good]) + 0.5
    to_px = np.array([dst_points[m.trainIdx].pt for m in good]) + 0.5
    affine, inliers = cv2.estimateAffine2D(
        from_px, to_px, method=cv2.RANSAC, ransacReprojThreshold=RANSAC_UM / mpp,
        maxIters=20_000, confidence=0.999,
    )  # fmt: skip
    return len(good), int(inliers.sum()), None if affine is None else np.asarray(affine)
