"""The morphology channels of one field of view."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import numpy.typing as npt

from pairing.simulate.bodies import Bodies, noise, noise_at
from pairing.simulate.celltypes import CELL_TYPES
from pairing.simulate.molecules import TissueBlock
from pairing.simulate.section import PIXEL_UM

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
# Of each field of view: how far its picture lies off (sigma), its gain, and the fall of its light
# towards the corners.
_FOV_SHIFT_PX = 0.6
_FOV_GAIN_SPREAD = 0.05
_VIGNETTE = 0.18
_DEBRIS_PER_MM2 = 25.0
_INTERIOR_TYPES = ("fibroblast", "endothelial", "smooth_muscle")
_BOUNDARY_TYPES = ("epithelial", "secretory", "lymphocyte", "plasma", "macrophage", "eosinophil")


def photograph(
    type_index: npt.NDArray[np.int64],
    block: TissueBlock,
    bodies: Bodies,
    inside: tuple[slice, slice],
    stains: bool,
    rng: np.random.Generator,
) -> Iterator[npt.NDArray[np.uint16]]:
    """The `inside` of one field of view in each of STAINS, or in DAPI alone.

    Optics, haze, uneven light, debris, shot noise; a picture that lies a little off, as stitched
    ones do. `type_index` is of all cells that `block.maker` numbers.
    """
    px = 1 / PIXEL_UM
    shift = np.array([[1, 0, 0], [0, 1, 0]], np.float64)
    shift[:, 2] = _FOV_SHIFT_PX * rng.standard_normal(2)
    gain = np.exp(_FOV_GAIN_SPREAD * rng.standard_normal())
    height, width = (s.stop - s.start for s in inside)
    y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in (height, width))
    shading = np.float32(gain) * (1 - np.float32(_VIGNETTE / 2) * (x**2 + y[:, None] ** 2))
    in_cells = cv2.GaussianBlur((block.maker > 0).astype(np.float32), (0, 0), 2.0 * px)
    sharp: F32 = np.asarray(cv2.GaussianBlur(bodies.near, (0, 0), 0.45 * px), np.float32)
    sharp += cv2.GaussianBlur(bodies.far, (0, 0), 1.3 * px)
    light = 90 * in_cells + 3800 * sharp + 900 * cv2.GaussianBlur(sharp, (0, 0), 3.0 * px)
    yield _as_camera(light, shift, inside, shading, _debris(height, width, rng), rng)
    if not stains:
        return
    kind = np.concatenate([[-1], type_index])[block.maker]
    body = (block.maker > 0) & ~block.maker_in_nucleus
    owner = block.maker.astype(np.float32)
    none = np.zeros((height, width), np.float32)
    for names, borders in ((_BOUNDARY_TYPES, True), (None, False), (_INTERIOR_TYPES, False)):
        mine = body if names is None else body & np.isin(kind, _numbers(names))
        signal = mine.astype(np.float32)
        if borders:
            signal[cv2.morphologyEx(owner, cv2.MORPH_GRADIENT, np.ones((3, 3))) == 0] = 0
        start = np.zeros(2, np.int64)
        size = signal.shape
        um_y, um_x = (np.arange(n, dtype=np.float32) * np.float32(PIXEL_UM) for n in size)
        grain = noise_at(noise(0.38), um_x[None, :], um_y[:, None], start)
        signal *= 1 + np.float32(0.4) * grain
        light = 2600 * cv2.GaussianBlur(signal, (0, 0), 0.4 * px) + 150 * in_cells
        yield _as_camera(light, shift, inside, shading, none, rng)


def _numbers(names: Sequence[str]) -> list[int]:
    return [i for i, t in enumerate(CELL_TYPES) if t.name in names]


def _as_camera(
    light: F32,
    shift: F64,
    inside: tuple[slice, slice],
    shading: F32,
    debris: F32,
    rng: np.random.Generator,
) -> npt.NDArray[np.uint16]:
    moved = cv2.warpAffine(light, shift, light.shape[::-1], flags=cv2.INTER_LINEAR)
    picture = (220 + moved[inside] + debris) * shading
    picture += np.sqrt(2.5 * picture) * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.asarray(np.clip(np.rint(picture), 0, 65535), dtype=np.uint16)


def _debris(height: int, width: int, rng: np.random.Generator) -> F32:
    """Dust and precipitate that shines: bright, blurred, and no nucleus."""
    picture = np.zeros((height, width), np.float32)
    for _ in range(rng.poisson(_DEBRIS_PER_MM2 * height * width * PIXEL_UM**2 * 1e-6)):
        sigma = rng.uniform(0.8, 4.0) / PIXEL_UM
        reach = int(4 * sigma) + 1
        cx, cy = rng.uniform(0, width), rng.uniform(0, height)
        xs = np.arange(max(0, int(cx) - reach), min(width, int(cx) + reach))
        ys = np.arange(max(0, int(cy) - reach), min(height, int(cy) + reach))
        spot = np.exp(-((ys[:, None] - cy) ** 2 + (xs[None] - cx) ** 2) / (2 * sigma**2))
        picture[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1] += rng.uniform(1500, 9000) * spot
    return picture
