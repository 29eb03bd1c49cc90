"""What a step cannot use: bad samples left out and written down, and numbers that are not finite."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from shards.artifact import write_atomically
from shards.errors import BadInput
from shards.stream import Indices, Stream
from trainer.batch import Fault

BAD_SAMPLES_FOLDER: Final = "bad_samples"


def write_down(
    out: Path, rank: int, step: int, stream: Stream, faults: Sequence[Fault]
) -> None:
    """Add this rank's bad samples of a step to `out/bad_samples/rank-N.csv`: step, key, fault."""
    if not faults:
        return
    path = out / BAD_SAMPLES_FOLDER / f"rank-{rank}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = stream.keys([fault.index for fault in faults])
    with path.open("a", newline="") as f:
        rows = [[step, key, fault.message] for key, fault in zip(keys, faults, strict=True)]
        csv.writer(f).writerows(rows)


def too_many(out: Path, n_bad: int, n_allowed: int, faults: Sequence[Fault]) -> BadInput:
    """The error that ends a run with more bad samples than its config allows."""
    first = faults[0].message if faults else "none of them read by this process"
    return BadInput(
        "data_loading.max_bad_samples",
        expected=f"at most {n_allowed} samples that cannot be read",
        found=f"{n_bad}, written down in {out / BAD_SAMPLES_FOLDER}; {first}",
        remedy="fetch the shard again or curate the run again, then --resume; or allow so many",
    )


def not_finite(
    out: Path,
    rank: int,
    step: int,
    stream: Stream,
    index_B: Indices,
    z_B2D: torch.Tensor,
    loss: float,
    grad_norm: float,
) -> BadInput:
    """The error for a loss or gradient that is not a number.

    The keys of this rank's batch go to `out/not_finite/step-NNNNNN-rank-N.csv`, with whether both
    embeddings of each are finite.
    """
    finite_B = torch.isfinite(z_B2D).flatten(1).all(dim=1).tolist()
    own = [(int(i), bool(ok)) for i, ok in zip(index_B, finite_B, strict=True) if i >= 0]
    keys = stream.keys([i for i, _ in own])
    path = out / "not_finite" / f"step-{step:06d}-rank-{rank}.csv"
    lines = ["key,embeddings_finite", *(f"{k},{ok}" for k, (_, ok) in zip(keys, own, strict=True))]
    write_atomically(path, "\n".join([*lines, ""]).encode())
    guilty = [key for key, (_, ok) in zip(keys, own, strict=True) if not ok]
    return BadInput(
        f"step {step}",
        expected="a finite loss and gradient",
        found=f"loss {loss}, gradient norm {grad_norm}; {len(guilty)} of {len(own)} samples with "
        f"embeddings that are not, all named in {path}",
        remedy="the state before this step is saved: start a run with another run.out and a lower "
        "optim.lr from it with --init-from",
    )
