"""Nuclei: their places, outlines, and the random numbers that their chromatin is painted from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from pairing.simulate.celltypes import CELL_TYPES, MITOTIC, PYKNOTIC
from pairing.simulate.shapes import Outlines, draw_outlines, outlines_of

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

AREA_LOG_SPREAD = 0.26
AREA_LOG_BY_STATE = 0.7  # growing cells have large nuclei
DENSITY_LOG_SPREAD = 0.18
TWIN_AREA = 0.62
SHARE_GRAZED = 0.07  # the section holds a sliver of them
MAX_NUCLEOLI = 2
# Some lie over or under their neighbours, and keep only this share of the usual distance.
SHARE_OVERLAPPING = 0.22
OVERLAPPING_DISTANCE = 0.45


@dataclass(frozen=True, slots=True)
class Nuclei:
    """m nuclei; `cell` is the row of their cell. A cell without nucleus has one that is hidden."""

    cell: I64
    x_um: F64  # centroid of the area
    y_um: F64
    angle: F64  # of the long axis, from x towards y
    area_um2: F64
    outlines: Outlines
    density: F64  # mean optical density of haematoxylin
    depth: F64  # in the section, 0 to 1
    in_dapi: Mask  # seen by the instrument
    in_he: Mask  # seen on the slide
    texture: I64  # (m, 2) where in the noise its chromatin lies
    nucleoli: F64  # (m, MAX_NUCLEOLI, 3): relative radius, angle, weight
    spoke_phase: F64

    def take(self, rows: I64) -> Nuclei:
        taken = {name: getattr(self, name)[rows] for name in self.__slots__ if name != "outlines"}
        return Nuclei(outlines=self.outlines.take(rows), **taken)

    @property
    def centres_um(self) -> F64:
        return np.stack([self.x_um, self.y_um], axis=1)

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
        return np.asarray(1.02 * np.hypot(away[..., 0], away[..., 1]).max(1))


def joined_nuclei(parts: list[Nuclei]) -> Nuclei:
    """The rows of all parts, one part after the other."""

    def column(records: list[Any], name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(record, name) for record in records])

    outlines = [part.outlines for part in parts]
    names = [name for name in Nuclei.__slots__ if name != "outlines"]
    return Nuclei(
        outlines=Outlines(*(column(outlines, name) for name in Outlines.__slots__)),
        **{name: column(parts, name) for name in names},
    )


def draw_nuclei(
    rng: np.random.Generator,
    points: F64,
    type_index: I64,
    state: F64,
    phase: I64,
    angle: F64,
    twins: I64,
) -> Nuclei:
    """One nucleus a cell, and a second that touches the first for the cells of `twins`."""
    cell = np.concatenate([np.arange(len(points)), twins])
    m = len(cell)
    kind, stage = type_index[cell], phase[cell]
    area = np.array([t.area_um2 for t in CELL_TYPES])[kind]
    area = area * np.exp(AREA_LOG_SPREAD * rng.standard_normal(m))
    area *= np.exp(AREA_LOG_BY_STATE * (state[cell] - 0.5))
    area = np.where(np.isin(cell, twins), TWIN_AREA * area, area)
    area *= np.select([stage == MITOTIC, stage == PYKNOTIC], [0.75, 0.35], 1.0)
    density = np.array([t.density for t in CELL_TYPES])[kind]
    density = density * np.exp(DENSITY_LOG_SPREAD * rng.standard_normal(m))
    density *= np.select([stage == MITOTIC, stage == PYKNOTIC], [1.7, 1.9], 1.0)
    grazed = rng.random(m) < SHARE_GRAZED
    area *= np.where(grazed, rng.uniform(0.15, 0.6, m), 1.0)
    density *= np.where(grazed, 0.7, 1.0)
    outlines = _by_phase(rng, draw_outlines(rng, kind, area), stage, area)
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
        density=density,
        depth=rng.random(m),
        in_dapi=np.ones(m, bool),
        in_he=np.ones(m, bool),
        texture=rng.integers(0, 2**16, (m, 2)),
        nucleoli=_draw_nucleoli(rng, kind),
        spoke_phase=rng.uniform(0, 2 * np.pi, m),
    )


def _by_phase(rng: np.random.Generator, usual: Outlines, stage: I64, area: F64) -> Outlines:
    """A dividing nucleus is a rough plate, a dying one a smooth ball."""
    n = len(stage)
    ball, plate = stage == PYKNOTIC, stage == MITOTIC
    rough = np.abs(usual.rough) + 0.05
    changed = outlines_of(
        np.where(plate, rng.uniform(2.2, 3.6, n), 1.05),
        np.zeros(n),
        np.zeros(n),
        np.where(plate[:, None], rough * np.exp(1j * np.angle(usual.rough)), 0),
        area,
    )
    keep = ~(ball | plate)

    def either(name: str) -> npt.NDArray[Any]:
        mine, other = getattr(usual, name), getattr(changed, name)
        return np.asarray(np.where(keep.reshape(-1, *(1,) * (mine.ndim - 1)), mine, other))

    return Outlines(*(either(name) for name in Outlines.__slots__))


def _draw_nucleoli(rng: np.random.Generator, kind: I64) -> F64:
    low, high = np.array([t.n_nucleoli for t in CELL_TYPES])[kind].T
    n = rng.integers(low, high + 1)[:, None]
    shape = (len(kind), MAX_NUCLEOLI)
    weight = np.where(np.arange(MAX_NUCLEOLI) < n, rng.uniform(0.6, 1.3, shape), 0)
    return np.stack([rng.uniform(0, 0.5, shape), rng.uniform(0, 2 * np.pi, shape), weight], axis=-1)


def settle(rng: np.random.Generator, nuclei: Nuclei, keep_apart: float, period_um: float) -> Nuclei:
    """Move nuclei apart, at `keep_apart` 1 until few but those that overlap by intent touch.

    Each is three discs along its long axis; the plane repeats every `period_um`.
    """
    outlines = nuclei.outlines
    along = np.array([-0.6, 0.0, 0.6]) * (outlines.long_um - outlines.short_um)[:, None]
    heading = np.stack([np.cos(nuclei.angle), np.sin(nuclei.angle)], axis=1)
    radius = 1.06 * keep_apart * outlines.short_um
    radius = np.where(
        rng.random(len(radius)) < SHARE_OVERLAPPING, OVERLAPPING_DISTANCE * radius, radius
    )
    centres = push_apart(
        nuclei.centres_um, along[..., None] * heading[:, None], radius, 12, period_um
    )
    return replace(nuclei, x_um=centres[:, 0], y_um=centres[:, 1])


def push_apart(centres: F64, offsets: F64, radius: F64, n_rounds: int, period_um: float) -> F64:
    """Relax overlaps of n bodies of k discs each: offsets (n, k, 2) or (n, 1, 2), radius (n,).

    The plane repeats every `period_um` in both axes. Returns the new centres (n, 2).
    """
    n, k = offsets.shape[:2]
    centres = centres.copy()
    body = np.repeat(np.arange(n), k)
    disc_radius = radius[body]
    for _ in range(n_rounds):
        discs = _wrapped((centres[:, None] + offsets).reshape(-1, 2), period_um)
        tree = cKDTree(discs, boxsize=period_um)
        pairs = tree.query_pairs(2 * radius.max(), output_type="ndarray")
        pairs = pairs[body[pairs[:, 0]] != body[pairs[:, 1]]]
        i, j = pairs[:, 0], pairs[:, 1]
        gap = discs[j] - discs[i]
        gap -= period_um * np.rint(gap / period_um)
        distance = np.hypot(gap[:, 0], gap[:, 1]).clip(1e-6)
        push = 0.5 * (disc_radius[i] + disc_radius[j] - distance)
        close = push > 0
        step = (0.7 * push / distance)[close, None] * gap[close]
        for axis in (0, 1):
            centres[:, axis] += np.bincount(body[j[close]], step[:, axis], n)
            centres[:, axis] -= np.bincount(body[i[close]], step[:, axis], n)
    return _wrapped(centres, period_um)


def _wrapped(points: F64, period_um: float) -> F64:
    wrapped = np.mod(points, period_um)
    # mod of a tiny negative number rounds up to the period itself, which a periodic tree refuses.
    wrapped[wrapped >= period_um] = 0.0
    return wrapped
