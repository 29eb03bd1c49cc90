"""What a step cannot use: bad samples, written down, and numbers that are not finite."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from shards.artifact import write_atomically
from shards.errors import BadInput
from shards.order import Indices
from shards.stream import Stream
from trainer.batch import Fault
from trainer.caching import Passed

BAD_SAMPLES_FOLDER: Final = "bad_samples"


def write_down(out: Path, rank: int, step: int, stream: Stream, faults: Sequence[Fault]) -> None:
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
    passed: Passed,
    found: str,
) -> BadInput:
    """The error for a loss or gradient that is not a number.

    The keys of this rank's batch go to `out/not_finite/step-NNNNNN-rank-N.csv`, with whether both
    embeddings of each are finite.
    """
    z_B2D = torch.cat([passed.z_image_BD, passed.z_gene_BD], dim=1)
    finite_B = torch.isfinite(z_B2D).all(dim=1).cpu().numpy()[index_B >= 0]
    keys = stream.keys(index_B[index_B >= 0].tolist())
    path = out / "not_finite" / f"step-{step:06d}-rank-{rank}.csv"
    lines = [f"{key},{ok}" for key, ok in zip(keys, finite_B, strict=True)]
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, "\n".join(["key,embeddings_finite", *lines, ""]).encode())
    return BadInput(
        f"step {step}",
        expected="a finite loss and gradient",
        found=f"{found}; {int((~finite_B).sum())} of {len(keys)} samples with embeddings that are "
        f"not, all named in {path}",
        remedy="the state before this step is saved: begin a run with another run.out and a lower "
        "optim.lr from it with --init-from",
    )
