"""Many runs: what a curation costs that makes nothing, or one run, among them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.registration.limits import Limits
from pairing.simulate import SimulationParams, SlideParams, simulate

# In a process of its own, whose peak is its own; without the pages, which are pictures: only those
# of new runs are drawn.
_CURATE = """
import resource, sys, time
from pathlib import Path
from flows import pipeline
from flows.cluster import BlockMap, Runtime
from flows.config import read_curate_config
start_s, start_cpu_s = time.monotonic(), time.process_time()
config = read_curate_config(Path(sys.argv[1]))
with BlockMap(Runtime(workers=1)) as blocks:
    curated = pipeline.curate(config, blocks)
assert len(curated.runs) == len(config.runs), curated.failures
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
wall_s, cpu_s = time.monotonic() - start_s, time.process_time() - start_cpu_s
print(f"FIGURES {wall_s:.3f} {cpu_s:.3f} {peak}")
"""


def many_runs(folder: Path, n_runs: int, limits: Limits) -> None:
    """Curate a quarter of the runs, then all, each twice; the time by run must not grow."""
    slide = SlideParams(mpp=1.0)
    simulate(folder / "one", SimulationParams(n_cells=20, seed=1, slide=slide))
    for i in range(n_runs + 1):
        bundle = folder / "runs" / f"r{i:04d}"
        shutil.copytree(folder / "one" / "outs", bundle, copy_function=os.link)
        (bundle / "copy.txt").write_text(str(i))
    limits.head(f"{n_runs} small runs: s (CPU, s; peak, MiB)")
    by_run_s = {}
    for n in (n_runs // 4, n_runs):
        config = _config(folder, n)
        limits.told(f"{n} runs, what is new of them", _curate(config).words)
        again = _curate(config)
        by_run_s[n] = again.cpu_s / n
        limits.told(f"{n} runs, nothing new", again.words)
    limits.told(f"one more than {n_runs}", _curate(_config(folder, n_runs + 1)).words)
    limits.told("CPU of a run among them with nothing new, ms", f"{1000 * by_run_s[n_runs]:.0f}")
    growth = by_run_s[n_runs] / by_run_s[n_runs // 4]
    limits.line("CPU by run, of all over that of a quarter, nothing new", growth, "≤", 1.5)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one curation in a process of its own, without importing what every one imports."""

    wall_s: float
    cpu_s: float
    peak_bytes: int

    @property
    def words(self) -> str:
        return f"{self.wall_s:.1f} ({self.cpu_s:.1f}; {self.peak_bytes >> 20})"


def _curate(config: Path) -> Cost:
    done = subprocess.run(
        [sys.executable, "-c", _CURATE, str(config)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (figures,) = [line for line in done.stdout.splitlines() if line.startswith("FIGURES")]
    _, wall_s, cpu_s, peak_kib = figures.split()
    return Cost(float(wall_s), float(cpu_s), int(peak_kib) << 10)


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
