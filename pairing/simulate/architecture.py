"""The map of a piece of tissue: glands with lumens, stroma, vessels, aggregates, where it ends."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pairing.simulate.fields import Outline, SmoothField, soft

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

# Levels of the gland field (unit variance): epithelium above the first, lumens inside.
GLAND_LEVEL = 0.05
LUMEN_LEVEL = 1.35
AGGREGATE_LEVEL = 1.45
VESSELS_PER_MM2 = 9.0
VESSEL_RADIUS_UM = (7.0, 32.0)
CELLS_PER_MM2 = {"stroma": 3500.0, "epithelium": 8000.0, "aggregate": 10500.0, "vessel": 6000.0}


@dataclass(frozen=True, slots=True)
class Layers:
    """The map on one grid, each (Y, X) float32: soft masks 0 to 1, and the fields behind them."""

    tissue: F32
    lumen: F32  # of glands and of vessels
    blood: F32  # red cells in a vessel's lumen
    epithelium: F32
    aggregate: F32
    vessel: F32  # its wall
    fibre: F32
    gland_field: F32
    state_field: F32
    stain_field: F32

    @property
    def shares(self) -> F32:
        """(4, Y, X) shares of epithelium, stroma, aggregate and vessel wall."""
        rest = 1 - self.vessel
        epithelium = rest * self.epithelium
        aggregate = (rest - epithelium) * self.aggregate
        stroma = rest - epithelium - aggregate
        return np.stack([epithelium, stroma, aggregate, self.vessel])

    @property
    def cells_per_mm2(self) -> F32:
        names = ("epithelium", "stroma", "aggregate", "vessel")
        rates = np.array([CELLS_PER_MM2[n] for n in names], np.float32)
        density = np.tensordot(rates, self.shares, axes=1)
        return np.asarray(density * (self.tissue > 0.95) * (self.lumen < 0.05), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class TissueMap:
    """The random fields of one piece and, unless tissue is everywhere, its outline.

    The fields repeat every `period_um`; `origin_um` is where the outline's own origin lies in the
    Xenium frame, and the fields start at (0, 0) of that frame.
    """

    gland: SmoothField
    aggregate: SmoothField
    ragged: SmoothField
    wave: SmoothField
    grain: SmoothField
    state: SmoothField
    stain: SmoothField
    vessels: F64  # (n, 5): centre x and y, radius, squeeze, angle; centres within one period
    period_um: float
    outline: Outline | None
    origin_um: tuple[float, float]

    @classmethod
    def draw(cls, rng: np.random.Generator, period_um: float, outline: Outline | None) -> TissueMap:
        def field(wavelength_um: float) -> SmoothField:
            return SmoothField.draw(rng, wavelength_um, period_um)

        n = rng.poisson(VESSELS_PER_MM2 * period_um**2 * 1e-6)
        low, high = np.log(VESSEL_RADIUS_UM)
        vessels = np.stack(
            [
                *rng.uniform(0, period_um, (2, n)),
                np.exp(rng.uniform(low, high, n)),
                rng.uniform(1.0, 2.2, n),
                rng.uniform(0, np.pi, n),
            ],
            axis=1,
        )
        return cls(
            gland=field(130.0),
            aggregate=field(190.0),
            ragged=field(45.0),
            wave=field(28.0),
            grain=field(9.0),
            state=field(120.0),
            stain=field(300.0),
            vessels=vessels,
            period_um=period_um,
            outline=outline,
            origin_um=(0.0, 0.0),
        )

    def next_section(self, rng: np.random.Generator) -> TissueMap:
        """The same architecture a few µm deeper: every field has drifted a little."""

        def drifted(field: SmoothField) -> SmoothField:
            return replace(field, phase=field.phase + 0.12 * rng.standard_normal(field.phase.shape))

        vessels = self.vessels.copy()
        drift_um = 1.5 * rng.standard_normal((len(vessels), 2))
        vessels[:, :2] = (vessels[:, :2] + drift_um) % self.period_um
        return replace(
            self,
            gland=drifted(self.gland),
            aggregate=drifted(self.aggregate),
            ragged=drifted(self.ragged),
            state=drifted(self.state),
            vessels=vessels,
        )

    def inside_um(self, x_um: F64, y_um: F64) -> F32:
        """(len(y), len(x)) µm inside the edge of the tissue."""
        if self.outline is None:
            return np.full((len(y_um), len(x_um)), 1e3, np.float32)
        x0, y0 = self.origin_um
        level = self.outline.level((x_um - x0)[None, :], (y_um - y0)[:, None])
        return level + 7 * self.ragged.grid(x_um, y_um)

    def layers(self, x_um: F64, y_um: F64) -> Layers:
        """Evaluate on the grid of `x_um` and `y_um` (Xenium frame)."""
        gland_field = self.gland.grid(x_um, y_um)
        grain = self.grain.grid(x_um, y_um)
        wall, vessel_lumen = self._vessels(x_um, y_um)
        around = np.maximum(wall, vessel_lumen)
        gland_lumen = soft(gland_field, LUMEN_LEVEL, 0.03) * (1 - around)
        epithelium = soft(gland_field, GLAND_LEVEL, 0.06) * (1 - around)
        aggregate = soft(self.aggregate.grid(x_um, y_um), AGGREGATE_LEVEL, 0.08)
        # Fibres run wavy about the glands, of uneven weight, with clear clefts between bundles.
        wave, ragged = self.wave.grid(x_um, y_um), self.ragged.grid(x_um, y_um)
        phase = 15 * gland_field + 3.0 * wave + 3.0 * ragged
        bundles = np.cos(7 * gland_field + 2.2 * wave + 2.5 * ragged + 1.0)
        cleft = soft(bundles + 0.25 * grain, 0.92, 0.06)
        weight = 1 + 0.35 * np.cos(phase) * (0.6 + 0.4 * wave) + 0.22 * grain
        return Layers(
            tissue=soft(self.inside_um(x_um, y_um), 0.0, 1.5),
            lumen=np.maximum(gland_lumen, vessel_lumen),
            blood=vessel_lumen * soft(grain, 0.3, 0.15),
            epithelium=epithelium,
            aggregate=aggregate * (1 - epithelium) * (1 - around),
            vessel=wall,
            fibre=np.asarray(1.25 * (weight * (1 - 0.92 * cleft) - 1), dtype=np.float32),
            gland_field=gland_field,
            state_field=self.state.grid(x_um, y_um),
            stain_field=self.stain.grid(x_um, y_um),
        )

    def _vessels(self, x_um: F64, y_um: F64) -> tuple[F32, F32]:
        """(wall, lumen), 0 to 1, on the grid."""
        wall = np.zeros((len(y_um), len(x_um)), np.float32)
        lumen = wall.copy()
        low, high = np.array([x_um[0], y_um[0]]), np.array([x_um[-1], y_um[-1]])
        for cx, cy, radius, squeeze, angle in self.vessels:
            reach = radius * np.sqrt(squeeze) + 12
            # The copies of the vessel, a period apart, that touch the grid.
            first = np.ceil((low - reach - (cx, cy)) / self.period_um).astype(int)
            last = np.floor((high + reach - (cx, cy)) / self.period_um).astype(int)
            for kx in range(first[0], last[0] + 1):
                for ky in range(first[1], last[1] + 1):
                    dx = x_um - (cx + kx * self.period_um)
                    dy = y_um - (cy + ky * self.period_um)
                    ix, iy = np.abs(dx) < reach, np.abs(dy) < reach
                    c, s = np.cos(angle), np.sin(angle)
                    u = dx[None, ix] * c + dy[iy, None] * s
                    v = dy[iy, None] * c - dx[None, ix] * s
                    r = np.hypot(u / np.sqrt(squeeze), v * np.sqrt(squeeze)).astype(np.float32)
                    thickness = 3.5 + 0.25 * radius
                    inner = soft(radius - thickness - r, 0.0, 0.5)
                    window = np.ix_(iy, ix)
                    lumen[window] = np.maximum(lumen[window], inner)
                    wall[window] = np.maximum(wall[window], soft(radius - r, 0.0, 0.7) - inner)
        return wall, lumen
