"""What nuclei at slide scale cost: every figure beside its limit; 1 where one isn't met.

python -m benchmarks.segmentation [cost] [memory] [peers] [--out DIR]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.registration.limits import Limits
from benchmarks.segmentation import cost, peers

PARTS = {"cost": cost.measure, "memory": cost.measure_memory, "peers": peers.measure}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="default: all")
    parser.add_argument("--out", type=Path, default=Path("build/segmentation"), help="for slides")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    limits = Limits()
    for part in given.parts or PARTS:
        PARTS[part](limits, given.out)
    return 0 if limits.met else 1


if __name__ == "__main__":
    sys.exit(main())
