"""Nucleus outlines: a bent, lobed, rough ellipse that is cheap to test points against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pairing.simulate.celltypes import CELL_TYPES

F64 = npt.NDArray[np.float64]

ROUGH_ORDERS = np.array([3, 4, 5])
_THETA = np.linspace(0, 2 * np.pi, 96, endpoint=False)


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
    rough: F64  # (n, 3) amplitudes of ROUGH_ORDERS
    rough_phase: F64  # (n, 3)
    centroid: F64  # (n, 2) of the area, in (u, v)

    def depth(self, i: int, u: F64, v: F64) -> tuple[F64, F64]:
        """(rho, theta) of points about nucleus i: rho is 0 at its middle and 1 on its edge."""
        long = self.long_um[i]
        straight = v - self.bend[i] * (u * u / long - long / 4)
        theta = np.arctan2(straight, u)
        return np.hypot(u, straight) / self._radius(slice(i, i + 1), theta), theta

    def _radius(self, which: slice, theta: F64) -> F64:
        """Edge at `theta` (k,), of one nucleus (k,) or of n nuclei (n, k)."""
        a, b = self.long_um[which, None], self.short_um[which, None]
        c2 = np.cos(theta) ** 2
        ellipse = a * b / np.sqrt(b * b * c2 + a * a * (1 - c2))
        wobble = 1 + self.waist[which, None] * (2 * c2 - 1)
        for k, order in enumerate(ROUGH_ORDERS):
            wobble = wobble + self.rough[which, k, None] * np.cos(
                order * theta + self.rough_phase[which, k, None]
            )
        radius: F64 = ellipse * wobble
        return radius[0] if radius.shape[0] == 1 else radius

    def polygons(self) -> F64:
        """(n, 96, 2) points of every edge in (u, v)."""
        radius = np.atleast_2d(self._radius(slice(None), _THETA))
        u, straight = radius * np.cos(_THETA), radius * np.sin(_THETA)
        long = self.long_um[:, None]
        return np.stack([u, straight + self.bend[:, None] * (u * u / long - long / 4)], axis=-1)


def draw_outlines(
    rng: np.random.Generator, type_index: npt.NDArray[np.int64], area_um2: F64
) -> Outlines:
    """Random outlines of the given types, each of exactly the given area."""
    n = len(type_index)

    def between(lo: list[float], hi: list[float]) -> F64:
        return np.asarray(rng.uniform(np.array(lo)[type_index], np.array(hi)[type_index]))

    ratio = between([t.axis_ratio[0] for t in CELL_TYPES], [t.axis_ratio[1] for t in CELL_TYPES])
    bend = between([t.bend[0] for t in CELL_TYPES], [t.bend[1] for t in CELL_TYPES])
    waist = np.array([t.waist for t in CELL_TYPES])[type_index]
    roughness = np.array([t.roughness for t in CELL_TYPES])[type_index]
    unit = Outlines(
        long_um=np.sqrt(ratio),
        short_um=1 / np.sqrt(ratio),
        bend=bend,
        waist=waist,
        rough=roughness[:, None] * rng.uniform(0.4, 1.4, (n, len(ROUGH_ORDERS))),
        rough_phase=rng.uniform(0, 2 * np.pi, (n, len(ROUGH_ORDERS))),
        centroid=np.zeros((n, 2)),
    )
    area, centroid = _area_and_centroid(unit.polygons())
    scale = np.sqrt(area_um2 / area)
    return Outlines(
        long_um=unit.long_um * scale,
        short_um=unit.short_um * scale,
        bend=bend,
        waist=waist,
        rough=unit.rough,
        rough_phase=unit.rough_phase,
        centroid=centroid * scale[:, None],
    )


def _area_and_centroid(polygons: F64) -> tuple[F64, F64]:
    """Of simple polygons (n, k, 2): areas (n,) and centroids (n, 2), by the shoelace formula."""
    x, y = polygons[..., 0], polygons[..., 1]
    x1, y1 = np.roll(x, -1, axis=1), np.roll(y, -1, axis=1)
    cross = x * y1 - x1 * y
    area = cross.sum(1) / 2
    cx = ((x + x1) * cross).sum(1) / (6 * area)
    cy = ((y + y1) * cross).sum(1) / (6 * area)
    return np.abs(area), np.stack([cx, cy], axis=1)
