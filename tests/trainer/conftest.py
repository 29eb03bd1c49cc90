"""A small dataset with a val split, and a config that trains on it in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.schema import Split
from tests.shards.tiny import write_tiny_dataset
from trainer.config import TrainConfig, read_config

TINY = """
preset = "small"
data = "{data}"
[model]
image = "test_resnet"
image_options = {{}}
image_px = 32
fov_um = "patch"
gene_hidden = [32]
embed_dim = 16
[optim]
steps = {steps}
warmup_steps = 2
lr = 3e-3
[data_loading]
batch_size = 48
shift_um = 1.0
[run]
out = "{out}"
device = "cpu"
log_every = 1
checkpoint_every = 4
keep_checkpoints = 2
"""

TinyConfig = Callable[..., TrainConfig]

# A network without batch statistics, whose result does not depend on how a batch is cut.
PLAIN = {"image": "test_vit", "image_px": 32, "dropout": 0.0}


def changed(config: TrainConfig, section: str, **values: Any) -> TrainConfig:
    """The config with other values in one of its sections."""
    part = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: part})


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

    def write(*, out: str = "run", steps: int = 8, more: str = "") -> TrainConfig:
        path = tmp_path / f"{out}.toml"
        path.write_text(TINY.format(data=tiny_dataset, out=out, steps=steps) + more)
        return read_config(path)

    return write
