"""The loop: it learns, it resumes to the last bit, it stops when told, it refuses what differs."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from shards.errors import BadInput
from tests.shards.tiny import write_tiny_dataset
from trainer.checkpoint import checkpoints, read_checkpoint_config, read_meta, read_model_state
from trainer.config import TrainConfig
from trainer.metrics import COLUMNS, MEASURED
from trainer.train import learning_rate, main, train

from .conftest import TinyConfig, write_config


def _rows(config: TrainConfig) -> list[dict[str, str]]:
    with (config.run.out / "metrics.csv").open(newline="") as f:
        return [{k: v for k, v in r.items() if k not in MEASURED} for r in csv.DictReader(f)]


def _folder(config: TrainConfig) -> Path:
    return config.run.out / "checkpoints"


class _AfterSteps:
    """Says stop at the end of the n-th step, as a signal would."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def test_interrupted_and_resumed_equals_straight_to_the_last_bit(tiny_config: TinyConfig) -> None:
    validated = {"validate_every": 4}
    straight = tiny_config(out="straight", run=validated)
    assert train(straight)
    cut = tiny_config(out="cut", run=validated)
    assert not train(cut, stop=_AfterSteps(3))
    assert not train(cut, resume=True, stop=_AfterSteps(2))
    assert train(cut, resume=True)

    assert [int(r["step"]) for r in _rows(straight)] == list(range(1, 9))
    assert _rows(cut) == _rows(straight)
    assert tuple(_rows(cut)[0]) == tuple(c for c in COLUMNS if c not in MEASURED)
    ends = [checkpoints(_folder(c))[-1] for c in (straight, cut)]
    assert [read_meta(e).cursor for e in ends] == [2 * 140 + 96] * 2
    one, other = (read_model_state(e) for e in ends)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_rows_after_the_checkpoint_are_written_once(tiny_config: TinyConfig) -> None:
    config = tiny_config()
    assert not train(config, stop=_AfterSteps(6))
    # As after a kill: the rows of steps 5 and 6 are there, their checkpoint is not.
    newest = checkpoints(_folder(config))[-1]
    (newest / "meta.json").unlink()
    assert train(config, resume=True)
    assert [int(r["step"]) for r in _rows(config)] == list(range(1, 9))


def test_readers_change_nothing(tiny_config: TinyConfig) -> None:
    ways = [
        tiny_config(out=f"way{i}", steps=4, data_loading=way)
        for i, way in enumerate(
            [{"workers": 0}, {"workers": 1}, {"workers": 3}, {"loader": "torch"}]
        )
    ]
    for config in ways:
        train(config)
        assert _rows(config) == _rows(ways[0])


def test_it_learns(tiny_config: TinyConfig) -> None:
    config = tiny_config(steps=40)
    train(config)
    loss = [float(r["loss"]) for r in _rows(config)]
    # Batches of 48 at chance: ln 48 = 3.87. Four types are all that the images tell.
    assert sum(loss[-6:]) / 6 < sum(loss[:6]) / 6 - 0.6


def test_kept_checkpoints_and_their_proof(tiny_config: TinyConfig) -> None:
    config = tiny_config(steps=12)
    train(config)
    assert [p.name for p in checkpoints(_folder(config))] == ["step-000008", "step-000012"]
    newest = checkpoints(_folder(config))[-1]
    assert read_meta(newest).step == 12
    model = newest / "model.pt"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(BadInput, match=r"model\.pt[\s\S]*sha256"):
        read_meta(newest)
    with pytest.raises(BadInput, match="a checkpoint"):
        read_meta(config.run.out)


def test_a_run_is_not_started_over_another(tiny_config: TinyConfig) -> None:
    config = tiny_config(steps=4)
    train(config)
    with pytest.raises(BadInput, match="--resume"):
        train(config)
    assert train(config, resume=True)  # done already


def test_another_config_or_dataset_is_refused_with_the_difference(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = tiny_config(steps=4)
    train(config)
    other_rate = tiny_config(steps=9, optim={"lr": 0.5})
    with pytest.raises(BadInput, match=r"optim.steps was 4, is 9; optim.lr was 0.003, is 0.5"):
        train(other_rate, resume=True)
    other = write_tiny_dataset(tmp_path / "other", n_per_donor=70, seed=9)
    with pytest.raises(BadInput, match="the samples were"):
        train(config.model_copy(update={"data": (other,)}), resume=True)


def test_validation_needs_a_val_split(tiny_config: TinyConfig, tmp_path: Path) -> None:
    other = write_tiny_dataset(tmp_path / "other", n_per_donor=70)
    config = tiny_config(run={"validate_every": 2}).model_copy(update={"data": (other,)})
    with pytest.raises(BadInput, match="64 samples in the val split"):
        train(config)


def test_pretrained_weights_are_taken_whole_or_refused(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    given = tiny_config(steps=3, model={"image_weights": str(weights)})
    assert train(given)
    torch.save(timm.create_model("test_convnext").state_dict(), weights)
    with pytest.raises(BadInput, match="weights of test_resnet"):
        train(tiny_config(out="elsewhere", model={"image_weights": str(weights)}))


def test_a_model_keeps_its_field_of_view(tiny_config: TinyConfig) -> None:
    config = tiny_config(steps=3)
    train(config)
    (newest, *_) = checkpoints(_folder(config))
    assert config.model.fov_um == "patch"
    assert read_checkpoint_config(newest).model.fov_um == 32.0
    wide = tiny_config(steps=3, model={"fov_um": 33.0})
    with pytest.raises(BadInput, match=r"model\.fov_um[\s\S]*32\.0 µm"):
        train(wide, resume=True)


def test_an_unknown_network_is_refused(tiny_config: TinyConfig) -> None:
    with pytest.raises(BadInput, match="resnet_of_tomorrow"):
        train(tiny_config(model={"image": "resnet_of_tomorrow"}))


def test_the_rate_warms_up_and_falls_to_nothing(tiny_config: TinyConfig) -> None:
    optim = tiny_config(steps=10).optim
    rates = [learning_rate(s, optim) / optim.lr for s in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(0.0)


def test_a_signal_saves_and_exits_3(tiny_dataset: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, tiny_dataset, "run", 100_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.train", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGUSR1)  # SIGTERM: test_faults.py
    _, told = process.communicate(timeout=120)
    assert process.returncode == 3, told
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert read_meta(newest).step >= 1


def test_bad_input_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        assert main([str(tmp_path / "none.toml")]) == 2
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert "no such file" in capsys.readouterr().err
