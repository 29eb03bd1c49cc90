"""The cells of a section: where they lie, their types and states, and how each one looks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from pairing.simulate.celltypes import CELL_TYPES, MAX_GRANULES
from pairing.simulate.fields import Outline, TissueMap
from pairing.simulate.nuclei import Nuclei, draw_nuclei, push_apart, settle

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

EXPANSION_UM = 5.0
SHARE_WITHOUT_NUCLEUS = 0.025
SHARE_TWO_NUCLEI = 0.015
STATE_SPATIAL_SHARE = 0.25  # of the variance of the state: what neighbours have in common
_GRID_UM = 4.0
_MARGIN_UM = (35.0, 90.0, 60.0, 40.0)  # glass beyond the tissue: left, right, top, bottom


@dataclass(frozen=True, slots=True)
class Cells:
    """n cells; positions of the cell are those of its (first) nucleus until it is segmented."""

    type_index: I64
    state: F64  # 0 to 1
    has_nucleus: npt.NDArray[np.bool_]
    cytoplasm_density: F64  # mean eosin density
    in_stroma: F64  # 0 to 1
    granules: F64  # (n, MAX_GRANULES, 3): angle, distance beyond the nucleus µm, weight
    vacuole_angle: F64


@dataclass(frozen=True, slots=True)
class Tissue:
    """One section in the Xenium frame (µm), `width_um` × `height_um` with the glass around it."""

    width_um: float
    height_um: float
    tissue_map: TissueMap
    cells: Cells
    nuclei: Nuclei


def draw_section(rng: np.random.Generator, n_cells: int) -> Tissue:
    """A section of exactly `n_cells` cells with blank glass around, more on two of its sides."""
    outline = Outline.draw(rng)
    tissue_map = TissueMap.draw(rng, outline)
    low, high = 20.0, 60.0 + 20.0 * np.sqrt(n_cells)
    for _ in range(14):
        radius = (low + high) / 2
        trial = replace(tissue_map, outline=outline.scaled(radius))
        x = y = np.arange(-2.2 * radius, 2.2 * radius, max(_GRID_UM, radius / 60))
        n = trial.layers(x, y).cells_per_mm2.sum() * (x[1] - x[0]) ** 2 * 1e-6
        low, high = (radius, high) if n < n_cells else (low, radius)
    placed, width, height = _on_slide(trial, radius)
    return _populate(rng, placed, width, height, n_cells, 1.0)


def draw_field(
    rng: np.random.Generator, size_um: float, crowding: float, keep_apart: float
) -> Tissue:
    """A square field full of tissue, without an edge.

    `crowding` multiplies the usual density, `keep_apart` the distance that nuclei keep: at 1 few
    touch, well below they lie in clusters and overlap a little.
    """
    tissue_map = TissueMap.draw(rng, None)
    grid = np.arange(0, size_um, _GRID_UM)
    n = crowding * tissue_map.layers(grid, grid).cells_per_mm2.sum() * _GRID_UM**2 * 1e-6
    return _populate(rng, tissue_map, size_um, size_um, max(4, round(n)), keep_apart)


def _on_slide(tissue_map: TissueMap, radius: float) -> tuple[TissueMap, float, float]:
    """Move the tissue so that the slide starts at (0, 0) with the margins of glass."""
    grid = np.arange(-2.4 * radius, 2.4 * radius, _GRID_UM)
    inside = tissue_map.layers(grid, grid).tissue > 0.5
    x, y = grid[inside.any(0)], grid[inside.any(1)]
    left, right, top, bottom = _MARGIN_UM
    moved = replace(tissue_map, origin_um=(float(left - x[0]), float(top - y[0])))
    return moved, float(x[-1] - x[0] + left + right), float(y[-1] - y[0] + top + bottom)


def _populate(
    rng: np.random.Generator,
    tissue_map: TissueMap,
    width: float,
    height: float,
    n: int,
    keep_apart: float,
) -> Tissue:
    x, y = np.arange(0, width, _GRID_UM), np.arange(0, height, _GRID_UM)
    layers = tissue_map.layers(x, y)
    density = layers.cells_per_mm2

    def at(grid: npt.NDArray[np.floating], points: F64) -> F64:
        column = np.clip(np.rint(points[:, 0] / _GRID_UM).astype(int), 0, grid.shape[1] - 1)
        row = np.clip(np.rint(points[:, 1] / _GRID_UM).astype(int), 0, grid.shape[0] - 1)
        return np.asarray(grid[row, column], dtype=np.float64)

    weight = density.astype(np.float64).ravel()
    chosen = rng.choice(weight.size, n, p=weight / weight.sum())
    points = np.stack([x[chosen % len(x)], y[chosen // len(x)]], axis=1)
    points = points + rng.uniform(-_GRID_UM / 2, _GRID_UM / 2, points.shape)
    spacing = 0.40 * keep_apart * 1e3 / np.sqrt(at(density, points))
    points = push_apart(points, np.zeros((n, 1, 2)), spacing, 30, lambda p: at(density, p) > 0)

    nest, aggregate = at(layers.nest, points), at(layers.aggregate, points)
    type_index = _draw_types(rng, nest, aggregate)
    state = ndtr(
        np.sqrt(STATE_SPATIAL_SHARE) * at(layers.state_field, points)
        + np.sqrt(1 - STATE_SPATIAL_SHARE) * rng.standard_normal(n)
    )
    gradient_y, gradient_x = np.asarray(np.gradient(layers.nest_field))
    across = np.arctan2(at(gradient_y, points), at(gradient_x, points))
    angle = across + np.where(nest > 0.5, 0, np.pi / 2) + 0.45 * rng.standard_normal(n)

    has_nucleus = rng.random(n) >= SHARE_WITHOUT_NUCLEUS
    twins = np.flatnonzero(has_nucleus & (rng.random(n) < SHARE_TWO_NUCLEI))
    nuclei = draw_nuclei(rng, points, type_index, angle, twins)
    nuclei = settle(nuclei, keep_apart, lambda p: at(density, p) > 0)
    cells = Cells(
        type_index=type_index,
        state=state,
        has_nucleus=has_nucleus,
        cytoplasm_density=0.29 * np.exp(0.15 * rng.standard_normal(n)),
        in_stroma=1 - nest,
        granules=_draw_granules(rng, type_index),
        vacuole_angle=rng.uniform(0, 2 * np.pi, n),
    )
    return Tissue(width, height, tissue_map, cells, nuclei)


def _draw_types(rng: np.random.Generator, nest: F64, aggregate: F64) -> I64:
    shares = np.array([[t.share_nest, t.share_stroma, t.share_aggregate] for t in CELL_TYPES])
    mix = np.stack([nest, (1 - nest) * (1 - aggregate), (1 - nest) * aggregate], axis=1)
    cumulative = np.cumsum(mix @ shares.T, axis=1)
    cumulative /= cumulative[:, -1:]
    return np.asarray((rng.random(len(nest))[:, None] > cumulative).sum(1), dtype=np.int64)


def _draw_granules(rng: np.random.Generator, type_index: I64) -> F64:
    counts = np.array([t.n_granules for t in CELL_TYPES])[type_index]
    n_granules = rng.integers(counts[:, 0], counts[:, 1] + 1)
    shape = (len(type_index), MAX_GRANULES)
    weight = np.where(
        np.arange(MAX_GRANULES) < n_granules[:, None], rng.uniform(0.7, 1.3, shape), 0
    )
    return np.stack(
        [rng.uniform(0, 2 * np.pi, shape), rng.uniform(0.3, 4.3, shape), weight], axis=-1
    )
