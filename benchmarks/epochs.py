"""A million tiny samples through ten epochs: each once an epoch, in flat memory.

    python -m benchmarks.epochs [--out DIR] [--samples N] [--epochs N] [--reading global|block]

Runs are uneven. Memory is what the trainer's side and its reading process hold for themselves at
the end of each epoch: what they share, with each other and with others, does not grow.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import simplejpeg

from benchmarks.loader.corpus import plain_row, publish_runs
from benchmarks.registration.limits import Limits
from shards.schema import Gene, Panel, PatchSpec
from shards.stream import read_stream
from shards.vocabulary import Vocabulary
from shards.write import Sample, narrow_counts
from trainer.config import DataLoadingConfig
from trainer.data import Loader
from trainer.presets import PRESETS

PX = 16
PATCH = PatchSpec(image="he", fov_um=8.0, size_px=PX, center="nucleus", jpeg_quality=90)
N_GENES, GENES_OF_A_CELL, N_KINDS = 50, 6, 64
SHARES = (0.5, 0.25, 0.15, 0.07, 0.03)  # of the runs
BATCH = 1024
MAX_GROWTH = 1.05  # of memory, from the second epoch on: in the first, indices are mapped


def main() -> int:
    """0 if every limit is met, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/epochs"))
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--reading", choices=("global", "block"), default="global")
    given = parser.parse_args()
    out = given.out.resolve()
    os.environ["CELLPAIR_CACHE"] = str(out / "cache")
    panel = Panel.of("human", [Gene(symbol=f"G{i}", ensembl=None) for i in range(N_GENES)])
    sizes = [round(share * given.samples) for share in SHARES]
    root = publish_runs(out / f"data-{given.samples}", panel, PATCH, sizes, samples, 20_000)

    stream = read_stream([root], "train")
    loader = Loader(stream, Vocabulary.union(stream.panels))
    config = DataLoadingConfig.model_validate(
        PRESETS["small"]["data_loading"]
        | {"batch_size": BATCH, "workers": 1, "reading": given.reading, "cache_bytes": 256 << 20}
    )
    order = stream.order(0, reading=given.reading)
    limits = Limits()
    limits.head(f"{len(stream):,} samples of {PX} px in {len(SHARES)} runs, {given.reading}")
    memory_mib, wrong = [], []
    with closing(loader.training(order, 0, config)) as steps:
        for epoch in range(given.epochs):
            seen = np.zeros(len(stream), dtype=np.uint8)
            started_s, n_faults = time.monotonic(), 0
            for step in steps:
                for chunk in step.chunks:
                    np.add.at(seen, chunk.index_B, 1)
                    n_faults += len(chunk.faults)
                if step.positions.stop == (epoch + 1) * len(stream):
                    break
            seconds = time.monotonic() - started_s
            memory_mib.append(_memory_mib())
            if n_faults or not (seen == 1).all():
                wrong.append(f"epoch {epoch}")
            limits.told(
                f"epoch {epoch}",
                f"{len(stream) / seconds:,.0f} samples/s, {memory_mib[-1]:.0f} MiB",
            )
    limits.none("epochs in which a sample came not exactly once", wrong, given.epochs)
    if given.epochs > 2:
        growth = max(memory_mib[2:]) / memory_mib[1]
        limits.line("memory of the worst later epoch over the second", growth, "≤", MAX_GROWTH)
    return 0 if limits.met else 1


def samples(panel: Panel, donor: str, n: int, run: int) -> Iterator[Sample]:
    """Of a few kinds of noise: what is measured is reading."""
    rng = np.random.default_rng(run)
    kinds = [
        simplejpeg.encode_jpeg(rng.integers(0, 256, (PX, PX, 3), dtype=np.uint8), quality=90)
        for _ in range(N_KINDS)
    ]
    shuffled = rng.permuted(np.tile(np.arange(N_GENES), (N_KINDS, 1)), axis=1)
    genes = np.sort(shuffled[:, :GENES_OF_A_CELL])
    for i in range(n):
        kind = i % N_KINDS
        yield Sample(
            cell_id=f"c{i}",
            donor=donor,
            image_jpeg=kinds[kind],
            counts=narrow_counts(np.stack([genes[kind], genes[kind] + 1])),
            neighbors=None,
            row=plain_row(panel, PATCH, i, GENES_OF_A_CELL),
        )


def _memory_mib() -> float:
    own = psutil.Process()
    found: list[Any] = [own, *own.children(recursive=True)]
    held = [p.memory_info() for p in found]
    return float(sum(m.rss - m.shared for m in held) / 2**20)


if __name__ == "__main__":
    sys.exit(main())
