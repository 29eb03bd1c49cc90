"""Reading beside its limit, the decoder's own speed, on one core; 1 where the limit isn't met.

python -m benchmarks.loader [--out DIR] [--peers PYTHON]

Loaders that are none of the project's dependencies are measured where PYTHON has them: an
environment with the project's own packages and, installed into it, those that are named where they
are missing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles

from benchmarks.loader.contenders import CONTENDERS, LIMIT, PEERS
from benchmarks.loader.guarantees import LOADERS
from benchmarks.loader.samples import dataset
from benchmarks.loader.turns import Turn, in_pairs
from benchmarks.registration.limits import Limits
from shards.stream import read_stream

N_SAMPLES, N_SMALL = 20_480, 508
N_OF_A_SMALL_SHARD = 32  # webdataset needs a shard for every rank
N_OF_A_TURN, ROUNDS = 4096, 16
MIN_SHARE = 0.9


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/loader"), help="for the samples")
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON")
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    out = given.out.resolve()
    os.environ["CELLPAIR_CACHE"] = str(out / "cache")
    limits = Limits()
    _speeds(limits, dataset(out / "dataset", N_SAMPLES), given.peers)
    _guarantees(limits, dataset(out / "small", N_SMALL, N_OF_A_SMALL_SHARD), given.peers)
    return 0 if limits.met else 1


def _speeds(limits: Limits, root: Path, python: str) -> None:
    cores = os.sched_getaffinity(0)
    stream = read_stream([root], "train")
    stream.build_index()
    n_bytes = sum(shard.info.tar_bytes for shard in stream.shards)
    os.sched_setaffinity(0, {max(cores)})  # and with it all that is started from here
    pairs = in_pairs(root, python, N_OF_A_TURN, ROUNDS)
    os.sched_setaffinity(0, cores)
    limits.head(
        f"{len(stream):,} samples of {n_bytes / len(stream) / 1000:.1f} kB on one core, "
        "samples/s of processor time (of the clock)"
    )
    decoding = [limit for turns in pairs.values() for limit, _ in turns]
    limits.told("decoding alone, the limit", _rates(decoding))
    for name in CONTENDERS:
        if name not in pairs:
            if name != LIMIT:
                limits.told(name, f"not installed: {PEERS}")
            continue
        shares = [(own.n / own.cpu_s) / (lim.n / lim.cpu_s) for lim, own in pairs[name]]
        rates = _rates([own for _, own in pairs[name]])
        low, middle, high = quantiles(shares, n=4)
        told = f"{rates}; {middle:.3f} of the limit (quartiles {low:.3f} to {high:.3f})"
        limits.told(name, told)
        if name.startswith("ours"):
            limits.line(f"{name}, of the limit", middle, "≥", MIN_SHARE)


def _rates(turns: list[Turn]) -> str:
    """Samples per second of processor time, and of the clock."""
    cpu, wall = (
        median(turn.n / seconds for turn, seconds in zip(turns, all_s, strict=True))
        for all_s in ([t.cpu_s for t in turns], [t.wall_s for t in turns])
    )
    return f"{cpu:,.0f} ({wall:,.0f})"


def _guarantees(limits: Limits, root: Path, python: str) -> None:
    limits.head("an epoch on five ranks, and one that was stopped in the middle")
    for name in LOADERS:
        done = subprocess.run(
            [python, "-m", "benchmarks.loader.guarantees", name, str(root)],
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            limits.told(name, f"did not finish; if it is not installed: {PEERS}")
            continue
        once, resumed, other_workers = done.stdout.split("\n")
        limits.told(f"{name}: each sample once", once)
        limits.told(f"{name}: resumed exactly", resumed)
        limits.told(f"{name}: resumed exactly with 2 workers for 1", other_workers)
        if name == "ours":
            kept = [once, resumed, other_workers]
            limits.none("ours: not kept", [told for told in kept if told != "yes"], len(kept))


if __name__ == "__main__":
    sys.exit(main())
