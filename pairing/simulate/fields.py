"""Smooth random fields and the outline of a piece of tissue.

All is analytic in µm, so that any image frame or block can evaluate it without the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

N_MODES = 48


@dataclass(frozen=True, slots=True)
class SmoothField:
    """A stationary random field of zero mean and unit variance: a sum of plane waves."""

    wave_x: F64  # (N_MODES,) rad/µm
    wave_y: F64
    phase: F64

    @classmethod
    def draw(
        cls, rng: np.random.Generator, wavelength_um: float, period_um: float | None = None
    ) -> SmoothField:
        """Waves of 0.7 to 1.6 times the wavelength; with a period the field repeats by it."""
        angle = rng.uniform(0, 2 * np.pi, N_MODES)
        wave = 2 * np.pi / (wavelength_um * rng.uniform(0.7, 1.6, N_MODES))
        wave_x, wave_y = wave * np.cos(angle), wave * np.sin(angle)
        if period_um is not None:
            unit = 2 * np.pi / period_um
            wave_x, wave_y = np.rint(wave_x / unit) * unit, np.rint(wave_y / unit) * unit
        return cls(wave_x, wave_y, rng.uniform(0, 2 * np.pi, N_MODES))

    def grid(self, x_um: F64, y_um: F64) -> F32:
        """(len(y), len(x)) values; a product of two thin matrices, so that it stays cheap."""
        in_x = np.outer(self.wave_x, x_um) + self.phase[:, None]
        in_y = np.outer(y_um, self.wave_y)
        # A phase needs float64 far from the origin, its cosine doesn't.
        cos_x, sin_x = np.cos(in_x).astype(np.float32), np.sin(in_x).astype(np.float32)
        cos_y, sin_y = np.cos(in_y).astype(np.float32), np.sin(in_y).astype(np.float32)
        values = cos_y @ cos_x - sin_y @ sin_x
        return np.asarray(values * np.float32(np.sqrt(2 / N_MODES)), dtype=np.float32)

    def at(self, points_um: F64) -> F64:
        """(n,) values at points (n, 2)."""
        phase = points_um @ np.stack([self.wave_x, self.wave_y]) + self.phase
        return np.asarray(np.cos(phase).sum(axis=1) * np.sqrt(2 / N_MODES), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Outline:
    """The edge of a piece of tissue, of radius 1 around (0, 0) until it is `scaled`.

    Blobs as (n, 5) rows: centre x, centre y, radius, and two phases; the first `n_solid` add up,
    the others are holes.
    """

    radius_um: float
    blobs: F64
    n_solid: int
    unevenness: float  # 1 for a section, less for a punched core

    @classmethod
    def of_section(cls, rng: np.random.Generator) -> Outline:
        """A lopsided lobe, a fragment beside it and a hole in it: no turn or mirror image fits."""
        turn = rng.uniform(0, 2 * np.pi)
        toward, across = turn + 0.9, turn + 2.6
        blobs = np.array(
            [
                [0.0, 0.0, 1.0, turn, rng.uniform(0, 2 * np.pi)],
                [1.15 * np.cos(toward), 1.15 * np.sin(toward), 0.24, turn, 1.0],
                [0.45 * np.cos(across), 0.45 * np.sin(across), 0.16, turn, 2.0],
            ]
        )
        return cls(1.0, blobs, 2, 1.0)

    @classmethod
    def of_core(cls, rng: np.random.Generator) -> Outline:
        """A disc as the needle of a tissue microarray punches it."""
        turn, ragged = rng.uniform(0, 2 * np.pi, 2)
        return cls(1.0, np.array([[0.0, 0.0, 1.0, turn, ragged]]), 1, 0.15)

    def scaled(self, radius_um: float) -> Outline:
        return Outline(radius_um, self.blobs, self.n_solid, self.unevenness)

    def level(self, dx_um: F64, dy_um: F64) -> F32:
        """µm inside the edge, negative on glass, at offsets from the origin that broadcast."""
        levels = []
        for cx, cy, radius, phase2, phase3 in self.blobs:
            dx = (dx_um / self.radius_um - cx).astype(np.float32)
            dy = (dy_um / self.radius_um - cy).astype(np.float32)
            theta = np.arctan2(dy, dx)
            # Order 1 makes it lopsided, 2 oblong, 3 ragged.
            edge = radius * (
                1
                + self.unevenness
                * (
                    0.18 * np.cos(theta - phase3)
                    + 0.14 * np.cos(2 * (theta - phase2))
                    + 0.08 * np.cos(3 * theta - phase3)
                )
            )
            levels.append((edge - np.hypot(dx, dy)) * self.radius_um)
        inside = np.maximum.reduce(levels[: self.n_solid])
        for hole in levels[self.n_solid :]:
            inside = np.minimum(inside, -hole)
        return np.asarray(inside, dtype=np.float32)


def soft(value: F32, level: float, width: float) -> F32:
    """0 below `level`, 1 above, over about `width` to each side."""
    return np.asarray(1 / (1 + np.exp(-np.clip((value - level) / width, -30, 30))), np.float32)
