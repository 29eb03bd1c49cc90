"""A small dataset with a val split, and a config that trains on it in seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.remote import Location
from shards.schema import Split
from tests.shards.tiny import write_tiny_dataset
from trainer.config import TrainConfig, read_config

TINY: dict[str, dict[str, Any]] = {
    "model": {
        "image": "test_resnet",
        "image_px": 32,
        "fov_um": "patch",
        "gene_hidden": [32],
        "embed_dim": 16,
    },
    "optim": {"warmup_steps": 2, "lr": 3e-3},
    "data_loading": {"batch_size": 48, "shift_um": 1.0, "workers": 0},
    "run": {"device": "cpu", "log_every": 1, "checkpoint_every": 4, "keep_checkpoints": 2},
}
# A network without batch statistics or chance, whose result does not depend on how a batch is cut.
PLAIN = {"image": "test_vit", "dropout": 0.0}

TinyConfig = Callable[..., TrainConfig]


def write_config(
    folder: Path, dataset: Location, out: str, steps: int, **sections: dict[str, Any]
) -> Path:
    """`folder/OUT.toml`: TINY with other values in its sections."""
    lines = ['preset = "small"', f'data = "{dataset}"']
    given = {"optim": {"steps": steps}, "run": {"out": out}}
    for name, values in ({"loss": {}} | TINY).items():
        merged = values | given.get(name, {}) | sections.get(name, {})
        lines += [f"[{name}]", *(f"{key} = {_inline(value)}" for key, value in merged.items())]
    path = folder / f"{out}.toml"
    path.write_text("\n".join(lines))
    return path


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_inline(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # Small tensors: more threads cost more than they bring, and the two cores are shared.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    donors: dict[str, Split] = {"D1": "train", "D2": "train", "D4": "val", "D3": "test"}
    return write_tiny_dataset(root, donors, n_per_donor=70)


@pytest.fixture
def tiny_config(tiny_dataset: Path, tmp_path: Path) -> TinyConfig:
    """Writes a config into the test's folder and reads it: `tiny_config(out="a", steps=6)`."""

    def write(*, out: str = "run", steps: int = 8, **sections: dict[str, Any]) -> TrainConfig:
        return read_config(write_config(tmp_path, tiny_dataset, out, steps, **sections))

    return write
