"""The demo on this machine: its time and its figures, each beside the limit it must keep.

    python -m benchmarks.demo [--cells N]

Runs `cellpair demo` in an empty folder. Set-up is not timed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flows.demo import FIGURES_FILE, Figures
from shards.dataset import read_record

LIMIT_S = 600
MIN_CELLS = 3000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=7200)
    cells = parser.parse_args().cells
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        started_s = time.monotonic()
        command = [sys.executable, "-m", "flows.cli", "demo", str(out), "--cells", str(cells)]
        subprocess.run(command, check=True)
        wall_s = time.monotonic() - started_s
        figures = read_record(out / FIGURES_FILE, Figures)
    rows: list[tuple[str, float, str, float]] = [
        ("wall time, s", wall_s, "<=", LIMIT_S),
        ("pairs kept", figures.n_cells, ">=", MIN_CELLS),
    ]
    for (method, other), sign, limit in (
        (("model", "oracle"), ">=", 0.5),
        (("model", "ridge"), ">=", 1.3),
        (("ridge", "oracle"), "<", 0.6),
    ):
        for direction, ratio in figures.ratio(method, other).items():
            rows.append((f"{method} / {other}, {direction}", ratio, sign, limit))
    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    kept = {"<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b, "<": lambda a, b: a < b}
    met = True
    for name, value, sign, limit in rows:
        verdict = "kept" if kept[sign](value, limit) else "NOT KEPT"
        met &= verdict == "kept"
        print(f"{name:<36}{value:>10.3f}   {sign:>2} {limit:<8} {verdict}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
