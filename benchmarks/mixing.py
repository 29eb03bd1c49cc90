"""How many runs a batch mixes, by order, beside ideal mixing and what webdataset reads.

    python -m benchmarks.mixing

500 runs of uneven size, some ten million samples. Ideal is to draw each sample of a batch from all
samples. Effective runs are the exponential of the entropy of their shares. webdataset here is its
usual pipeline in arithmetic alone: shards in shuffled order for each of its workers, a shuffle
buffer in each, samples taken from the workers in turn.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import chain, islice

import numpy as np
import numpy.typing as npt

from benchmarks.registration.limits import Limits
from shards.order import Balanced, Blocks, Indices, Order, Shuffled

N_RUNS, SHARD, BATCH, N_BATCHES = 500, 5000, 4096, 40
# Pieces and their samples: those of the presets, and larger and smaller reads of as much memory.
BLOCKS = ((512, 256), (256, 512), (1024, 128))
WORKERS, BUFFER = 32, 5000

Runs = npt.NDArray[np.int64]


def main() -> int:
    """0: there is no limit, these are figures to choose by."""
    rng = np.random.default_rng(0)
    sizes = np.maximum(500, rng.lognormal(np.log(15_000), 0.8, N_RUNS).astype(np.int64))
    shards = [
        (run, min(SHARD, int(n) - start))
        for run, n in enumerate(sizes)
        for start in range(0, int(n), SHARD)
    ]
    run_of_part = [run for run, _ in shards]
    part_sizes = [n for _, n in shards]
    orders: dict[str, Order] = {
        "shuffled": Shuffled(int(sizes.sum()), 0, "mixing"),
        "balanced": Balanced(sizes, 0, "mixing"),
    }
    for pieces, piece_samples in BLOCKS:
        for balanced in (False, True):
            name = f"blocks of {pieces} pieces of {piece_samples}{', balanced' * balanced}"
            orders[name] = Blocks(
                part_sizes,
                run_of_part,
                0,
                "mixing",
                pieces=pieces,
                piece_samples=piece_samples,
                balanced=balanced,
            )
    limits = Limits()
    limits.head(f"{sizes.sum():,} samples of {N_RUNS} runs in batches of {BATCH}")
    ends = np.cumsum(sizes)
    share = sizes / sizes.sum()
    drawn = [rng.choice(N_RUNS, BATCH, p=share) for _ in range(N_BATCHES)]
    ideal = _told(limits, "ideal: each drawn from all", drawn)
    for name, order in orders.items():
        started_s = time.perf_counter()
        batches = [order.batch(range(i * BATCH, (i + 1) * BATCH)) for i in range(N_BATCHES)]
        ms = 1000 * (time.perf_counter() - started_s) / N_BATCHES
        runs = [np.searchsorted(ends, batch, side="right") for batch in batches]
        _told(limits, f"{name}, {ms:.1f} ms a batch", runs, ideal)
    name = f"webdataset, {WORKERS} workers, buffers of {BUFFER}"
    _told(limits, name, _webdataset(shards, rng), ideal)
    return 0


def _told(limits: Limits, name: str, batches: list[Runs], ideal: float | None = None) -> float:
    """Mean effective runs of the batches; both kinds are printed, and the share of `ideal`."""
    distinct, effective = [], []
    for runs in batches:
        _, n_R = np.unique(runs, return_counts=True)
        share_R = n_R / n_R.sum()
        distinct.append(len(n_R))
        effective.append(np.exp(-(share_R * np.log(share_R)).sum()))
    told = f"{np.mean(distinct):.0f} distinct, {np.mean(effective):.0f} effective runs"
    if ideal is not None:
        told += f", {np.mean(effective) / ideal:.2f} of ideal"
    limits.told(name, told)
    return float(np.mean(effective))


def _webdataset(shards: list[tuple[int, int]], rng: np.random.Generator) -> list[Indices]:
    """Runs of the samples in each batch, as a loader of workers with buffers gives them."""
    order = rng.permutation(len(shards))

    def worker(w: int) -> Iterator[int]:
        coming = chain.from_iterable([shards[s][0]] * shards[s][1] for s in order[w::WORKERS])
        buffer = list(islice(coming, BUFFER))
        for run in coming:
            at = int(rng.integers(len(buffer)))
            yield buffer[at]
            buffer[at] = run

    workers = [worker(w) for w in range(WORKERS)]
    return [
        np.array([next(workers[i % WORKERS]) for i in range(BATCH)], dtype=np.int64)
        for _ in range(N_BATCHES)
    ]


if __name__ == "__main__":
    sys.exit(main())
