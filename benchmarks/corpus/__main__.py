"""A corpus that is composed, grows, is held out of and withdrawn from, beside what is expected.

    python -m benchmarks.corpus [--cells N] [--many N] [--folder DIR]

Simulates 12 runs of `--cells` cells and a 13th, and curates them; then `--many` runs of one small
bundle each, for the time that a curation takes which makes nothing, or one run, among many. Prints
each figure beside its limit; fails where one is not met. Times have no limit but in proportion.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.corpus.many import many_runs
from benchmarks.corpus.story import corpus
from benchmarks.registration.limits import Limits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=150)
    parser.add_argument("--many", type=int, default=200)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    limits = Limits()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        corpus(folder / "corpus", args.cells, limits)
        if args.many:
            many_runs(folder / "many", args.many, limits)
        print(f"\nload {os.getloadavg()[0]:.1f}")
    return 0 if limits.met else 1


if __name__ == "__main__":
    sys.exit(main())
