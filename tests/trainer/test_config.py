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


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_is_a_whole_config(tmp_path: Path, preset: str) -> None:
    path = tmp_path / "train.toml"
    path.write_text(f'preset = "{preset}"\ndata = "a"\n[run]\nout = "run"\n')
    config = read_config(path)
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


def test_a_length_replaces_the_presets_and_none_stands_for_null(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text(
        'preset = "past"\ndata = "a"\n[run]\nout = "run"\n'
        '[optim]\nsteps = 50\nwarmup_steps = 5\n[model]\ngraph = "none"\nrank = { depth = 2 }\n'
        "image_options = { drop_rate = 0.1 }\n"
    )
    config = read_config(path)
    assert (config.optim.steps, config.optim.epochs) == (50, None)
    assert (config.optim.warmup_steps, config.optim.warmup_epochs) == (5, None)
    assert config.model.graph is None
    assert config.model.image_options == {"drop_rate": 0.1}
    assert config.model.rank is not None
    assert (config.model.rank.depth, config.model.rank.width) == (2, 512)
    path.write_text(
        'preset = "small"\ndata = "a"\n[run]\nout = "run"\n[optim]\nsteps = 5\nepochs = 2.0\n'
        'lr_min = 1.0\n[model]\ngenes = "rank"\n[loss]\nmasked_share = 0.2\n'
    )
    with pytest.raises(BadInputs) as caught:
        read_config(path)
    told = str(caught.value)
    for words in ("one of steps and epochs", "belongs to genes", "both 0 or both not"):
        assert words in told


def test_what_is_no_config_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("data = [")
    with pytest.raises(BadInput, match="TOML"):
        read_config(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text('preset = "smal"\n')
    with pytest.raises(BadInput, match="'smal'"):
        read_config(tmp_path / "bad.toml")
