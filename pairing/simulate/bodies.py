"""Nuclei drawn into a block of pixels: which pixel is whose, and how much chromatin it shows.

Works on many nuclei at once, on windows of pixels around each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pairing.simulate.celltypes import CELL_TYPES, GRAIN_UM, INTERPHASE
from pairing.simulate.nuclei import Nuclei
from pairing.simulate.slide_map import View
from pairing.simulate.tissue import Cells

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_NOISE_STEP_UM = 0.125
_NOISE_SIZE = 512
_NOISE_SEED = 5
_WINDOW_PX = 1_500_000  # of all windows that are worked on at once
# How the state shows: chromatin moves from the middle of the nucleus to its rim.
STATE_CONTRAST = 2.2
MEMBRANE_CONTRAST = 0.45
NUCLEOLUS_UM = 0.5


@cache
def noise(sigma_um: float) -> F32:
    """(512, 512) grains of the given size, of mean 0 and variance 1, that repeat every 64 µm."""
    white = np.random.default_rng(_NOISE_SEED).standard_normal((_NOISE_SIZE, _NOISE_SIZE))
    grains = ndimage.gaussian_filter(white, sigma_um / _NOISE_STEP_UM, mode="wrap")
    return np.asarray(grains / grains.std(), dtype=np.float32)


def noise_at(field: F32, u_um: F32, v_um: F32, start: npt.NDArray[np.integer]) -> F32:
    """Noise at points of `u` and `v`, each row of nuclei or cells from a `start` of its own."""
    step = np.float32(1 / _NOISE_STEP_UM)
    x = (u_um * step).astype(np.int32) + start[..., 0]
    y = (v_um * step).astype(np.int32) + start[..., 1]
    return np.asarray(field[y & (_NOISE_SIZE - 1), x & (_NOISE_SIZE - 1)], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Bodies:
    """What the nuclei of a block make of its pixels, each (h, w).

    `every` and `labelled` hold 1 + row of the nucleus (of those handed in) that lies there, 0
    outside: of all of them, and of those that were asked for. `near` and `far` are the chromatin
    in and out of focus.
    """

    every: I32
    labelled: I32
    near: F32
    far: F32


def draw_bodies(
    view: View,
    nuclei: Nuclei,
    cells: Cells,
    centres_px: npt.NDArray[np.float64],
    mpp: float,
    labelled: Mask,
    painted: Mask,
    in_focus: Mask,
) -> Bodies:
    """Draw the nuclei at `centres_px` of the block that `view` is of.

    Where two overlap their chromatin adds up, and the pixel belongs to the one in whose outline
    it lies deeper, so that none vanishes.
    """
    shape = view.x_um.shape
    every, mine = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    deepest, deepest_mine = np.ones(shape, np.float32), np.ones(shape, np.float32)
    planes = (np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    for rows, top, left, rho, chromatin in _windows(view, nuclei, cells, centres_px, mpp):
        side = rho.shape[1]
        for i, row in enumerate(rows.tolist()):
            y0, x0 = int(top[i]), int(left[i])
            ys, xs = slice(max(y0, 0), y0 + side), slice(max(x0, 0), x0 + side)
            height, width = every[ys, xs].shape
            oy, ox = max(-y0, 0), max(-x0, 0)
            window = (slice(oy, oy + height), slice(ox, ox + width))
            r = rho[i][window]
            wins = r < deepest[ys, xs]
            every[ys, xs][wins] = row + 1
            np.minimum(deepest[ys, xs], r, out=deepest[ys, xs])
            if labelled[row]:
                wins = r < deepest_mine[ys, xs]
                mine[ys, xs][wins] = row + 1
                np.minimum(deepest_mine[ys, xs], r, out=deepest_mine[ys, xs])
            if painted[row]:
                planes[0 if in_focus[row] else 1][ys, xs] += chromatin[i][window]
    return Bodies(every, mine, *planes)


def nearest(labels: I32, mpp: float) -> tuple[F32, I32]:
    """(distance in µm to the nearest labelled pixel, its label) of every pixel."""
    outside = (labels == 0).astype(np.uint8)
    distance_px, zone = cv2.distanceTransformWithLabels(
        outside, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    owner = np.zeros(int(zone.max()) + 1, np.int32)
    inside = outside == 0
    owner[zone[inside]] = labels[inside]
    return (distance_px * np.float32(mpp)).astype(np.float32), owner[zone]


def _windows(
    view: View, nuclei: Nuclei, cells: Cells, centres_px: npt.NDArray[np.float64], mpp: float
) -> Iterator[tuple[I64, I64, I64, F32, F32]]:
    """(rows, top, left, rho, chromatin) of nuclei whose windows are of one size."""
    height, width = view.x_um.shape
    half = np.ceil(nuclei.reach_um() / mpp / 6).astype(np.int64) * 6 + 2
    middle = np.floor(centres_px).astype(np.int64)
    touches = ((middle + half[:, None] >= 0) & (middle - half[:, None] < (width, height))).all(1)
    for size in np.unique(half[touches]).tolist():
        rows = np.flatnonzero(touches & (half == size))
        side = 2 * size + 1
        for part in np.array_split(rows, -(-len(rows) * side**2 // _WINDOW_PX)):
            top, left = middle[part, 1] - size, middle[part, 0] - size
            y = top[:, None, None] + np.arange(side)[:, None]
            x = left[:, None, None] + np.arange(side)
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            where = np.clip(y, 0, height - 1) * width + np.clip(x, 0, width - 1)
            some = nuclei.take(part)
            u, v = _local(some, view.x_um.ravel()[where], view.y_um.ravel()[where])
            rho, heading = some.outlines.depth(u, v)
            if view.shown is not None:
                inside &= view.shown.ravel()[where]
            rho[~inside] = np.inf
            pattern = _chromatin(some, cells, u, v, rho, heading)
            yield part, top, left, rho, pattern


def _local(nuclei: Nuclei, x_um: F32, y_um: F32) -> tuple[F32, F32]:
    """Points (n, h, w) in the frames of the outlines of n nuclei."""

    def column(values: npt.NDArray[np.float64]) -> F32:
        return values.astype(np.float32)[:, None, None]

    # Positions are subtracted before they lose digits: 24,000 µm hold 0.002 µm in float32.
    dx, dy = x_um - column(nuclei.x_um), y_um - column(nuclei.y_um)
    c, s = column(np.cos(nuclei.angle)), column(np.sin(nuclei.angle))
    u0, v0 = column(nuclei.outlines.centroid[:, 0]), column(nuclei.outlines.centroid[:, 1])
    return dx * c + dy * s + u0, dy * c - dx * s + v0


def _chromatin(
    nuclei: Nuclei, cells: Cells, u: F32, v: F32, rho: F32, heading: npt.NDArray[np.complex64]
) -> F32:
    """(n, h, w) haematoxylin density, 0 outside; its mean over the nucleus is the nucleus' own."""
    kind, phase = cells.type_index[nuclei.cell], cells.phase[nuclei.cell]
    usual = (phase == INTERPHASE).astype(np.float32)[:, None, None]

    def of_type(name: str) -> F32:
        return np.array([getattr(t, name) for t in CELL_TYPES], np.float32)[kind][:, None, None]

    state = cells.state[nuclei.cell].astype(np.float32)[:, None, None] - np.float32(0.5)
    inside = rho < 1
    rho = np.where(inside, rho, 1)
    # Of mean zero over the area of any outline, since rho² is evenly spread there.
    pattern = 1 + usual * (STATE_CONTRAST * state * (2 * rho**2 - 1))
    contrast = np.where(phase == INTERPHASE, of_type("grain_contrast")[:, 0, 0], 0.3)
    grain = np.array([t.grain for t in CELL_TYPES])[kind]
    for index, sigma_um in enumerate(GRAIN_UM):
        mine = grain == index
        if mine.any():
            start = nuclei.texture[mine][:, None, None]
            grains = noise_at(noise(sigma_um), u[mine], v[mine], start)
            pattern[mine] += contrast[mine, None, None].astype(np.float32) * grains
    with_nucleoli = (phase == INTERPHASE) & (nuclei.nucleoli[:, :, 2] != 0).any(axis=1)
    if with_nucleoli.any():
        outlines = nuclei.outlines.take(np.flatnonzero(with_nucleoli))
        blobs = np.zeros_like(u[with_nucleoli])
        for radius, angle, weight in nuclei.nucleoli[with_nucleoli].transpose(1, 2, 0):
            cu, cv = outlines.long_um * radius * np.cos(angle), outlines.short_um * radius
            du = u[with_nucleoli] - cu[:, None, None].astype(np.float32)
            dv = v[with_nucleoli] - (cv * np.sin(angle))[:, None, None].astype(np.float32)
            spot = np.exp((du**2 + dv**2) * np.float32(-0.5 / NUCLEOLUS_UM**2))
            blobs += weight[:, None, None].astype(np.float32) * spot
        pattern[with_nucleoli] += of_type("nucleolus_contrast")[with_nucleoli] * blobs
    spoked = (phase == INTERPHASE) & (of_type("spoke_contrast")[:, 0, 0] > 0)
    if spoked.any():
        turned = np.exp(1j * nuclei.spoke_phase[spoked]).astype(np.complex64)[:, None, None]
        wheel = (heading[spoked] ** 6 * turned).real * np.clip(2.2 * rho[spoked] - 0.5, 0, 1)
        pattern[spoked] += of_type("spoke_contrast")[spoked] * wheel
    pattern += usual * (MEMBRANE_CONTRAST * np.exp(-(((rho - 0.95) / 0.08) ** 2)))
    np.maximum(pattern, 0.15, out=pattern)
    pattern *= inside
    total = pattern.sum(axis=(1, 2), keepdims=True)
    share = inside.sum(axis=(1, 2), keepdims=True) / np.maximum(total, 1e-6)
    scale = share * nuclei.density[:, None, None]
    return np.asarray(pattern * scale, dtype=np.float32)
