"""Patches and packing beside their limits; 1 where one isn't met.

python -m benchmarks.patches [--cells N] [--rounds N] [--out DIR] [--shared-data DIR]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.patches import packing, parts
from benchmarks.patches.slides import SPEC, WRITERS, centres, picture, side_px, write_slide
from benchmarks.registration.limits import Limits
from pairing.geometry import Points
from pairing.patches import write_patches
from pairing.slide import open_slide

MAX_TIMES_THE_PARTS, MAX_REDECODED = 1.25, 0.15
N_ONE_BY_ONE = 40
# Of the cells: patches that overlap less share less.
FEWER = (0.6, 0.3)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/patches"), help="for the slides")
    shared_data = os.environ.get("CELLPAIR_SHARED_DATA", "../shared/data")
    parser.add_argument("--shared-data", type=Path, default=Path(shared_data))
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    given.out.mkdir(parents=True, exist_ok=True)
    limits = Limits()
    centres_px, image = centres(given.cells), picture(given.shared_data, given.cells)
    for name, options in WRITERS.items():
        _patches(limits, given.out, name, options, image, centres_px, given.rounds)
    del image
    _packing(limits, given.out, centres_px, given.rounds)
    return 0 if limits.met else 1


def _patches(
    limits: Limits,
    out: Path,
    name: str,
    options: dict[str, Any],
    image: Any,
    centres_px: Points,
    rounds: int,
) -> None:
    path = write_slide(out / f"{options['compression']}.ome.tif", image, options)
    ratios, clock_ratios, stage_s, alone = [], [], [], []
    for _ in range(rounds):
        stage, clock_s, summary = _stage(out / "patches", path, centres_px)
        started = time.perf_counter()
        each, n_tiles = parts.parts_alone(path, image, centres_px)
        clock_ratios.append(clock_s / (time.perf_counter() - started))
        stage_s.append(stage)
        alone.append(each)
        ratios.append(stage / each.total_s)
    n = len(centres_px)
    bits = path.stat().st_size * 8 / side_px(n) ** 2
    limits.head(f"{n:,} patches of a slide in {name} ({bits:.2f} bits a pixel), load "
                f"{os.getloadavg()[0]:.1f}")  # fmt: skip
    limits.line("stage / its parts alone, processor time", median(ratios), "≤", MAX_TIMES_THE_PARTS)
    limits.told("in each round", ", ".join(f"{r:.3f}" for r in ratios))
    limits.told("in each round, by the clock", ", ".join(f"{r:.3f}" for r in clock_ratios))
    limits.line("tiles decoded twice", summary["redecoded_share"], "≤", MAX_REDECODED)
    limits.told("blocks", str(summary["n_blocks"]))
    limits.told("tiles decoded alone, decoded by the stage at least once",
                f"{n_tiles}, {summary['n_tiles']}")  # fmt: skip
    limits.told("stage, µs a patch", f"{median(stage_s) / n * 1e6:.0f}")
    for what in ("decode", "resize", "encode"):
        some = median(getattr(each, f"{what}_s") for each in alone)
        limits.told(f"{what} alone, µs a patch", f"{some / n * 1e6:.0f}")
    for fewer in FEWER:
        some = centres_px[: round(n * fewer)]
        stage, _, _ = _stage(out / "of-fewer", path, some)
        ratio = stage / parts.parts_alone(path, image, some)[0].total_s
        limits.told(f"stage / its parts alone, of {fewer:.0%} of the cells", f"{ratio:.2f}")
    few = centres_px[:: n // N_ONE_BY_ONE]
    limits.told("one by one by tifffile, ms a patch", f"{parts.by_tifffile(path, few):.1f}")
    limits.told("one by one by spatialdata, ms a patch", f"{parts.by_spatialdata(path, few):.1f}")


def _stage(out: Path, path: Path, centres_px: Points) -> tuple[float, float, dict[str, Any]]:
    """Seconds of the processor and of the clock, and the figures of the stage."""
    kept = out.with_name(f"{out.name}-kept")
    for folder in (out, kept):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    order = np.random.default_rng(0).permutation(len(centres_px))
    opened = partial(open_slide, path)
    started, started_s = time.process_time(), time.perf_counter()
    summary = write_patches(out, kept, opened, centres_px, order, SPEC, map).summary
    took, clock_s = time.process_time() - started, time.perf_counter() - started_s
    shutil.rmtree(kept)
    return took, clock_s, summary


def _packing(limits: Limits, out: Path, centres_px: Points, rounds: int) -> None:
    cells = packing.write_cells(out / "cells", centres_px)
    shards = out / "shards"
    took: dict[str, list[packing.Took]] = {"stage": [], "webdataset": [], "copy": []}
    for _ in range(rounds):
        took["stage"].append(packing.pack(shards, cells, out / "patches"))
        took["webdataset"].append(packing.by_webdataset(shards, out / "by-webdataset"))
        took["copy"].append(packing.by_copying(shards, out / "copied"))
    n = len(centres_px)
    n_bytes = sum(path.stat().st_size for path in shards.glob("*.tar"))
    limits.head(f"packing {n:,} samples of {n_bytes / n / 1000:.1f} kB, load "
                f"{os.getloadavg()[0]:.1f}")  # fmt: skip
    for what, name in (
        ("stage", "the stage: select, order, join, write, hash, sync"),
        ("webdataset", "webdataset's TarWriter, of samples in memory, no table, no hash"),
        ("copy", "copying, hashing and syncing the same tars"),
    ):
        cpu_s, clock_s = (median(getattr(t, k) for t in took[what]) for k in ("cpu_s", "clock_s"))
        limits.told(
            name,
            f"{cpu_s / n * 1e6:.0f} µs a sample of the processor, "
            f"{clock_s / n * 1e6:.0f} by the clock, {n_bytes / clock_s / 1e6:.0f} MB/s",
        )
    pairs = zip(took["stage"], took["webdataset"], strict=True)
    ratio = median(a.cpu_s / b.cpu_s for a, b in pairs)
    limits.told("stage / webdataset's TarWriter, processor time", f"{ratio:.2f}")


if __name__ == "__main__":
    sys.exit(main())
