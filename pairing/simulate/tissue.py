"""The cells of a section: where they lie, their types and states, and how each one looks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree
from scipy.special import ndtr

from pairing.simulate.architecture import TissueMap
from pairing.simulate.celltypes import CELL_TYPES, INTERPHASE, MITOTIC, N_TYPES, PYKNOTIC
from pairing.simulate.nuclei import Nuclei, draw_nuclei, push_apart, settle

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

EXPANSION_UM = 5.0
# Tissue repeats itself after this many µm (about 20,000 cells), so that a section of a million
# cells costs the memory and time of drawing one of twenty thousand.
PERIOD_UM = 2400.0
SHARE_WITHOUT_NUCLEUS = 0.025
SHARE_TWO_NUCLEI = 0.015
SHARE_MITOTIC = 0.012
SHARE_PYKNOTIC = 0.02
STATE_SPATIAL_SHARE = 0.25  # of the variance of the state: what neighbours have in common
NICHE_NEIGHBORS = 10
IMMUNE = ("lymphocyte", "plasma", "macrophage", "eosinophil")
KEEP_APART = 0.92
_GRID_UM = 2.0


@dataclass(frozen=True, slots=True)
class Cells:
    """n cells of the tissue, seen by the instrument or not."""

    type_index: I64
    state: F64  # 0 to 1
    niche: F64  # 0 to 1: share of immune cells around
    phase: I64  # INTERPHASE, MITOTIC or PYKNOTIC
    donor: I64
    seen: Mask  # the instrument segmented it
    has_nucleus: Mask
    eosin: F64  # mean density of the cytoplasm
    in_stroma: F64  # 0 to 1
    vacuole_angle: F64
    texture: I64  # (n, 2) where in the noise its granules lie

    def take(self, rows: I64) -> Cells:
        return Cells(*(getattr(self, name)[rows] for name in self.__slots__))

    @property
    def instrument_row(self) -> I64:
        """Row among the instrument's cells, -1 for cells that it did not see."""
        return np.where(self.seen, np.cumsum(self.seen) - 1, -1)


@dataclass(frozen=True, slots=True)
class Piece:
    """One connected piece of tissue (or a section of several fragments) of one donor."""

    tissue_map: TissueMap
    donor: int
    box_um: tuple[float, float, float, float]  # x0, y0, x1, y1 around its tissue


@dataclass(frozen=True, slots=True)
class Tissue:
    """A section in the Xenium frame (µm), `width_um` × `height_um` with the glass around it."""

    width_um: float
    height_um: float
    pieces: tuple[Piece, ...]
    cells: Cells
    nuclei: Nuclei


def draw_field(
    rng: np.random.Generator, size_um: float, crowding: float, keep_apart: float
) -> Tissue:
    """A square field full of tissue, without an edge.

    `crowding` multiplies the usual density, `keep_apart` the distance that nuclei keep: at 1 few
    touch, well below they lie in clusters and overlap.
    """
    tissue_map = TissueMap.draw(rng, size_um, None)
    _, cells, nuclei = draw_tile(rng, tissue_map, crowding, keep_apart)
    piece = Piece(tissue_map, 0, (0.0, 0.0, size_um, size_um))
    return Tissue(size_um, size_um, (piece,), cells, nuclei)


Tile = tuple[F64, Cells, Nuclei]


def draw_tile(
    rng: np.random.Generator, tissue_map: TissueMap, crowding: float, keep_apart: float
) -> Tile:
    """Points, cells and nuclei of one period of the tissue, without regard to its outline."""
    period = tissue_map.period_um
    step = period / round(period / _GRID_UM)
    axis = np.asarray((np.arange(round(period / step)) + 0.5) * step, dtype=np.float64)
    layers = tissue_map.layers(axis, axis)
    density = crowding * layers.cells_per_mm2

    def at(grid: npt.NDArray[np.floating], points: F64) -> F64:
        column, row = (points // step).astype(int).T % len(axis)
        return np.asarray(grid[row, column], dtype=np.float64)

    n = max(4, round(float(density.sum()) * step**2 * 1e-6))
    weight = density.astype(np.float64).ravel()
    chosen = rng.choice(weight.size, n, p=weight / weight.sum())
    points = np.stack([axis[chosen % len(axis)], axis[chosen // len(axis)]], axis=1)
    points = points + rng.uniform(-step / 2, step / 2, points.shape)
    spacing = 0.36 * keep_apart * 1e3 / np.sqrt(at(density, points))
    spacing = spacing * rng.uniform(0.25, 1.1, n)  # no lattice: some keep close company
    points = push_apart(points, np.zeros((n, 1, 2)), spacing, 10, period)
    points = points[at(layers.lumen, points) < 0.3]
    n = len(points)

    shares = np.stack([at(share, points) for share in layers.shares], axis=1)
    type_index = _draw_types(rng, shares)
    state = ndtr(
        np.sqrt(STATE_SPATIAL_SHARE) * at(layers.state_field, points)
        + np.sqrt(1 - STATE_SPATIAL_SHARE) * rng.standard_normal(n)
    )
    immune = np.isin([t.name for t in CELL_TYPES], IMMUNE)[type_index]
    _, near = cKDTree(points, boxsize=period).query(points, k=min(n, NICHE_NEIGHBORS + 1))
    phase = np.full(n, INTERPHASE)
    phase[rng.random(n) < 2 * SHARE_MITOTIC * state] = MITOTIC
    phase[rng.random(n) < SHARE_PYKNOTIC] = PYKNOTIC
    gradient_y, gradient_x = np.asarray(np.gradient(layers.gland_field))
    across = np.arctan2(at(gradient_y, points), at(gradient_x, points))
    angle = across + np.where(shares[:, 0] > 0.5, 0, np.pi / 2) + 0.4 * rng.standard_normal(n)
    in_wall = shares[:, 3] > 0.5
    angle[in_wall] = _around_vessels(tissue_map, points[in_wall])

    has_nucleus = rng.random(n) >= SHARE_WITHOUT_NUCLEUS
    twins = np.flatnonzero(has_nucleus & (phase == INTERPHASE) & (rng.random(n) < SHARE_TWO_NUCLEI))
    nuclei = draw_nuclei(rng, points, type_index, state, phase, angle, twins)
    nuclei = settle(rng, nuclei, keep_apart, period)
    cells = Cells(
        type_index=type_index,
        state=state,
        niche=immune[near[:, 1:]].mean(axis=1),
        phase=phase,
        donor=np.zeros(n, np.int64),
        seen=np.ones(n, bool),
        has_nucleus=has_nucleus,
        eosin=np.array([t.eosin for t in CELL_TYPES])[type_index]
        * np.exp(0.18 * rng.standard_normal(n)),
        in_stroma=1 - shares[:, 0],
        vacuole_angle=rng.uniform(0, 2 * np.pi, n),
        texture=rng.integers(0, 2**16, (n, 2)),
    )
    shown = has_nucleus[nuclei.cell]
    return nuclei.centres_um[:n], cells, replace(nuclei, in_dapi=shown, in_he=shown)


def _draw_types(rng: np.random.Generator, shares: F64) -> I64:
    table = np.array(
        [
            [t.share_epithelium, t.share_stroma, t.share_aggregate, t.share_vessel]
            for t in CELL_TYPES
        ]
    )
    cumulative = np.cumsum(shares @ table.T, axis=1)
    cumulative /= cumulative[:, -1:]
    drawn = (rng.random(len(shares))[:, None] > cumulative).sum(1)
    return np.asarray(np.minimum(drawn, N_TYPES - 1), dtype=np.int64)


def _around_vessels(tissue_map: TissueMap, points: F64) -> F64:
    """Heading along the wall of the nearest vessel."""
    tree = cKDTree(tissue_map.vessels[:, :2], boxsize=tissue_map.period_um)
    _, nearest = tree.query(points)
    away = points - tissue_map.vessels[nearest, :2]
    away -= tissue_map.period_um * np.rint(away / tissue_map.period_um)
    return np.asarray(np.arctan2(away[:, 1], away[:, 0]) + np.pi / 2)
