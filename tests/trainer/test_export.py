"""The tower that leaves a checkpoint is the tower that was in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import timm
import torch

from shards.errors import BadInput
from shards.vocabulary import Vocabulary
from trainer.checkpoint import (
    CheckpointWriter,
    TrainState,
    checkpoints,
    read_checkpoint_config,
)
from trainer.export import export_image_tower, main
from trainer.model import PairModel
from trainer.towers import ImageTower

from .conftest import TinyConfig


@pytest.fixture
def checkpoint(tiny_config: TinyConfig, tmp_path: Path) -> tuple[Path, PairModel]:
    config = tiny_config()
    changes = {"image": "test_vit", "image_options": {"init_values": 1e-3}, "fov_um": 24.0}
    config = config.model_copy(update={"model": config.model.model_copy(update=changes)})
    torch.manual_seed(3)
    model = PairModel(5, 1, config.model, config.loss).eval()
    folder, parts = tmp_path / "checkpoints", {"model": model.state_dict()}
    nothing = Vocabulary(genes=())
    with CheckpointWriter(folder, keep=1) as writer:
        writer.save(TrainState(12, 576, 0, "0" * 64, None, parts, config, nothing))
    return checkpoints(folder)[0], model


def _images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_timm_and_a_new_run_load_it_and_give_the_same_features(
    checkpoint: tuple[Path, PairModel], tmp_path: Path, suffix: str
) -> None:
    folder, model = checkpoint
    out = tmp_path / f"tower{suffix}"
    assert main([str(folder), "--out", str(out)]) == 0
    if suffix == ".pt":
        told = json.loads(out.with_suffix(".json").read_text())
        state = torch.load(out, weights_only=True)
    else:
        with safetensors.safe_open(out, "pt") as opened:
            told = {key: json.loads(value) for key, value in opened.metadata().items()}
        state = safetensors.torch.load_file(out)
    assert told["image_px"] == 32
    assert told["fov_um"] == 24.0
    assert told["step"] == 12

    size = {"img_size": told["image_px"]}
    network = timm.create_model(told["architecture"], num_classes=0, **told["options"], **size)
    network.load_state_dict(state)
    mean, std = (torch.tensor(told[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    want = model.image(_images())
    torch.testing.assert_close(network.eval()((_images() - mean) / std), want)

    fresh = ImageTower(read_checkpoint_config(folder).model).eval()
    fresh.load(out)
    torch.testing.assert_close(fresh(_images()), want)


def test_what_cannot_be_written_or_read_is_refused(
    checkpoint: tuple[Path, PairModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = checkpoint
    with pytest.raises(BadInput, match=r"\.safetensors or \.pt"):
        export_image_tower(folder, tmp_path / "tower.bin")
    assert main([str(tmp_path), "--out", str(tmp_path / "tower.pt")]) == 2
    assert "a checkpoint" in capsys.readouterr().err
    (folder / "model.pt").write_bytes(b"cut")
    with pytest.raises(BadInput, match="sha256"):
        export_image_tower(folder, tmp_path / "tower.pt")
    assert not (tmp_path / "tower.pt").exists()
