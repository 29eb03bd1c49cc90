"""The simulated pairs that the parts ask for, by seed.

Seeds 1 to 20 are those of accuracy, 5000 and above those of the verdict; thresholds were set on
seeds from 1001 on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.registration.pairs import Simulated, hard, simulated

# Of these at least 20,000 have a nucleus that the instrument sees.
N_CELLS = 21_000
LARGEST_WARP_UM = 40.0
TORN_WARP_UM = 20.0
TEAR_UM, FOLD_UM = (25.0, 40.0), (15.0, 30.0)
SMALL = (2_000, 4_000)
# Of a twentieth of it enough is left to be looked at.
MEDIUM = 12_000


def whole(out: Path, seed: int) -> Simulated:
    """A section that is stretched by 40 µm, on a slide four times as large."""
    return simulated(out, N_CELLS, seed, hard(seed, warp_um=LARGEST_WARP_UM))


def torn(out: Path, seed: int) -> Simulated:
    """The same with 20 µm, a tear and a fold."""
    rng = np.random.default_rng([seed, 8])
    tear, fold = round(rng.uniform(*TEAR_UM), 1), round(rng.uniform(*FOLD_UM), 1)
    slide = hard(seed, warp_um=TORN_WARP_UM, tear_um=tear, fold_um=fold)
    return simulated(out, N_CELLS, seed, slide)


def small(out: Path, seed: int, *, serial: bool = False) -> Simulated:
    """A small section, stretched by 0 to 40 µm; or the `serial` one after it on the slide."""
    rng = np.random.default_rng([seed, 9])
    n_cells, warp = int(rng.integers(*SMALL)), round(rng.uniform(0, LARGEST_WARP_UM), 1)
    slide = hard(seed, warp_um=warp, serial_section=serial)
    return simulated(out, n_cells, seed, slide)


def medium(out: Path, seed: int) -> Simulated:
    """A section of which even a twentieth holds several hundred nuclei."""
    return simulated(out, MEDIUM, seed, hard(seed, warp_um=TORN_WARP_UM))
