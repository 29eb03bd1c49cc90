"""Curation of many cells beside that of 20,000, stage by stage, and the memory of each process.

    python -m benchmarks.scale full --work DIR       200,000 cells through every stage
    python -m benchmarks.scale million --work DIR    1,000,000 through cells, patches and shards

Sections are made once in DIR and used again. The small one is curated before and after the large
one, each time into a folder of its own by a process of its own. What was measured is left in
DIR/full.json and DIR/million.json, which `benchmarks.cost` and `benchmarks.scheduler` read.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.registration.limits import Limits
from benchmarks.scale.figures import CurationFigures
from benchmarks.scale.repeated import TRUE_NUCLEI, repeat, write_unit
from pairing.simulate import SimulationParams, simulate

SMALL = 20_000
SEED = 1
MIN_RATIO = 0.8  # of the cells a second at 20,000
MAX_PROCESS_GB = 4.0
MIN_TRANSCRIPTS = 20_000_000

STAGES = {
    "full": ("registration", "nuclei", "cells", "patches", "shards"),
    "million": ("cells", "patches", "shards"),
}
CELLS = {"full": 200_000, "million": 1_000_000}

CONFIG = """\
name = "scale"
out = {out}
[registration]
refine = {refine}
[split]
assign = {{ D1 = "train" }}
[[runs]]
id = "r1"
xenium = {xenium}
slide = {slide}
alignment = {alignment}
donor = "D1"
"""


@dataclass(frozen=True, slots=True)
class Work:
    """Where sections and outputs lie, and how a curation is run."""

    folder: Path
    n_workers: int
    device: str
    repeated: bool
    keep: bool

    def section(self, n_cells: int) -> Path:
        """A simulated section, made once."""
        path = self.folder / f"section-{n_cells}"
        if not path.exists():
            start_s = time.monotonic()
            simulate(path, SimulationParams(n_cells=n_cells, seed=SEED), self.n_workers)
            print(f"simulated {n_cells:,} cells in {time.monotonic() - start_s:.0f} s", flush=True)
        return path

    def lattice(self, n_cells: int) -> Path:
        """The unit of the lattice as often as it takes, made once."""
        path = self.folder / f"repeated-{n_cells}"
        if not path.exists():
            unit = self.folder / f"unit-{SMALL}"
            if not unit.exists():
                write_unit(unit, SMALL, SEED, self.n_workers)
            start_s = time.monotonic()
            repeat(unit, path, round(n_cells / SMALL))
            print(f"repeated {n_cells:,} cells in {time.monotonic() - start_s:.0f} s", flush=True)
        return path

    def curated(self, what: str, n_cells: int) -> CurationFigures:
        """The figures of a fresh curation, whose folder is removed again."""
        section = self.lattice(n_cells) if self.repeated else self.section(n_cells)
        out = self.folder / f"out-{what}-{n_cells}"
        shutil.rmtree(out, ignore_errors=True)
        paths = {
            "out": out,
            "xenium": section / "outs",
            "slide": section / "he.ome.tif",
            "alignment": section / "he_imagealignment.csv",
        }
        texts = {key: json.dumps(str(path.resolve())) for key, path in paths.items()}
        config, result = out.with_suffix(".toml"), out.with_suffix(".json")
        config.write_text(CONFIG.format(refine=str(what == "full").lower(), **texts))
        argv = [
            sys.executable, "-m", "benchmarks.scale.measure", str(config), str(result),
            "--what", what, "--workers", str(self.n_workers), "--device", self.device,
        ]  # fmt: skip
        if what == "million":
            argv += ["--nuclei", str(section / TRUE_NUCLEI)]
        print(f"curating {n_cells:,} cells, load {os.getloadavg()[0]:.1f}", flush=True)
        subprocess.run(argv, check=True)
        if not self.keep:
            shutil.rmtree(out)
        return CurationFigures.model_validate_json(result.read_bytes())


def show(what: str, small: list[CurationFigures], large: CurationFigures) -> bool:
    """Print the tables; whether all limits are met."""
    limits = Limits()
    if what == "full" and large.n_cells >= CELLS["full"] // 2:
        limits.head("size")
        least = MIN_TRANSCRIPTS * large.n_cells // CELLS["full"]
        limits.line("transcripts", large.n_transcripts, "≥", least)
    limits.head(f"cells/s of {large.n_cells:,} over those of {small[0].n_cells:,}")
    for stage in STAGES[what]:
        limits.line(stage, _speed(large, stage) / _mean_speed(small, stage), "≥", MIN_RATIO)
    limits.head("peak memory of a process, GB")
    for stage in STAGES[what]:
        limits.line(stage, large.stage(stage).peak_bytes / 1e9, "≤", MAX_PROCESS_GB)
    heads = ("stage", "s", "cells/s", "at the small", "ms of a core a cell", "at the small",
             "driver's share", "driver, GB", "worker, GB", "files", "GB")  # fmt: skip
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for figures in large.stages:
        name = figures.stage
        core_ms = [f.stage(name).cpu_s / f.n_cells * 1e3 for f in small]
        cells = (
            name, f"{figures.seconds:.1f}", f"{_speed(large, name):.0f}",
            f"{_mean_speed(small, name):.0f}", f"{figures.cpu_s / large.n_cells * 1e3:.3f}",
            f"{sum(core_ms) / len(core_ms):.3f}",
            f"{figures.driver_cpu_s / max(figures.cpu_s, 1e-9):.2f}",
            f"{figures.driver_peak_bytes / 1e9:.2f}", f"{figures.worker_peak_bytes / 1e9:.2f}",
            str(figures.n_files), f"{figures.n_bytes / 1e9:.2f}",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |")
    print(f"\nhashing the input, {large.input_bytes / 1e9:.1f} GB: {large.hashing_s:.0f} s")
    print(f"{large.n_pairs:,} pairs of {large.n_cells:,} cells; load {large.load:.1f}")
    print("ok" if limits.met else "NOT MET")
    return limits.met


def show_disk(folder: Path, large: CurationFigures) -> None:
    """What the disk takes, beside what stages wrote: beyond the system's cache it is the limit."""
    chunk, n_chunks = os.urandom(1 << 24), 256
    path = folder / "disk"
    start_s = time.monotonic()
    with path.open("wb") as file:
        for _ in range(n_chunks):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    rate = n_chunks * len(chunk) / (time.monotonic() - start_s) / 1e6
    path.unlink()
    told = (f"{s.stage} {s.n_bytes / s.seconds / 1e6:.0f}" for s in large.stages)
    print(f"\nMB/s written: {', '.join(told)}; a file of 4.3 GB to this disk {rate:.0f}")


def _speed(figures: CurationFigures, stage: str) -> float:
    return figures.n_cells / figures.stage(stage).seconds


def _mean_speed(runs: list[CurationFigures], stage: str) -> float:
    return sum(_speed(f, stage) for f in runs) / len(runs)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=list(STAGES))
    parser.add_argument("--work", type=Path, required=True, help="for sections and outputs")
    parser.add_argument("--cells", type=int, help="of the large one")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--repeated", action="store_true", help="full: repeat 20,000 cells, not simulate so many"
    )
    parser.add_argument("--keep", action="store_true", help="the folders that were curated")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    repeated = args.repeated or args.what == "million"
    work = Work(args.work.resolve(), args.workers, args.device, repeated, args.keep)
    n_large = args.cells or CELLS[args.what]
    runs = [work.curated(args.what, n) for n in (SMALL, n_large, SMALL)]
    before, large, after = runs
    figures = [run.model_dump(mode="json") for run in runs]
    (work.folder / f"{args.what}.json").write_text(json.dumps(figures), encoding="utf-8")
    show_disk(work.folder, large)
    return 0 if show(args.what, [before, after], large) else 1


if __name__ == "__main__":
    raise SystemExit(main())
