"""Nucleus outlines: a bent, lobed, rough ellipse that is cheap to test points against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pairing.simulate.celltypes import CELL_TYPES

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

ROUGH_ORDERS = (3, 4, 5)
_THETA = np.linspace(0, 2 * np.pi, 48, endpoint=False)


@dataclass(frozen=True, slots=True)
class Outlines:
    """Outlines of n nuclei in their own frames: u along the long axis, v across, µm.

    In that frame, straightened by `v - bend * (u**2 / long - long / 4)`, the edge is
    `radius(theta)`: an ellipse times a waist and roughness. Straightening keeps areas.
    """

    long_um: F64  # (n,) half axes
    short_um: F64
    bend: F64
    waist: F64
    rough: npt.NDArray[np.complex128]  # (n, 3) amplitude and phase of ROUGH_ORDERS
    centroid: F64  # (n, 2) of the area, in (u, v)

    def take(self, rows: I64) -> Outlines:
        return Outlines(*(getattr(self, name)[rows] for name in self.__slots__))

    def depth(self, u: F32, v: F32) -> tuple[F32, npt.NDArray[np.complex64]]:
        """(rho, heading) of points (n, …) about n nuclei.

        rho is 0 in the middle and 1 on the edge; heading is the direction from the middle as a
        complex number of modulus 1.
        """
        long = _column(self.long_um, u.ndim)
        straight = v - _column(self.bend, u.ndim) * (u * u / long - long / 4)
        distance = np.hypot(u, straight) + np.float32(1e-6)
        heading = np.empty(u.shape, np.complex64)
        np.divide(u, distance, out=heading.real)
        np.divide(straight, distance, out=heading.imag)
        return distance / self._radius(heading), heading

    def _radius(self, heading: npt.NDArray[np.complexfloating]) -> F32:
        ndim = heading.ndim
        a, b = _column(self.long_um, ndim), _column(self.short_um, ndim)
        c2 = heading.real**2
        ellipse = a * b / np.sqrt(b * b * c2 + a * a * (1 - c2))
        wobble = 1 + _column(self.waist, ndim) * (2 * c2 - 1)
        power = heading * heading
        for k in range(len(ROUGH_ORDERS)):
            power = power * heading
            rough = self.rough[:, k]
            wobble += _column(rough.real, ndim) * power.real
            wobble -= _column(rough.imag, ndim) * power.imag
        return np.asarray(ellipse * wobble, dtype=np.float32)

    def polygons(self) -> F64:
        """(n, 48, 2) points of every edge in (u, v)."""
        heading = np.broadcast_to(np.exp(1j * _THETA), (len(self.long_um), len(_THETA)))
        edge = self._radius(heading) * heading
        u, straight = edge.real, edge.imag
        long = self.long_um[:, None]
        return np.stack([u, straight + self.bend[:, None] * (u * u / long - long / 4)], axis=-1)


def _column(values: npt.NDArray[np.floating], ndim: int) -> F32:
    return values.astype(np.float32).reshape(-1, *(1,) * (ndim - 1))


def draw_outlines(rng: np.random.Generator, type_index: I64, area_um2: F64) -> Outlines:
    """Random outlines of the given types, each of exactly the given area."""
    n = len(type_index)

    def between(bounds: list[tuple[float, float]]) -> F64:
        low, high = np.array(bounds)[type_index].T
        return np.asarray(rng.uniform(low, high))

    ratio = between([t.axis_ratio for t in CELL_TYPES])
    bend = between([t.bend for t in CELL_TYPES])
    waist = np.array([t.waist for t in CELL_TYPES])[type_index]
    roughness = np.array([t.roughness for t in CELL_TYPES])[type_index]
    shape = (n, len(ROUGH_ORDERS))
    rough = roughness[:, None] * rng.uniform(0.4, 1.5, shape)
    return outlines_of(ratio, bend, waist, rough * np.exp(2j * np.pi * rng.random(shape)), area_um2)


def outlines_of(
    axis_ratio: F64, bend: F64, waist: F64, rough: npt.NDArray[np.complex128], area_um2: F64
) -> Outlines:
    """Outlines of the given shapes, each of exactly the given area (of its polygon)."""
    ratio = np.sqrt(axis_ratio)
    unit = Outlines(ratio, 1 / ratio, bend, waist, rough, np.zeros((len(ratio), 2)))
    area, centroid = _area_and_centroid(unit.polygons())
    scale = np.sqrt(area_um2 / area)
    return Outlines(ratio * scale, scale / ratio, bend, waist, rough, centroid * scale[:, None])


def _area_and_centroid(polygons: F64) -> tuple[F64, F64]:
    """Of simple polygons (n, k, 2): areas (n,) and centroids (n, 2), by the shoelace formula."""
    x, y = polygons[..., 0], polygons[..., 1]
    x1, y1 = np.roll(x, -1, axis=1), np.roll(y, -1, axis=1)
    cross = x * y1 - x1 * y
    area = cross.sum(1) / 2
    cx = ((x + x1) * cross).sum(1) / (6 * area)
    cy = ((y + y1) * cross).sum(1) / (6 * area)
    return np.abs(area), np.stack([cx, cy], axis=1)
