"""The time of `make test` after set-up, beside its limit.

python -m benchmarks.suite
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

LIMIT_S = 900


def main() -> int:
    subprocess.run(["make", "setup"], check=True)
    started_s = time.monotonic()
    code = subprocess.run(["make", "test"], check=False).returncode
    wall_s = time.monotonic() - started_s
    verdict = "kept" if wall_s <= LIMIT_S else "NOT KEPT"
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"make test: exit {code}, {wall_s:.0f} s <= {LIMIT_S} s {verdict}")
    return code


if __name__ == "__main__":
    sys.exit(main())
