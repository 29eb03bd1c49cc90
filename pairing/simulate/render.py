"""Blocks of the H&E slide and of the morphology image, painted from cell geometry.

Work is done in stain densities (multiples of a unit optical density) on any box of any frame; a
block with its halo is the most that is held at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from pairing.simulate.architecture import Layers
from pairing.simulate.bodies import Bodies, draw_bodies, nearest, noise, noise_at
from pairing.simulate.celltypes import CELL_TYPES, GRANULE_UM
from pairing.simulate.donor import Stain
from pairing.simulate.nuclei import Nuclei
from pairing.simulate.slide_map import SlideMap, View
from pairing.simulate.tissue import EXPANSION_UM, Tissue

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# Room around the core of a block for what reaches into it: nuclei, cytoplasm and blur.
HALO_UM = 28.0
# Nuclei deeper in the section than this are out of focus on the slide, shallower ones in DAPI.
HE_FOCUS_DEPTH = 0.8
DAPI_FOCUS_DEPTH = 0.28
_FIELD_GRID_UM = 1.0


@dataclass(frozen=True, slots=True)
class Mounted:
    """A section on a slide: its map, and where its nuclei lie (n, 2) in slide pixels."""

    tissue: Tissue
    slide_map: SlideMap
    centres_px: F64

    @classmethod
    def of(cls, tissue: Tissue, slide_map: SlideMap) -> Mounted:
        return cls(tissue, slide_map, slide_map.px_from_um(tissue.nuclei.centres_um))


def rows_near(centres: F64, x0: float, y0: float, x1: float, y1: float) -> I64:
    """Rows of the points (n, 2) inside a box."""
    x, y = centres.T
    return np.flatnonzero((x >= x0) & (x < x1) & (y >= y0) & (y < y1))


def paint_he(
    mounted: Sequence[Mounted], stain: Stain, box: tuple[int, int, int, int], seed: Sequence[int]
) -> tuple[npt.NDArray[np.uint8], I32]:
    """(Y, X, 3) RGB of a box of slide pixels, and 1 + row of the nucleus shown at each.

    Beer–Lambert: light = white · 10^-(H · od_H + E · od_E), mixed by the scanner, blurred, noisy.
    Labels are those of the first section alone. The noise is a function of `seed` and the box.
    """
    mpp = mounted[0].slide_map.mpp
    halo = int(np.ceil(HALO_UM / mpp))
    x0, y0, x1, y1 = box
    width, height = x1 - x0 + 2 * halo, y1 - y0 + 2 * halo
    haematoxylin, eosin = (np.zeros((height, width), np.float32) for _ in range(2))
    labels = np.zeros((y1 - y0, x1 - x0), np.int32)
    core = (slice(halo, halo + y1 - y0), slice(halo, halo + x1 - x0))
    for number, section in enumerate(mounted):
        for view in section.slide_map.views(x0 - halo, y0 - halo, width, height):
            shown = _paint_section(section, view, (x0 - halo, y0 - halo), stain)
            if shown is None:
                continue
            haematoxylin += shown[0]
            eosin += shown[1]
            if number == 0:
                labels = np.where(labels > 0, labels, shown[2][core])
    rng = np.random.default_rng([*seed, x0, y0])
    return _through_the_scanner(haematoxylin, eosin, stain, mpp, rng)[core], labels


def _paint_section(
    section: Mounted, view: View, corner: tuple[int, int], stain: Stain
) -> tuple[F32, F32, I32] | None:
    """Densities of both stains and the labels of one view of one section; None off the tissue."""
    tissue, mpp = section.tissue, section.slide_map.mpp
    layers = layers_on(tissue, view)
    if layers is None:
        return None
    height, width = view.x_um.shape
    reach = HALO_UM / 2 / mpp
    near = section.centres_px - corner
    rows = rows_near(near, -reach, -reach, width + reach, height + reach)
    nuclei = tissue.nuclei.take(rows)
    bodies = draw_bodies(
        view, nuclei, tissue.cells, near[rows], mpp,
        labelled=nuclei.in_he, painted=nuclei.in_he, in_focus=nuclei.depth < HE_FOCUS_DEPTH,
    )  # fmt: skip
    haematoxylin, eosin = _ground(layers)
    if len(rows):
        _paint_cytoplasm(tissue, nuclei, view, bodies, mpp, haematoxylin, eosin)
    eosin[bodies.labelled > 0] = 0.10
    sigma_px = stain.defocus_um / mpp
    haematoxylin += bodies.near + cv2.GaussianBlur(bodies.far, (0, 0), sigma_px)
    grain = noise_at(noise(0.3), view.x_um, view.y_um, np.zeros(2, np.int64))
    uneven = layers.tissue * (1 + 0.05 * layers.stain_field + np.float32(0.07) * grain)
    uneven *= np.float32(stain.thickness)
    if view.shown is not None:
        uneven *= view.shown
    labels = np.concatenate([[0], rows + 1]).astype(np.int32)[bodies.labelled]
    return haematoxylin * uneven, eosin * uneven, labels


def layers_on(tissue: Tissue, view: View) -> Layers | None:
    """The map at the pixels of a view: evaluated on a grid of µm, then interpolated."""
    low = (float(view.x_um.min()) - 2, float(view.y_um.min()) - 2)
    high = (float(view.x_um.max()) + 3, float(view.y_um.max()) + 3)
    x_um = np.arange(low[0], high[0], _FIELD_GRID_UM)
    y_um = np.arange(low[1], high[1], _FIELD_GRID_UM)
    at_x, at_y = ((view.x_um - low[0]) / _FIELD_GRID_UM), ((view.y_um - low[1]) / _FIELD_GRID_UM)
    merged: dict[str, F32] = {}
    for piece in tissue.pieces:
        x0, y0, x1, y1 = piece.box_um
        if high[0] < x0 or low[0] > x1 or high[1] < y0 or low[1] > y1:
            continue
        layers = piece.tissue_map.layers(x_um, y_um)
        if not layers.tissue.max() > 0.01:
            continue
        for name in Layers.__slots__:
            values = getattr(layers, name)
            if name in merged:
                values = np.where(layers.tissue > 0.01, values, merged[name])
            merged[name] = values
    if not merged:
        return None
    return Layers(
        **{
            name: np.asarray(cv2.remap(grid, at_x, at_y, cv2.INTER_LINEAR), np.float32)
            for name, grid in merged.items()
        }
    )


def _ground(layers: Layers) -> tuple[F32, F32]:
    """Haematoxylin and eosin between the cells: fibres in the stroma, blood in the vessels."""
    epithelium, stroma, aggregate, vessel = layers.shares
    fibres = np.maximum(0.30 * (1 + 0.8 * layers.fibre), 0.02)
    eosin = stroma * fibres + 0.24 * epithelium + 0.17 * aggregate
    eosin += vessel * 0.36 * (1 + 0.35 * layers.fibre)
    eosin *= 1 - layers.lumen
    eosin += 0.62 * layers.blood
    return (0.02 + 0.09 * epithelium + 0.05 * aggregate) * (1 - layers.lumen), eosin


def _paint_cytoplasm(
    tissue: Tissue, nuclei: Nuclei, view: View, bodies: Bodies, mpp: float, haem: F32, eosin: F32
) -> None:
    """Blend the cytoplasm of every cell into both stains."""
    away, owner = nearest(bodies.every, mpp)
    away[owner == 0] = np.inf
    where = np.flatnonzero((away < EXPANSION_UM) & (bodies.labelled == 0))
    if not len(where):
        return
    n = owner.ravel()[where] - 1
    d = away.ravel()[where]
    # No clear halo about a nucleus that the slide doesn't show.
    d = (d + 2.5 * ~nuclei.in_he[n]).astype(np.float32)
    cell = nuclei.cell
    kind = tissue.cells.type_index[cell]

    def of_type(name: str) -> F32:
        return np.array([getattr(t, name) for t in CELL_TYPES], np.float32)[kind][n]

    def of_cell(values: npt.NDArray[np.generic]) -> F32:
        return values[cell].astype(np.float32)[n]

    x, y = view.x_um.ravel()[where], view.y_um.ravel()[where]
    dx, dy = x - nuclei.x_um.astype(np.float32)[n], y - nuclei.y_um.astype(np.float32)[n]
    # A clear halo hugs the nucleus, the deeper the further the state has gone.
    pattern = 1 - 0.85 * of_cell(tissue.cells.state) * np.exp(-((d / 1.5) ** 2))
    radius = of_type("vacuole_radius_um")
    angle = of_cell(tissue.cells.vacuole_angle)
    reach = 3.2 + 0.8 * radius
    off = np.hypot(dx - reach * np.cos(angle), dy - reach * np.sin(angle))
    depth = (radius > 0) * np.float32(0.9)
    pattern *= 1 - depth / (1 + np.exp(np.clip((off - radius) / 0.25, -20, 20)))
    granule = np.array([t.granule for t in CELL_TYPES])[kind][n]
    start = tissue.cells.texture[cell][n]
    for index, sigma_um in enumerate(GRANULE_UM):
        contrast = of_type("granule_contrast") * (granule == index)
        mine = np.flatnonzero(contrast)
        pattern[mine] += contrast[mine] * noise_at(noise(sigma_um), dx[mine], dy[mine], start[mine])
    pattern += (
        of_type("border_contrast") * _borders(np.where(away < EXPANSION_UM, owner, 0), mpp)[where]
    )
    np.maximum(pattern, 0.05, out=pattern)
    # Cells fade into what is between them, in the stroma sooner.
    full_um = 3.8 - 2.0 * of_cell(tissue.cells.in_stroma)
    share = 1 - np.clip((d - full_um) / (EXPANSION_UM - full_um), 0, 1)
    flat = eosin.ravel()
    flat[where] += share * (of_cell(tissue.cells.eosin) * pattern - flat[where])
    # Growing cells are full of RNA.
    basophilia = of_type("basophilia") * (0.25 + 1.5 * of_cell(tissue.cells.state))
    haem.ravel()[where] += basophilia * np.exp(-((d / 3.5) ** 2)) * pattern


def _borders(owner: I32, mpp: float) -> F32:
    """Flat: 1 on the line between two cells, falling off within half a µm."""
    line = np.zeros(owner.shape, np.float32)
    for axis in (0, 1):
        a, b = owner.swapaxes(0, axis)[:-1], owner.swapaxes(0, axis)[1:]
        line.swapaxes(0, axis)[1:] += (a != b) & (a > 0) & (b > 0)
    blurred = cv2.GaussianBlur(line.clip(0, 1), (0, 0), 0.35 / mpp)
    return np.asarray(blurred * np.float32(0.35 / mpp * np.sqrt(2 * np.pi))).ravel()


def _through_the_scanner(
    haematoxylin: F32, eosin: F32, stain: Stain, mpp: float, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    light = np.empty((*eosin.shape, 3), np.float32)
    for c in range(3):
        density = haematoxylin * np.float32(stain.haematoxylin * stain.vectors[0, c])
        density += eosin * np.float32(stain.eosin * stain.vectors[1, c])
        light[..., c] = np.exp(density * np.float32(-np.log(10)))
    light = light @ stain.scanner.T.astype(np.float32)
    light *= stain.white.astype(np.float32)
    light = np.asarray(cv2.GaussianBlur(light, (0, 0), stain.blur_um / mpp))
    light += np.float32(stain.noise) * rng.standard_normal(light.shape, dtype=np.float32)
    return np.asarray(np.clip(np.rint(light), 0, 255), dtype=np.uint8)
