"""Smooth random fields and the map of the tissue: where it ends, its nests, lumens, aggregates.

All is analytic in µm, so that any image frame or tile can evaluate it without the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

N_MODES = 48
# Levels of the nest field (unit variance): nests above the first, lumens inside them.
NEST_LEVEL = 0.15
LUMEN_LEVEL = 1.75
AGGREGATE_LEVEL = 1.45
CELLS_PER_MM2_NEST = 4300.0
CELLS_PER_MM2_STROMA = 3200.0
CELLS_PER_MM2_AGGREGATE = 5600.0


@dataclass(frozen=True, slots=True)
class SmoothField:
    """A stationary random field of zero mean and unit variance: a sum of plane waves."""

    wave_x: F64  # (N_MODES,) rad/µm
    wave_y: F64
    phase: F64

    @classmethod
    def draw(cls, rng: np.random.Generator, wavelength_um: float) -> SmoothField:
        angle = rng.uniform(0, 2 * np.pi, N_MODES)
        wave = 2 * np.pi / (wavelength_um * rng.uniform(0.7, 1.6, N_MODES))
        return cls(wave * np.cos(angle), wave * np.sin(angle), rng.uniform(0, 2 * np.pi, N_MODES))

    def grid(self, x_um: F64, y_um: F64) -> F32:
        """(len(y), len(x)) values; a product of two thin matrices, so that it stays cheap."""
        in_x = np.outer(self.wave_x, x_um) + self.phase[:, None]
        in_y = np.outer(y_um, self.wave_y)
        values = np.cos(in_y) @ np.cos(in_x) - np.sin(in_y) @ np.sin(in_x)
        return np.asarray(values * np.sqrt(2 / N_MODES), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Outline:
    """The edge of the tissue: a lopsided lobe, a fragment beside it and a hole in it.

    Radii as (n, 5) rows: centre x, centre y, radius, and two phases, all in units of `radius_um`
    and radians; the third row is the hole.
    """

    radius_um: float
    blobs: F64

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Outline:
        """An outline of radius 1 µm around (0, 0), to be scaled to the number of cells."""
        turn = rng.uniform(0, 2 * np.pi)
        toward, across = turn + 0.9, turn + 2.6
        blobs = np.array(
            [
                [0.0, 0.0, 1.0, turn, rng.uniform(0, 2 * np.pi)],
                [1.15 * np.cos(toward), 1.15 * np.sin(toward), 0.24, turn, 1.0],
                [0.45 * np.cos(across), 0.45 * np.sin(across), 0.16, turn, 2.0],
            ]
        )
        return cls(1.0, blobs)

    def scaled(self, radius_um: float) -> Outline:
        return Outline(radius_um, self.blobs)

    def level(self, x_um: F64, y_um: F64) -> F32:
        """(len(y), len(x)) µm inside the edge; negative on glass."""
        levels = []
        for cx, cy, radius, phase2, phase3 in self.blobs:
            dx = x_um[None, :] / self.radius_um - cx
            dy = y_um[:, None] / self.radius_um - cy
            theta = np.arctan2(dy, dx)
            # Order 1 makes it lopsided, 2 oblong, 3 ragged: no turn or mirror image fits.
            edge = radius * (
                1
                + 0.18 * np.cos(theta - phase3)
                + 0.14 * np.cos(2 * (theta - phase2))
                + 0.08 * np.cos(3 * theta - phase3)
            )
            levels.append((edge - np.hypot(dx, dy)) * self.radius_um)
        lobe, fragment, hole = levels
        return np.asarray(np.minimum(np.maximum(lobe, fragment), -hole), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Layers:
    """The map on one grid, each (Y, X) float32: soft masks 0 to 1, and the fibre pattern."""

    tissue: F32
    lumen: F32
    nest: F32
    aggregate: F32
    fibre: F32
    nest_field: F32
    state_field: F32
    stain_field: F32

    @property
    def cells_per_mm2(self) -> F32:
        stroma = CELLS_PER_MM2_STROMA + (CELLS_PER_MM2_NEST - CELLS_PER_MM2_STROMA) * self.nest
        density = stroma + (CELLS_PER_MM2_AGGREGATE - stroma) * self.aggregate
        return np.asarray(density * (self.tissue > 0.95) * (self.lumen < 0.05), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class TissueMap:
    """The random fields of one section and, unless tissue is everywhere, its outline.

    `origin_um` is where the outline's own origin lies in the Xenium frame.
    """

    nest: SmoothField
    aggregate: SmoothField
    ragged: SmoothField
    wave: SmoothField
    grain: SmoothField
    state: SmoothField
    stain: SmoothField
    outline: Outline | None
    origin_um: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def draw(cls, rng: np.random.Generator, outline: Outline | None) -> TissueMap:
        return cls(
            nest=SmoothField.draw(rng, 130.0),
            aggregate=SmoothField.draw(rng, 190.0),
            ragged=SmoothField.draw(rng, 45.0),
            wave=SmoothField.draw(rng, 28.0),
            grain=SmoothField.draw(rng, 9.0),
            state=SmoothField.draw(rng, 120.0),
            stain=SmoothField.draw(rng, 300.0),
            outline=outline,
        )

    def layers(self, x_um: F64, y_um: F64) -> Layers:
        """Evaluate on the grid of `x_um` and `y_um` (Xenium frame)."""
        x, y = x_um - self.origin_um[0], y_um - self.origin_um[1]
        nest_field = self.nest.grid(x, y)
        inside = _soft(nest_field, NEST_LEVEL, 0.06)
        lumen = _soft(nest_field, LUMEN_LEVEL, 0.03)
        aggregate = _soft(self.aggregate.grid(x, y), AGGREGATE_LEVEL, 0.08) * (1 - inside)
        if self.outline is None:
            tissue = np.ones_like(nest_field)
        else:
            tissue = _soft(self.outline.level(x, y) + 7 * self.ragged.grid(x, y), 0.0, 1.5)
        # Fibres run along the contours of the nests, wavy and of uneven weight.
        phase = 26 * nest_field + 2.2 * self.wave.grid(x, y)
        grain = self.grain.grid(x, y)
        fibre = np.cos(phase) * (0.6 + 0.3 * grain) + 0.35 * grain
        return Layers(
            tissue=tissue,
            lumen=lumen,
            nest=inside,
            aggregate=aggregate,
            fibre=fibre.astype(np.float32),
            nest_field=nest_field,
            state_field=self.state.grid(x, y),
            stain_field=self.stain.grid(x, y),
        )


def _soft(value: F32, level: float, width: float) -> F32:
    return np.asarray(1 / (1 + np.exp(-np.clip((value - level) / width, -30, 30))), np.float32)
