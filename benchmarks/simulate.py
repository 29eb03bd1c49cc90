"""Time and memory of the simulator by number of cells, beside the limits of its promise.

`python -m benchmarks.simulate --out DIR [--cells N …]`; each size runs in a process of its own,
whose peak memory the operating system tells.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import time
from pathlib import Path

from pairing.simulate import SimulationParams, simulate
from pairing.simulate.truth import SIMULATOR_VERSION

SIZES = (10_000, 100_000, 200_000)
MINUTES_LIMIT = 60.0
GIB_LIMIT = 12.0  # half of the smallest machine that is meant: 24 GiB


def measured(out: Path, n_cells: int, workers: int) -> dict[str, float]:
    """Seconds, peak GiB and GB written of one simulation, which is removed again."""
    started_s = time.monotonic()
    simulate(out, SimulationParams(n_cells=n_cells, seed=1), workers)
    seconds = time.monotonic() - started_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    gib = peak / 2**30 if sys.platform == "darwin" else peak / 2**20
    written_gb = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 1e9
    shutil.rmtree(out)
    return {"seconds": seconds, "gib": gib, "gb": written_gb}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", type=int, nargs="+", default=SIZES)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    print(f"simulator version {SIMULATOR_VERSION}, {args.workers} workers, xoa-3.0, JPEG-2000 DAPI")
    print(f"limits: {MINUTES_LIMIT:g} min, {GIB_LIMIT:g} GiB")
    print(f"{'cells':>9}{'min':>8}{'ms/cell':>9}{'GiB':>7}{'GB':>7}")
    fresh = multiprocessing.get_context("spawn")
    met = True
    for n_cells in args.cells:
        with fresh.Pool(1) as pool:
            figures = pool.apply(measured, (args.out / str(n_cells), n_cells, args.workers))
            pool.close()
            pool.join()
        minutes = figures["seconds"] / 60
        met &= minutes <= MINUTES_LIMIT and figures["gib"] <= GIB_LIMIT
        each_ms = figures["seconds"] / n_cells * 1e3
        print(
            f"{n_cells:>9,}{minutes:>8.1f}{each_ms:>9.2f}{figures['gib']:>7.2f}{figures['gb']:>7.2f}"
        )
        print(json.dumps({"n_cells": n_cells, **figures}), file=sys.stderr)
    print("ok" if met else "NOT MET")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
