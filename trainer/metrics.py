"""What a run tells of itself: a line, a row of `metrics.csv` and TensorBoard at some steps."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import psutil
import torch
from torch.utils.tensorboard import SummaryWriter

from shards.order import Indices
from shards.stream import Stream

METRICS_FILE: Final = "metrics.csv"
COLUMNS: Final = (
    "step",
    "samples",
    "epoch",
    "loss",
    "pair_loss",
    "lr",
    "temperature",
    "grad_norm",
    "r1_image_to_genes",
    "r1_genes_to_image",
    "val_r5",
    "val_r5_image_to_genes",
    "val_r5_genes_to_image",
    "runs_per_batch",
    "effective_runs",
    "bad_samples",
    "samples_per_s",
    "data_wait_share",
    "memory_gib",
)
# What a resumed run need not repeat.
MEASURED: Final = frozenset({"samples_per_s", "data_wait_share", "memory_gib"})


class Metrics:
    """Rows of a run that goes on after `step`; those of steps that are done again are dropped."""

    def __init__(self, out: Path, step: int) -> None:
        self._path = out / METRICS_FILE
        kept: list[dict[str, str]] = []
        if step > 0 and self._path.exists():
            with self._path.open(newline="") as f:
                kept = [row for row in csv.DictReader(f) if int(row["step"]) <= step]
        with self._path.open("w", newline="") as f:
            writer = csv.DictWriter(f, COLUMNS, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self._restart()

    def _restart(self) -> None:
        self._from_s, self._samples, self._waited_s = time.monotonic(), 0, 0.0

    def count(self, n_samples: int, waited_s: float) -> None:
        """A step of so many samples, for whose data it stood still for so long."""
        self._samples += n_samples
        self._waited_s += waited_s

    def tell(self, row: dict[str, float], device: torch.device) -> None:
        """One row, with the speed since the last one."""
        seconds = time.monotonic() - self._from_s
        row |= {
            "samples_per_s": self._samples / seconds,
            "data_wait_share": self._waited_s / seconds,
            "memory_gib": _memory_gib(device),
        }
        with self._path.open("a", newline="") as f:
            csv.DictWriter(f, COLUMNS, restval="").writerow(row)
        for name, value in row.items():
            self._board.add_scalar(name, value, int(row["step"]))
        print(", ".join(f"{c} {row[c]:.4g}" for c in COLUMNS if c in row), flush=True)
        self._restart()

    def close(self) -> None:
        self._board.close()


def _memory_gib(device: torch.device) -> float:
    """The most the GPU ever held, or what this process holds where there is none."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) / 2**30)
    return float(psutil.Process().memory_info().rss / 2**30)


def runs_in_batch(stream: Stream, indices: Indices) -> dict[str, float]:
    """How many runs a batch mixes: distinct, and effective (the exponential of their entropy)."""
    _, n_R = np.unique(stream.run_of(indices), return_counts=True)
    share_R = n_R / n_R.sum()
    return {
        "runs_per_batch": float(len(n_R)),
        "effective_runs": float(np.exp(-(share_R * np.log(share_R)).sum())),
    }


def in_batch_r1(
    z_image_BD: torch.Tensor, z_gene_BD: torch.Tensor, weight_B: torch.Tensor
) -> dict[str, float]:
    """Share of this rank's pairs that each other's best match is, both ways."""
    similarity_BB = z_image_BD[weight_B > 0] @ z_gene_BD[weight_B > 0].T
    own_B = torch.arange(len(similarity_BB), device=similarity_BB.device)
    if not len(own_B):
        return {}
    return {
        "r1_image_to_genes": (similarity_BB.argmax(dim=1) == own_B).float().mean().item(),
        "r1_genes_to_image": (similarity_BB.argmax(dim=0) == own_B).float().mean().item(),
    }


class Clock:
    """Where a step's time goes, part by part; waits for the device at each end if `on`.

    A part inside another counts for itself alone.
    """

    def __init__(self, on: bool, device: torch.device) -> None:
        self._on, self._device = on, device
        self._spent_s: dict[str, float] = {}
        self._inner_s = [0.0]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started_s = self._now()
        self._inner_s.append(0.0)
        try:
            yield
        finally:
            seconds = self._now() - started_s
            self.add(name, seconds - self._inner_s.pop())
            self._inner_s[-1] += seconds

    def add(self, name: str, seconds: float) -> None:
        self._spent_s[name] = self._spent_s.get(name, 0.0) + seconds

    def restart(self) -> None:
        """Forget what was spent so far."""
        self._spent_s = {}

    def _now(self) -> float:
        if self._on and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def tell(self, n_steps: int) -> None:
        """A line a part: milliseconds a step, and share."""
        total_s = sum(self._spent_s.values())
        for name, seconds in sorted(self._spent_s.items(), key=lambda kv: -kv[1]):
            print(f"{name:24} {1000 * seconds / n_steps:9.1f} ms {seconds / total_s:6.1%}")
        print(f"{'a step':24} {1000 * total_s / n_steps:9.1f} ms", flush=True)
