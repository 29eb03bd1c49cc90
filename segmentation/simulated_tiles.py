"""Simulated tiles to train on: scanned at any pixel size, compressed, some torn and soiled.

The simulator's own tiles are whole and clean. Real slides also show what must not be taken for a
nucleus: bundles of fibres and scraps with glass between them, thick folds, ink and dirt.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from pairing.simulate.tile import labelled_tile
from segmentation.tiles import LabelledTile, Labels, Rgb, resampled

TILE_UM = 128.0
_SCAN_MPP = (0.22, 0.5)
_JPEG_QUALITY = (70, 95)
_SOILED_SHARE = 0.4
_CLEAR_OF_NUCLEI_UM = 1.5  # tears, folds and dirt leave every nucleus as it was labelled
_GLASS = 242.0
# Optical density of red, green and blue: green, blue and black marking inks, and brown pigment.
_DIRT = np.array([[1.0, 0.35, 0.55], [1.0, 0.7, 0.25], [0.9, 0.9, 0.9], [0.45, 0.7, 1.0]])

F32 = npt.NDArray[np.float32]


def simulated_tiles(seed: int, n: int, mpp: float) -> list[LabelledTile]:
    """`n` tiles of 128 µm with their true nuclei at a network's pixel size."""
    return [simulated_tile(1000 * seed + i, mpp) for i in range(n)]


def simulated_tile(seed: int, mpp: float) -> LabelledTile:
    """Simulated H&E as a scanner's file would give it, resampled to `mpp`, and its nuclei.

    The pixel size of the scan and the quality of its JPEG are random; two of five tiles are
    soiled. The same arguments give the same tile.
    """
    rng = np.random.default_rng([seed, 3])
    scan_mpp = float(rng.uniform(*_SCAN_MPP))
    rgb, labels = labelled_tile(seed, round(TILE_UM / scan_mpp), scan_mpp)
    if rng.random() < _SOILED_SHARE:
        rgb = soiled(rgb, labels, scan_mpp, rng)
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(*_JPEG_QUALITY))]
    _, packed = cv2.imencode(".jpg", rgb[..., ::-1], quality)
    unpacked = np.asarray(cv2.imdecode(packed, cv2.IMREAD_COLOR))
    rgb = np.ascontiguousarray(unpacked[..., ::-1], np.uint8)
    return resampled(LabelledTile(f"simulated-{seed}", rgb, labels, scan_mpp), mpp)


def soiled(rgb: Rgb, labels: Labels, mpp: float, rng: np.random.Generator) -> Rgb:
    """The same nuclei with what lies between them torn to bundles, folded, or under dirt."""
    density = -np.log10(np.maximum(rgb, 1) / np.float32(_GLASS))
    reach = 2 * round(_CLEAR_OF_NUCLEI_UM / mpp) + 1
    around = cv2.dilate(
        (labels > 0).astype(np.float32),
        cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach)),
    )
    between = 1 - cv2.GaussianBlur(around, (0, 0), 0.5 / mpp)[..., None]
    size = labels.shape
    if rng.random() < 0.8:
        bundles = _blots(
            size, rng.uniform(1.5, 5) / mpp, rng.uniform(1, 5), rng.uniform(0.3, 0.9), rng
        )
        density *= 1 - between * (1 - bundles)
    if rng.random() < 0.5:
        folds = _blots(size, rng.uniform(2, 8) / mpp, rng.uniform(1, 4), rng.uniform(0.2, 0.6), rng)
        thicker = rng.uniform(1.0, 2.5, 3).astype(np.float32)
        density *= 1 + between * folds * (thicker - 1)
    if rng.random() < 0.5:
        dirt = _blots(size, rng.uniform(0.7, 4) / mpp, 1.5, rng.uniform(0.02, 0.15), rng)
        colour = _DIRT[rng.integers(len(_DIRT))] * np.exp(rng.uniform(np.log(0.08), np.log(1.2)))
        density += between * dirt * colour.astype(np.float32)
    return np.asarray(np.clip(np.rint(_GLASS * 10**-density), 0, 255), np.uint8)


def _blots(
    size: tuple[int, int], sigma_px: float, stretch: float, share: float, rng: np.random.Generator
) -> F32:
    """(Y, X, 1) of 0 to 1: soft-edged blots, `stretch` times as long, that cover a `share`."""
    side = 2 * max(size)
    wide = np.sqrt(stretch)
    noise = cv2.GaussianBlur(
        rng.standard_normal((side, side), np.float32),
        (0, 0),
        sigma_px * wide,
        sigmaY=sigma_px / wide,
    )
    middle = (side / 2, side / 2)
    turn = np.asarray(cv2.getRotationMatrix2D(middle, float(rng.uniform(0, 180)), 1.0), np.float64)
    turn[:, 2] -= side / 4
    field = cv2.warpAffine(noise, turn, size[::-1])
    above = (field - np.quantile(field, 1 - share)) / field.std()
    return np.asarray(1 / (1 + np.exp(np.clip(-12 * above, -30, 30))), np.float32)[..., None]
