"""Steps of curation beside those of others, on one simulated bundle, each in its own process.

`python -m benchmarks.peers_curate --work DIR --peers PYTHON [--cells N]`

PYTHON is one with spatialdata-io and sopa. Ours is the whole stage, with all that it does more;
what a step of others does and does not is printed beside it. Ours and theirs take turns, and the
median of the rounds stands.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

from benchmarks.scale.__main__ import CONFIG, SEED
from benchmarks.scale.figures import CurationFigures
from pairing.simulate import SimulationParams, simulate

STEPS = Path(__file__).parent / "scale" / "peer_steps.py"
N_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Step:
    """What a step took; `n` cells, counts or tiles."""

    seconds: float
    peak_gib: float
    n: int


def their_step(python: str, *arguments: str) -> Step:
    """A step of others; memory is that of the process with all that it starts."""
    with subprocess.Popen([python, str(STEPS), *arguments], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        peak, tree = 0, psutil.Process(process.pid)
        while process.poll() is None:
            processes = [tree, *tree.children(recursive=True)]
            peak = max(peak, sum(_resident_bytes(p) for p in processes))
            time.sleep(0.1)
        told = process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    step = json.loads(told.splitlines()[-1])
    return Step(step["seconds"], peak / 2**30, step["n"])


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def our_stages(work: Path, section: Path) -> dict[str, Step]:
    """Cells and patches of a whole curation without H&E nuclei, in one process."""
    out = work / "out-peers"
    shutil.rmtree(out, ignore_errors=True)
    paths = {
        "out": out,
        "xenium": section / "outs",
        "slide": section / "he.ome.tif",
        "alignment": section / "he_imagealignment.csv",
    }
    texts = {key: json.dumps(str(path.resolve())) for key, path in paths.items()}
    config = CONFIG.format(refine="false", **texts)
    path, result = out.with_suffix(".toml"), out.with_suffix(".json")
    path.write_text(
        config.replace("[registration]", '[segmentation]\nmodel = "none"\n[registration]')
    )
    module = "benchmarks.scale.measure"
    argv = [sys.executable, "-m", module, str(path), str(result), "--what", "peers"]
    subprocess.run([*argv, "--workers", "1"], check=True, stdout=subprocess.DEVNULL)
    figures = CurationFigures.model_validate_json(result.read_bytes())
    shutil.rmtree(out)
    return {
        stage.stage: Step(stage.seconds, stage.driver_peak_bytes / 2**30, figures.n_cells)
        for stage in figures.stages
    }


def middle(steps: list[Step]) -> Step:
    return Step(median(s.seconds for s in steps), median(s.peak_gib for s in steps), steps[0].n)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peers", required=True, metavar="PYTHON")
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=N_ROUNDS)
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    section, store = work / f"section-{args.cells}", work / "peers.zarr"
    if not section.exists():
        simulate(section, SimulationParams(n_cells=args.cells, seed=SEED), os.cpu_count() or 1)
    outs, slide = str(section / "outs"), str(section / "he.ome.tif")
    alignment = str(section / "he_imagealignment.csv")

    def read() -> Step:
        shutil.rmtree(store, ignore_errors=True)
        return their_step(args.peers, "read", outs, str(store))

    theirs: dict[str, Callable[[], Step]] = {
        "spatialdata-io: the bundle read, and written as a store": read,
        "sopa: transcripts counted in the outlines of cells": lambda: their_step(
            args.peers, "aggregate", str(store)
        ),
        # It needs torch, which this Python has.
        "spatialdata: tiles of cells from the H&E": lambda: their_step(
            sys.executable, "tiles", outs, slide, alignment
        ),
    }
    taken: dict[str, list[Step]] = {}
    for _ in range(args.rounds):
        for stage, step in our_stages(work, section).items():
            taken.setdefault(f"cellpair: {stage}", []).append(step)
        for name, step_of in theirs.items():
            taken.setdefault(name, []).append(step_of())
    print(f"{args.cells:,} cells, median of {args.rounds} rounds; load {os.getloadavg()[0]:.1f}")
    print("\n| step | s | n | ms each | peak GiB |\n|---|---|---|---|---|")
    for name, steps in taken.items():
        s = middle(steps)
        each_ms = s.seconds / s.n * 1e3
        print(f"| {name} | {s.seconds:.1f} | {s.n:,} | {each_ms:.3f} | {s.peak_gib:.2f} |")
    shutil.rmtree(store)


if __name__ == "__main__":
    main()
