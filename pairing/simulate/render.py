"""H&E and DAPI pictures painted from cell geometry, each in its own pixel frame.

Work is done in stain densities (multiples of a unit optical density) on any box of any frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pairing.geometry import Affine
from pairing.simulate.celltypes import CELL_TYPES, CellType
from pairing.simulate.donor import Stain
from pairing.simulate.fields import Layers
from pairing.simulate.nuclei import Nuclei
from pairing.simulate.tissue import EXPANSION_UM, Cells, Tissue

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]

_FIELD_GRID_UM = 1.0


@dataclass(frozen=True, slots=True)
class Frame:
    """A pixel grid: `height` × `width`, and where its pixels lie in the tissue."""

    um_from_px: Affine
    width: int
    height: int

    @property
    def mpp(self) -> float:
        return float(np.sqrt(self.um_from_px.area_scale))


@dataclass(frozen=True, slots=True)
class Labels:
    """Instance labels of one frame, each (Y, X): row + 1 of the nucleus or cell, 0 outside.

    `distance_um` is the distance to the nearest nucleus, 0 inside. A cell without nucleus has an
    area in `cell` and none in `nucleus`.
    """

    nucleus: I32
    cell: I32
    distance_um: F32


def label_frame(tissue: Tissue, frame: Frame) -> Labels:
    """Which nucleus and which cell each pixel centre belongs to; cells reach EXPANSION_UM out."""
    nuclei = tissue.nuclei
    nucleus = np.zeros((frame.height, frame.width), np.int32)
    nearest = np.full(nucleus.shape, np.inf, np.float32)
    px_from_um = frame.um_from_px.inverse
    centres = px_from_um(np.stack([nuclei.x_um, nuclei.y_um], axis=1))
    reach = nuclei.reach_um() / frame.mpp + 1
    for i in range(len(centres)):
        x0, x1 = _clip(centres[i, 0], reach[i], frame.width)
        y0, y1 = _clip(centres[i, 1], reach[i], frame.height)
        if x0 >= x1 or y0 >= y1:
            continue
        rho, _ = nuclei.outlines.depth(i, *nuclei.local(i, *_pixel_um(frame, x0, y0, x1, y1)))
        window = (slice(y0, y1), slice(x0, x1))
        wins = (rho < 1) & (rho < nearest[window])
        nucleus[window][wins] = i + 1
        nearest[window][wins] = rho[wins]
    outside = (nucleus == 0).astype(np.uint8)
    distance_px, zone = cv2.distanceTransformWithLabels(
        outside, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    owner = np.zeros(int(zone.max()) + 1, np.int32)
    inside = outside == 0
    owner[zone[inside]] = nucleus[inside]
    distance_um = (distance_px * frame.mpp).astype(np.float32)
    near = np.where(distance_um <= EXPANSION_UM, owner[zone], 0)
    cell_of = np.concatenate([[0], nuclei.cell + 1]).astype(np.int32)
    shown = np.concatenate([[False], tissue.cells.has_nucleus[nuclei.cell]])
    return Labels(np.where(shown[nucleus], nucleus, 0).astype(np.int32), cell_of[near], distance_um)


def paint_he(
    tissue: Tissue, frame: Frame, labels: Labels, stain: Stain, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """(Y, X, 3) RGB by Beer–Lambert: grey = white · 10^-(H · od_H + E · od_E), blurred, noisy."""
    layers = _layers_on(tissue, frame)
    haematoxylin, eosin = _base_stains(layers)
    # Cytoplasm is a little basophilic near the nucleus.
    haematoxylin += 0.10 * np.exp(-((labels.distance_um / 3.5) ** 2)) * (labels.cell > 0)
    _paint_cytoplasm(tissue, frame, labels, eosin)
    _paint_nuclei(tissue, frame, labels, haematoxylin)
    inside = labels.nucleus > 0
    eosin[inside] = 0.10
    grain = rng.standard_normal(eosin.shape, dtype=np.float32)
    cv2.GaussianBlur(grain, (0, 0), 0.35 / frame.mpp, dst=grain)
    grain *= np.float32(0.09) / grain.std()
    uneven = layers.tissue * (1 + 0.05 * layers.stain_field + grain)
    image = np.empty((*eosin.shape, 3), np.float32)
    sigma_px = stain.blur_um / frame.mpp
    for c in range(3):
        density = haematoxylin * np.float32(stain.haematoxylin * stain.vectors[0, c])
        density += eosin * np.float32(stain.eosin * stain.vectors[1, c])
        light = np.float32(stain.white[c]) * np.power(np.float32(10), -density * uneven)
        cv2.GaussianBlur(light, (0, 0), sigma_px, dst=light)
        light += np.float32(stain.noise) * rng.standard_normal(light.shape, dtype=np.float32)
        image[..., c] = light
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def paint_dapi(
    tissue: Tissue, frame: Frame, labels: Labels, rng: np.random.Generator
) -> npt.NDArray[np.uint16]:
    """(Y, X) fluorescence of the same nuclei: optics, out-of-focus haze, shot noise."""
    chromatin = np.zeros(labels.nucleus.shape, np.float32)
    _paint_nuclei(tissue, frame, labels, chromatin)
    sharp = cv2.GaussianBlur(chromatin, (0, 0), 0.3 / frame.mpp)
    haze = cv2.GaussianBlur(sharp, (0, 0), 3.0 / frame.mpp)
    cells = (labels.cell > 0).astype(np.float32)
    light = 220 + 90 * cv2.GaussianBlur(cells, (0, 0), 2.0 / frame.mpp) + 3800 * sharp + 900 * haze
    light += np.sqrt(2.5 * light) * rng.standard_normal(light.shape, dtype=np.float32)
    return np.asarray(np.clip(np.rint(light), 0, 65535), dtype=np.uint16)


def _layers_on(tissue: Tissue, frame: Frame) -> Layers:
    """The map in the frame: evaluated on a coarse grid of µm, then interpolated."""
    corners = frame.um_from_px(
        [[0, 0], [frame.width, 0], [0, frame.height], [frame.width, frame.height]]
    )
    low, high = corners.min(0) - 2, corners.max(0) + 2
    x_um = np.arange(low[0], high[0], _FIELD_GRID_UM)
    y_um = np.arange(low[1], high[1], _FIELD_GRID_UM)
    layers = tissue.tissue_map.layers(x_um, y_um)
    scale = 1 / _FIELD_GRID_UM
    grid_from_um = Affine.similarity(scale, 0.0, (-low[0] * scale, -low[1] * scale))
    # cv2 counts pixel centres from 0, we count from 0.5; grid nodes lie at whole numbers.
    half = Affine.similarity(1.0, 0.0, (0.5, 0.5))
    matrix = (grid_from_um @ frame.um_from_px @ half).array[:2]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP

    def warp(grid: F32) -> F32:
        return np.asarray(
            cv2.warpAffine(
                grid, matrix, (frame.width, frame.height), flags=flags,
                borderMode=cv2.BORDER_REPLICATE,
            )
        )  # fmt: skip

    return Layers(**{name: warp(getattr(layers, name)) for name in Layers.__slots__})


def _base_stains(layers: Layers) -> tuple[F32, F32]:
    """Haematoxylin and eosin between the cells: fibres in the stroma, nothing in lumens."""
    stroma = 0.26 * (1 + 0.55 * layers.fibre)
    eosin = np.clip(stroma + (0.26 - stroma) * layers.nest, 0.04, None) * (1 - layers.lumen)
    return np.full_like(eosin, 0.02), eosin.astype(np.float32)


def _paint_nuclei(tissue: Tissue, frame: Frame, labels: Labels, out: F32) -> None:
    """Set `out` inside each nucleus to its chromatin density, of exactly the nucleus' mean."""
    for i, window in enumerate(ndimage.find_objects(labels.nucleus)):
        if window is None:
            continue
        y, x = np.nonzero(labels.nucleus[window] == i + 1)
        y, x = y + window[0].start, x + window[1].start
        um = frame.um_from_px(np.stack([x + 0.5, y + 0.5], axis=1))
        u, v = tissue.nuclei.local(i, um[:, 0], um[:, 1])
        cell = tissue.nuclei.cell[i]
        kind = CELL_TYPES[tissue.cells.type_index[cell]]
        pattern = _chromatin(tissue.nuclei, i, kind, float(tissue.cells.state[cell]), u, v)
        out[y, x] = tissue.nuclei.density[i] * pattern / pattern.mean()


def _chromatin(
    nuclei: Nuclei, i: int, kind: CellType, state: float, u: F64, v: F64
) -> npt.NDArray[np.float64]:
    """Relative density at points of nucleus i. The state moves chromatin from middle to rim."""
    rho, theta = nuclei.outlines.depth(i, u, v)
    # Of mean zero over the area of any outline, since rho² is evenly spread there.
    pattern = 1 + 1.7 * (state - 0.5) * (2 * rho**2 - 1)
    long, short = nuclei.outlines.long_um[i], nuclei.outlines.short_um[i]
    if kind.clump_contrast:
        clumps = nuclei.clumps[i][nuclei.clumps[i, :, 2] > 0]
        cu = long * clumps[:, 0] * np.cos(clumps[:, 1])
        cv = short * clumps[:, 0] * np.sin(clumps[:, 1])
        d2 = (u[:, None] - cu) ** 2 + (v[:, None] - cv) ** 2
        blobs = np.exp(-d2 / (2 * kind.clump_sigma_um**2)) @ clumps[:, 2]
        pattern = pattern + kind.clump_contrast * (blobs - blobs.mean())
    if kind.nucleolus_contrast:
        radius, angle = nuclei.nucleolus[i]
        d2 = (u - long * radius * np.cos(angle)) ** 2 + (v - short * radius * np.sin(angle)) ** 2
        pattern = pattern + kind.nucleolus_contrast * np.exp(-d2 / (2 * 0.55**2))
    if kind.spoke_contrast:
        wheel = np.cos(6 * theta + nuclei.spoke_phase[i]) * np.clip(2.2 * rho - 0.5, 0, 1)
        pattern = pattern + kind.spoke_contrast * wheel
    membrane = np.exp(-(((rho - 0.97) / 0.07) ** 2))
    return np.clip(pattern + 0.35 * membrane, 0.15, None)


def _paint_cytoplasm(tissue: Tissue, frame: Frame, labels: Labels, eosin: F32) -> None:
    """Blend each cell's cytoplasm into `eosin`; its mean is the cell's, whatever the pattern."""
    cells, nuclei = tissue.cells, tissue.nuclei
    border = _borders(labels.cell, frame.mpp)
    first = np.full(len(cells.state), -1)
    first[nuclei.cell[::-1]] = np.arange(len(nuclei.cell))[::-1]
    for c, window in enumerate(ndimage.find_objects(labels.cell)):
        if window is None:
            continue
        mine = (labels.cell[window] == c + 1) & (labels.nucleus[window] == 0)
        y, x = np.nonzero(mine)
        if not len(y):
            continue
        y, x = y + window[0].start, x + window[1].start
        um = frame.um_from_px(np.stack([x + 0.5, y + 0.5], axis=1))
        i = first[c]
        dx, dy = um[:, 0] - nuclei.x_um[i], um[:, 1] - nuclei.y_um[i]
        away = labels.distance_um[y, x].astype(np.float64)
        kind = CELL_TYPES[cells.type_index[c]]
        pattern = _cytoplasm(cells, c, kind, dx, dy, away)
        pattern += kind.border_contrast * border[y, x]
        pattern = np.clip(pattern, 0.05, None)
        # Cells fade into what is between them, in the stroma sooner.
        full_um = 3.8 - 2.0 * cells.in_stroma[c]
        share = 1 - np.clip((away - full_um) / (EXPANSION_UM - full_um), 0, 1)
        mean = cells.cytoplasm_density[c] / (pattern * share).sum() * share.sum()
        eosin[y, x] += (share * (mean * pattern - eosin[y, x])).astype(np.float32)


def _cytoplasm(cells: Cells, c: int, kind: CellType, dx: F64, dy: F64, away: F64) -> F64:
    """Relative density at points (dx, dy) from the nucleus' centre, `away` from its edge (µm)."""
    state = cells.state[c]
    # A clear halo hugs the nucleus, the deeper the further the state has gone.
    pattern = 1 - 0.85 * state * np.exp(-((away / 1.5) ** 2))
    if kind.vacuole_radius_um:
        angle, radius = cells.vacuole_angle[c], kind.vacuole_radius_um
        reach = 3.2 + radius * 0.8
        d = np.hypot(dx - reach * np.cos(angle), dy - reach * np.sin(angle))
        pattern = pattern * (1 - 0.9 / (1 + np.exp((d - radius) / 0.25)))
    if kind.granule_contrast:
        angle, beyond, weight = cells.granules[c].T
        used = weight > 0
        r = 3.4 + beyond[used]
        d2 = (dx[:, None] - r * np.cos(angle[used])) ** 2 + (
            dy[:, None] - r * np.sin(angle[used])
        ) ** 2
        blobs = np.exp(-d2 / (2 * kind.granule_sigma_um**2)) @ weight[used]
        pattern = pattern + kind.granule_contrast * blobs
    return np.asarray(pattern, dtype=np.float64)


def _borders(cell: I32, mpp: float) -> F32:
    """1 on the line between two cells, falling off within half a µm."""
    line = np.zeros(cell.shape, np.float32)
    for axis in (0, 1):
        a, b = cell.swapaxes(0, axis)[:-1], cell.swapaxes(0, axis)[1:]
        line.swapaxes(0, axis)[1:] += (a != b) & (a > 0) & (b > 0)
    blurred = cv2.GaussianBlur(line.clip(0, 1), (0, 0), 0.35 / mpp)
    return np.asarray(blurred * np.float32(0.35 / mpp * np.sqrt(2 * np.pi)))


def _clip(centre: float, reach: float, size: int) -> tuple[int, int]:
    return max(0, int(np.floor(centre - reach))), min(size, int(np.ceil(centre + reach)))


def _pixel_um(frame: Frame, x0: int, y0: int, x1: int, y1: int) -> tuple[F64, F64]:
    """µm positions (x, y), each (y1 - y0, x1 - x0), of the pixel centres of a box."""
    m = frame.um_from_px.array
    x, y = np.arange(x0, x1) + 0.5, (np.arange(y0, y1) + 0.5)[:, None]
    return m[0, 0] * x + m[0, 1] * y + m[0, 2], m[1, 0] * x + m[1, 1] * y + m[1, 2]
