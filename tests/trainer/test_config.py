"""The config: presets, paths, and every fault at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.errors import BadInput, BadInputs
from trainer.config import PRESETS, TrainConfig, read_config


def test_a_preset_fills_the_rest_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text(
        'preset = "small"\ndata = ["a", "/b"]\n[optim]\nlr = 0.5\n'
        '[model]\nimage_weights = "w.pt"\n[run]\nout = "run"\n'
    )
    config = read_config(path)
    assert config.data == (tmp_path / "a", Path("/b"))
    assert config.run.out == tmp_path / "run"
    assert config.model.image_weights == tmp_path / "w.pt"
    assert config.optim.lr == 0.5
    assert config.optim.steps == PRESETS["small"]["optim"]["steps"]
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text(
        'preset = "small"\ndata = "a"\nextra = 1\n[optim]\nlr = -1\nwarmup = 3\n'
        "[loss]\ntemperature = 5\n"
    )
    with pytest.raises(BadInputs) as caught:
        read_config(path)
    told = str(caught.value)
    for key in ("extra", "optim.lr", "optim.warmup", "run.out", "loss"):
        assert f"{path}: {key}\n" in told
    assert len(caught.value.faults) == 5


def test_without_a_preset_every_value_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text('data = "a"\n[run]\nout = "run"\n')
    with pytest.raises(BadInputs, match=r"model[\s\S]*loss[\s\S]*optim"):
        read_config(path)


@pytest.mark.parametrize("preset", ["past", "default"])
def test_presets_to_come_are_refused(tmp_path: Path, preset: str) -> None:
    path = tmp_path / "train.toml"
    path.write_text(f'preset = "{preset}"\ndata = "a"\n')
    with pytest.raises(BadInput, match="not there yet"):
        read_config(path)


def test_what_is_no_config_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("data = [")
    with pytest.raises(BadInput, match="TOML"):
        read_config(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text('preset = "smal"\n')
    with pytest.raises(BadInput, match="'smal'"):
        read_config(tmp_path / "bad.toml")
