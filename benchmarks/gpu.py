"""The trainer on one GPU: the step of preset `past`, batches larger than memory, and kills.

    benchmarks/gpu.sh

On a machine without a GPU the same is done with a tiny model, to prove that it works; its figures
say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.learning import Sections, toml
from benchmarks.loader.samples import N_GENES, dataset
from benchmarks.registration.limits import Limits
from trainer.config import TrainConfig, read_config
from trainer.genes import GeneInput
from trainer.model import PairModel

MAX_DATA_WAIT = 0.02
MAX_LOSS_OFF = 0.02  # of the loss itself: GPUs sum in no fixed order
N_KILLS = 3


@dataclass(frozen=True, slots=True)
class Size:
    """What fits ten minutes on a machine."""

    n_samples: int
    model: Sections
    # Global batch and rows at a time: gradient caching wherever they differ.
    batches: tuple[tuple[int, int], ...]
    n_steps: int  # of each, of which the first half warms up
    killed_batch: tuple[int, int]
    killed_steps: int
    matmul: int  # edge of the product that the peak is taken from


GPU = Size(
    n_samples=16_384,
    model={"model": {}},
    batches=((256, 256), (1920, 48), (1920, 240), (4096, 256), (8192, 256)),
    n_steps=8,
    killed_batch=(256, 256),
    killed_steps=60,
    matmul=8192,
)
CPU = Size(
    n_samples=512,
    model={
        "model": {
            "image": "test_vit",
            "image_options": {},
            "image_px": 32,
            "rank": {"width": 32, "depth": 1, "heads": 2, "feedforward": 64, "context": 50},
            "graph": {"hidden": 32},
        }
    },
    batches=((32, 32), (64, 16)),
    n_steps=8,
    killed_batch=(32, 32),
    killed_steps=40,
    matmul=1024,
)


def main() -> int:
    """0 if every limit is met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    on_gpu = torch.cuda.is_available()
    size, device = (GPU, torch.device("cuda")) if on_gpu else (CPU, torch.device("cpu"))
    limits = Limits()
    name = torch.cuda.get_device_name() if on_gpu else "no GPU: a tiny model, which proves nothing"
    peak = measured_peak(device, size.matmul)
    limits.head(f"preset past on {name}, torch {torch.__version__}")
    limits.told(f"a product of {size.matmul}³, bf16", f"{peak / 1e12:.3g} TFLOP/s")
    data = dataset(out / f"data-{size.n_samples}", size.n_samples)
    per_image = None
    for batch, rows in size.batches:
        run = out / f"run-{batch}-{rows}-{os.getpid()}"
        config = write_config(run, data, size, (batch, rows), size.n_steps)
        per_image = per_image or flops_of_a_pair(read_config(config))
        train(config)
        tell_speed(limits, (batch, rows), rows_of(run), per_image, peak)
    tell_kills(limits, out, data, size)
    limits.head("where a step's time goes")
    config = write_config(out / f"profile-{os.getpid()}", data, size, size.batches[0], 12)
    print(train(config, "--profile", "10"))
    return 0 if limits.met else 1


def measured_peak(device: torch.device, edge: int) -> float:
    """FLOP/s of a large product of random numbers."""
    a, b = (torch.randn(edge, edge, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    _wait(device)
    started_s = time.perf_counter()
    for _ in range(10):
        a @ b
    _wait(device)
    return float(10 * 2 * edge**3 / (time.perf_counter() - started_s))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def write_config(run: Path, data: Path, size: Size, batch: tuple[int, int], n_steps: int) -> Path:
    """The run's config: `past`, but for length, batch and, without a GPU, the model."""
    run.mkdir(parents=True, exist_ok=True)
    n_global, n_rows = batch
    sections: Sections = {
        **size.model,
        "optim": {"steps": n_steps, "warmup_steps": 1},
        "data_loading": {"batch_size": n_global, "micro_batch": n_rows, "workers": 4},
        "run": {
            "out": str(run / "model"),
            "log_every": 1,
            "checkpoint_every": max(1, n_steps // 6),
            "checkpoint_activations": n_rows > 128,
        },
    }
    path = run / "train.toml"
    path.write_text(toml(data.resolve(), "past", sections))
    return path


def flops_of_a_pair(config: TrainConfig) -> float:
    """Of forward and backward: the backward pass takes twice the forward one."""
    with torch.device("meta"):
        model = PairModel(N_GENES, 1, config.model, config.loss)
        px, k = config.model.image_px, config.model.neighbors_k
        genes = GeneInput(
            counts_BG=torch.zeros(1, N_GENES),
            measured_BG=torch.ones(1, N_GENES),
            species_B=torch.zeros(1, dtype=torch.int64),
            neighbor_counts_BKG=torch.zeros(1, k, N_GENES),
            present_BK=torch.ones(1, k, dtype=torch.bool),
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, px, px), genes)
    return 3.0 * counter.get_total_flops()


def train(config: Path, *words: str) -> str:
    """What a run that ends well prints."""
    command = [sys.executable, "-m", "trainer.train", str(config), *words]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def rows_of(run: Path) -> list[dict[str, str]]:
    path = run / "model" / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def tell_speed(
    limits: Limits, batch: tuple[int, int], rows: list[dict[str, str]], flops: float, peak: float
) -> None:
    """Of the second half of a run's steps."""
    steady = rows[len(rows) // 2 :]
    speed = statistics.median(float(row["samples_per_s"]) for row in steady)
    waited = statistics.mean(float(row["data_wait_share"]) for row in steady)
    memory_gib = float(rows[-1]["memory_gib"])
    n_global, n_rows = batch
    limits.told(
        f"batch {n_global} by {n_rows}",
        f"{speed:.0f} images/s, {speed * flops / peak:.1%} of that peak without what is computed "
        f"twice, {memory_gib:.1f} GiB",
    )
    limits.line(f"batch {n_global} by {n_rows}: share of time waiting for data", waited, "≤",
                MAX_DATA_WAIT)  # fmt: skip


def tell_kills(limits: Limits, out: Path, data: Path, size: Size) -> None:
    """A run that is killed three times ends where a quiet one does."""
    quiet, killed = (out / f"{name}-{os.getpid()}" for name in ("quiet", "killed"))
    train(write_config(quiet, data, size, size.killed_batch, size.killed_steps))
    config = write_config(killed, data, size, size.killed_batch, size.killed_steps)
    command = [sys.executable, "-m", "trainer.train", str(config), "--resume"]
    for k in range(1, N_KILLS + 1):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while len(rows_of(killed)) < k * size.killed_steps // (N_KILLS + 1):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended by itself")
            time.sleep(0.05)
        process.kill()
        process.wait()
    train(config, "--resume")
    ends = []
    for run in (quiet, killed):
        rows = rows_of(run)
        assert [int(row["step"]) for row in rows] == list(range(1, size.killed_steps + 1))
        ends.append(statistics.mean(float(row["loss"]) for row in rows[-5:]))
    limits.told(f"{size.killed_steps} steps, quiet and killed {N_KILLS} times",
                f"last losses {ends[0]:.5g} and {ends[1]:.5g}")  # fmt: skip
    limits.line("apart, of the loss", abs(ends[1] / ends[0] - 1), "≤", MAX_LOSS_OFF)


if __name__ == "__main__":
    sys.exit(main())
