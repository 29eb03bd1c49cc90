"""Nuclei: their places, outlines, and the random numbers that their chromatin is painted from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from pairing.simulate.celltypes import CELL_TYPES, MAX_CLUMPS
from pairing.simulate.shapes import Outlines, draw_outlines

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

NUCLEUS_AREA_UM2 = 42.0
NUCLEUS_AREA_SPREAD = 0.2  # sigma of the logarithm
NUCLEUS_DENSITY = 0.62  # mean optical density of haematoxylin
NUCLEUS_DENSITY_SPREAD = 0.15  # sigma of the logarithm
_GOLDEN_ANGLE = np.pi * (3 - np.sqrt(5))


@dataclass(frozen=True, slots=True)
class Nuclei:
    """m nuclei; `cell` is the row of their cell. A cell without nucleus has one that is hidden."""

    cell: I64
    x_um: F64  # centroid of the area
    y_um: F64
    angle: F64  # of the long axis, from x towards y
    area_um2: F64
    outlines: Outlines
    density: F64
    clumps: F64  # (m, MAX_CLUMPS, 3): relative radius, angle, weight
    nucleolus: F64  # (m, 2): relative radius, angle
    spoke_phase: F64

    def local(self, i: int, x_um: F64, y_um: F64) -> tuple[F64, F64]:
        """Points in the frame of the outline of nucleus i."""
        dx, dy = x_um - self.x_um[i], y_um - self.y_um[i]
        c, s = np.cos(self.angle[i]), np.sin(self.angle[i])
        u0, v0 = self.outlines.centroid[i]
        return dx * c + dy * s + u0, dy * c - dx * s + v0

    def outlines_um(self) -> F64:
        """(m, k, 2) points of every edge in the Xenium frame."""
        local = self.outlines.polygons() - self.outlines.centroid[:, None]
        c, s = np.cos(self.angle)[:, None], np.sin(self.angle)[:, None]
        x = local[..., 0] * c - local[..., 1] * s + self.x_um[:, None]
        y = local[..., 0] * s + local[..., 1] * c + self.y_um[:, None]
        return np.stack([x, y], axis=-1)

    def reach_um(self) -> F64:
        """(m,) No part of a nucleus is farther from its centroid."""
        away = self.outlines.polygons() - self.outlines.centroid[:, None]
        return np.asarray(np.hypot(away[..., 0], away[..., 1]).max(1))


def draw_nuclei(
    rng: np.random.Generator, points: F64, type_index: I64, angle: F64, twins: I64
) -> Nuclei:
    """One nucleus a cell, and a second that touches the first for the cells of `twins`."""
    cell = np.concatenate([np.arange(len(points)), twins])
    m = len(cell)
    area = NUCLEUS_AREA_UM2 * np.exp(NUCLEUS_AREA_SPREAD * rng.standard_normal(m))
    area = np.where(np.isin(cell, twins), 0.62 * area, area)
    outlines = draw_outlines(rng, type_index[cell], area)
    where = points[cell]
    second = np.arange(len(points), m)
    side = angle[twins] + np.pi / 2
    apart = outlines.short_um[twins] + outlines.short_um[second] + 0.4
    offset = apart[:, None] / 2 * np.stack([np.cos(side), np.sin(side)], axis=1)
    where[twins] -= offset
    where[second] += offset
    return Nuclei(
        cell=cell,
        x_um=where[:, 0],
        y_um=where[:, 1],
        angle=angle[cell],
        area_um2=area,
        outlines=outlines,
        density=NUCLEUS_DENSITY * np.exp(NUCLEUS_DENSITY_SPREAD * rng.standard_normal(m)),
        clumps=_draw_clumps(rng, type_index[cell]),
        nucleolus=np.stack([rng.uniform(0, 0.35, m), rng.uniform(0, 2 * np.pi, m)], axis=1),
        spoke_phase=rng.uniform(0, 2 * np.pi, m),
    )


def _draw_clumps(rng: np.random.Generator, type_index: I64) -> F64:
    counts = np.array([t.n_clumps for t in CELL_TYPES])[type_index]
    n = rng.integers(counts[:, 0], counts[:, 1] + 1)[:, None]
    order = np.arange(MAX_CLUMPS)
    shape = (len(type_index), MAX_CLUMPS)
    # A sunflower: even over the area, neighbours in order a golden angle apart.
    radius = np.sqrt((order + rng.uniform(0.1, 0.9, shape)) / n.clip(1)).clip(0, 0.88)
    angle = (
        _GOLDEN_ANGLE * order
        + rng.uniform(0, 2 * np.pi, (len(type_index), 1))
        + 0.25 * rng.standard_normal(shape)
    )
    return np.stack([radius, angle, np.where(order < n, rng.uniform(0.7, 1.3, shape), 0)], axis=-1)


def settle(
    nuclei: Nuclei, keep_apart: float, allowed: Callable[[F64], npt.NDArray[np.bool_]]
) -> Nuclei:
    """Move nuclei apart, at `keep_apart` 1 until hardly any touch.

    Each is three discs along its long axis.
    """
    along = (
        np.array([-0.6, 0.0, 0.6]) * (nuclei.outlines.long_um - nuclei.outlines.short_um)[:, None]
    )
    heading = np.stack([np.cos(nuclei.angle), np.sin(nuclei.angle)], axis=1)
    offsets = along[..., None] * heading[:, None]
    centres = np.stack([nuclei.x_um, nuclei.y_um], axis=1)
    radius = 1.08 * keep_apart * nuclei.outlines.short_um
    centres = push_apart(centres, offsets, radius, 40, allowed)
    return replace(nuclei, x_um=centres[:, 0], y_um=centres[:, 1])


def push_apart(
    centres: F64,
    offsets: F64,
    radius: F64,
    n_rounds: int,
    allowed: Callable[[F64], npt.NDArray[np.bool_]],
) -> F64:
    """Relax overlaps of n bodies of k discs each: offsets (n, k, 2) or (n, 1, 2), radius (n,).

    Moves that leave what is `allowed` are not made. Returns the new centres (n, 2).
    """
    n, k = offsets.shape[:2]
    body = np.repeat(np.arange(n), k)
    disc_radius = radius[body]
    for _ in range(n_rounds):
        discs = (centres[:, None] + offsets).reshape(-1, 2)
        pairs = cKDTree(discs).query_pairs(2 * radius.max(), output_type="ndarray")
        pairs = pairs[body[pairs[:, 0]] != body[pairs[:, 1]]]
        i, j = pairs[:, 0], pairs[:, 1]
        gap = discs[j] - discs[i]
        distance = np.hypot(gap[:, 0], gap[:, 1]).clip(1e-6)
        push = 0.5 * (disc_radius[i] + disc_radius[j] - distance)
        close = push > 0
        step = (0.7 * push / distance)[close, None] * gap[close]
        move = np.zeros_like(centres)
        np.add.at(move, body[i[close]], -step)
        np.add.at(move, body[j[close]], step)
        moved = centres + move
        centres = np.where(allowed(moved)[:, None], moved, centres)
    return centres
