"""Many runs: what a curation costs that makes nothing, or one run, among them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.registration.limits import Limits
from pairing.simulate import SimulationParams, SlideParams, simulate

# As /usr/bin/time does, in the process itself: the peak is its own.
_CURATE = """
import resource, sys, time
from flows.cli import main
start_s = time.monotonic()
code = main(["curate", sys.argv[1], "--workers", "1", *sys.argv[2:]])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"FIGURES {time.monotonic() - start_s:.3f} {peak}")
sys.exit(code)
"""


def many_runs(folder: Path, n_runs: int, limits: Limits) -> None:
    """Curate a quarter of the runs, then all, each twice; the time by run must not grow."""
    slide = SlideParams(mpp=1.0)
    simulate(folder / "one", SimulationParams(n_cells=20, seed=1, slide=slide))
    for i in range(n_runs + 1):
        bundle = folder / "runs" / f"r{i:04d}"
        shutil.copytree(folder / "one" / "outs", bundle, copy_function=os.link)
        (bundle / "copy.txt").write_text(str(i))
    limits.head(f"{n_runs} small runs")
    by_run_s = {}
    for n in (n_runs // 4, n_runs):
        config = _config(folder, n)
        made_s, _ = _curate(config)
        limits.told(f"{n} runs: curating what is new, s", f"{made_s:.0f}")
        again_s, peak_bytes = _curate(config)
        by_run_s[n] = again_s / n
        limits.told(
            f"{n} runs: nothing new, s (ms a run; peak MiB)",
            f"{again_s:.1f} ({1000 * again_s / n:.0f}; {peak_bytes >> 20})",
        )
    one_s, peak_bytes = _curate(_config(folder, n_runs + 1))
    limits.told(f"one more than {n_runs}, s (peak MiB)", f"{one_s:.1f} ({peak_bytes >> 20})")
    growth = by_run_s[n_runs] / by_run_s[n_runs // 4]
    limits.line("time by run of four times as many, nothing new", growth, "≤", 1.5)


def _curate(config: Path) -> tuple[float, int]:
    """Seconds and bytes at the peak; the time of importing is not among them."""
    done = subprocess.run(
        [sys.executable, "-c", _CURATE, str(config)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (figures,) = [line for line in done.stdout.splitlines() if line.startswith("FIGURES")]
    _, seconds, peak_kib = figures.split()
    return float(seconds), int(peak_kib) << 10


def _config(folder: Path, n_runs: int) -> Path:
    lines = ['name = "many"\nout = "out"\n[patch]\nfov_um = 16\nsize_px = 16']
    lines += [
        f'[[runs]]\nid = "r{i:04d}"\nxenium = "runs/r{i:04d}"\nimage = "morphology"\n'
        f'donor = "donor {i}"'
        for i in range(n_runs)
    ]
    path = folder / "curate.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
