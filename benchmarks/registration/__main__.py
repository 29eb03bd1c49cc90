"""Registration on pairs with known truth: every figure beside its limit; 1 where one isn't met.

python -m benchmarks.registration [part …] [--out DIR] [--seeds A:B] [--slide FILE=MPP …]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.registration import accuracy, bad_input, scale, wrong
from benchmarks.registration.derived import MPP, SLIDE, Picture
from benchmarks.registration.limits import Limits

PARTS = ("accuracy", "wrong", "scale", "bad_input")
ACCURACY_SEEDS, VERDICT_SEEDS = range(1, 21), range(5000, 5100)


def seeds_of(text: str) -> range:
    """`A:B` as half-open."""
    first, last = (int(n) for n in text.split(":"))
    if first >= last:
        raise ValueError(text)
    return range(first, last)


def picture_of(text: str) -> Picture:
    """`FILE=MPP`."""
    path, mpp = text.rsplit("=", 1)
    return Picture.read(Path(path), float(mpp))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="default: all")
    parser.add_argument("--out", type=Path, default=Path("build/registration"), help="made pairs")
    parser.add_argument(
        "--seeds", type=seeds_of, help="default: 1:21 for accuracy, 5000:5100 for the verdict"
    )
    parser.add_argument(
        "--slide",
        type=picture_of,
        action="append",
        metavar="FILE=MPP",
        help=f"real slides to derive pairs from; default: ../shared/data/{SLIDE}",
    )
    given = parser.parse_args()
    parts = given.parts or PARTS
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    limits = Limits()
    pairs: Path = given.out / "pairs"
    pairs.mkdir(parents=True, exist_ok=True)
    if "accuracy" in parts:
        pictures = given.slide or [Picture.read(Path("../shared/data") / SLIDE, MPP)]
        accuracy.run(pairs, given.seeds or ACCURACY_SEEDS, pictures, limits)
    if "wrong" in parts:
        wrong.run(pairs, given.seeds or VERDICT_SEEDS, limits)
    if "scale" in parts:
        scale.run(pairs, limits)
    if "bad_input" in parts:
        bad_input.run(pairs, (given.seeds or VERDICT_SEEDS)[0], limits)
    print("\nmet" if limits.met else "\nNOT MET")
    return 0 if limits.met else 1


if __name__ == "__main__":
    sys.exit(main())
