"""How long the matching of nuclei and its rates take, and how much memory, on made-up outlines.

python -m benchmarks.match_scale [--nuclei N …]

Nuclei on a jittered lattice, 10 µm apart, ellipses of 24 corners; on the slide, which a field of
20 µm stretches, 15 of 100 are missing, the others drawn half a micron off and a tenth larger or
smaller, and as many strangers lie between them. Each number of nuclei runs in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely

from pairing.geometry import Affine
from pairing.match import match_nuclei
from pairing.match_rate import PlacedNuclei, match_rates
from pairing.warp import Warp

F64 = npt.NDArray[np.float64]

MPP = 0.25
SPACING_UM, N_CORNERS, MISSING = 10.0, 24, 0.15
FIELD_UM, STEP_UM = 20.0, 25.0
LIMIT_S_PER_100_000 = 30.0


def outlines_um(centres_um: F64, size: F64, turn: F64) -> npt.NDArray[np.object_]:
    """Ellipses of 4.5 by 3 µm times `size`, turned."""
    angle = np.linspace(0, 2 * np.pi, N_CORNERS, endpoint=False)
    x, y = (axis * size[:, None] for axis in (4.5 * np.cos(angle), 3.0 * np.sin(angle)))
    c, s = np.cos(turn)[:, None], np.sin(turn)[:, None]
    corners = np.stack([c * x - s * y, s * x + c * y], axis=-1) + centres_um[:, None]
    return np.asarray(shapely.polygons(corners), dtype=object)


def stretched(extent_um: float) -> Warp:
    """A slide's pixels of Xenium µm: turned, and stretched by a wave."""
    nodes = np.arange(0, extent_um + 2 * STEP_UM, STEP_UM)
    x, y = np.meshgrid(nodes / 160, nodes / 160)
    shift = FIELD_UM / MPP * np.stack([np.sin(x + 0.5 * y), np.cos(y - 0.7 * x)], axis=-1)
    return Warp(Affine.similarity(1 / MPP, 0.7, (0.0, 0.0)), (0.0, 0.0), STEP_UM, shift)


def measure(n_nuclei: int) -> None:
    """Prints one row of the table."""
    rng = np.random.default_rng(0)
    side = int(np.ceil(np.sqrt(n_nuclei)))
    lattice = np.stack(np.divmod(np.arange(n_nuclei), side), axis=1) * SPACING_UM
    centres_um = lattice + rng.uniform(-3, 3, lattice.shape)
    turn = rng.uniform(0, np.pi, n_nuclei)
    instrument = outlines_um(centres_um, np.ones(n_nuclei), turn)
    shown = rng.random(n_nuclei) >= MISSING
    strange = rng.uniform(0, side * SPACING_UM, (int((~shown).sum()), 2))
    he_um = np.concatenate([centres_um[shown] + rng.normal(0, 0.5, (shown.sum(), 2)), strange])
    he_turn = np.concatenate([turn[shown], rng.uniform(0, np.pi, len(strange))])
    size = rng.uniform(0.9, 1.1, len(he_um))
    he_px_from_xenium_um = stretched(side * SPACING_UM)
    moved = shapely.transform(outlines_um(he_um, size, he_turn), he_px_from_xenium_um)
    table = pa.table(
        {
            "nucleus_id": np.arange(1, len(he_um) + 1),
            "area_um2": shapely.area(moved) * MPP**2,
            "polygon_px": pa.array(shapely.to_wkb(moved), pa.binary()),
        }
    )
    del moved
    # What the table and the outlines take is there before; the peak also holds the making of them.
    before_gib = _peak_gib()
    started_s, started_cpu_s = time.monotonic(), time.process_time()
    matched = match_nuclei(instrument.tolist(), table, he_px_from_xenium_um, MPP)
    seconds, cpu_s = time.monotonic() - started_s, time.process_time() - started_cpu_s
    started_s = time.monotonic()
    rates = match_rates(
        PlacedNuclei(he_px_from_xenium_um(centres_um) * MPP, shapely.area(instrument)),
        PlacedNuclei(he_px_from_xenium_um(he_um) * MPP, table["area_um2"].to_numpy()),
        matched["he_nucleus_id"].notna().to_numpy(),
        np.full(n_nuclei, 0.5),
        np.ones(n_nuclei, bool),
    )
    rates_s = time.monotonic() - started_s
    assert rates is not None
    rate = rates[0]
    right = (matched["he_nucleus_id"].to_numpy(float, na_value=0)[shown] ==
             np.arange(1, shown.sum() + 1)).mean()  # fmt: skip
    per_100_000 = seconds * 1e5 / n_nuclei
    print(
        f"| {n_nuclei:,} | {seconds:.1f} ({cpu_s:.1f}) | {per_100_000:.1f} "
        f"| {rates_s:.1f} | {before_gib:.2f} | {_peak_gib():.2f} | {right:.4f} "
        f"| {rate.found:.2f}, {rate.predicted:.2f}, {rate.by_chance:.2f} |",
        flush=True,
    )
    if per_100_000 > LIMIT_S_PER_100_000:
        sys.exit(1)


def _peak_gib() -> float:
    # KiB on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nuclei", type=int, nargs="+", default=[50_000, 200_000, 1_000_000])
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        measure(given.alone)
        return 0
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(
        "| nuclei | seconds (CPU) | s per 100,000 | rates, s | GiB before | GiB at most "
        "| matched rightly | found, predicted, by chance |"
    )
    print(f"|{'---|' * 8}", flush=True)
    command = [sys.executable, "-m", "benchmarks.match_scale", "--alone"]
    done = [subprocess.run([*command, str(n)]).returncode for n in given.nuclei]
    return max(done)


if __name__ == "__main__":
    sys.exit(main())
