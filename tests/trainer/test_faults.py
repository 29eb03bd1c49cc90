"""What goes wrong in weeks of training: each with its words, and a state to go on from."""

from __future__ import annotations

import csv
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from shards.errors import BadInput
from shards.stream import read_stream
from tests.shards.tiny import write_tiny_dataset
from trainer.checkpoint import checkpoints, read_meta, read_part
from trainer.config import TrainConfig, read_config
from trainer.train import train

from .conftest import TinyConfig, write_config
from .test_exact import finish, rows_of, start, wait_for_step


@pytest.fixture
def own_dataset(tmp_path: Path) -> Path:
    """One that a test may damage."""
    return write_tiny_dataset(tmp_path / "data", {"D1": "train", "D2": "train"}, n_per_donor=70)


def _config(folder: Path, dataset: Path, steps: int, **sections: dict[str, Any]) -> TrainConfig:
    return read_config(write_config(folder, dataset, "run", steps, **sections))


def _damage(dataset: Path, *indices: int) -> list[str]:
    """Flip a byte in the middle of the images of these samples; returns their keys."""
    stream = read_stream([dataset], "train")
    for pair in stream.read(list(indices)):
        for shard in stream.shards:
            content = bytearray(shard.tar.read_bytes())
            place = content.find(bytes(pair.jpeg))
            if place >= 0:
                content[place + len(pair.jpeg) // 2] ^= 0xFF
                shard.tar.write_bytes(content)
    return stream.keys(list(indices))


def _last(out: Path) -> int:
    return read_meta(checkpoints(out / "checkpoints")[-1]).step


def test_a_damaged_sample_stops_the_run_where_it_is_and_mended_it_goes_on(
    own_dataset: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(own_dataset, whole)
    straight = _config(tmp_path, whole, 6)
    train(straight)
    straight.run.out.rename(tmp_path / "straight")
    config = _config(tmp_path, own_dataset, 6, run={"checkpoint_every": 1000})
    assert not train(config, stop=lambda: True)
    # One that comes in the second step or the third, and the first one is done.
    stream = read_stream([own_dataset], "train")
    (late,) = stream.order(config.run.seed).batch(range(100, 101))
    (key,) = _damage(own_dataset, int(late))
    for _ in range(2):
        with pytest.raises(BadInput, match=rf"at most 0 samples[\s\S]*{key}[\s\S]*crc32"):
            train(config, resume=True)
    assert _last(config.run.out) == 2
    shutil.rmtree(own_dataset)
    whole.rename(own_dataset)
    assert train(config, resume=True)
    assert rows_of(config.run.out) == rows_of(tmp_path / "straight")


def test_so_many_bad_samples_are_left_out_written_down_and_counted(
    own_dataset: Path, tmp_path: Path
) -> None:
    keys = _damage(own_dataset, 5, 77)
    config = _config(tmp_path, own_dataset, 3, data_loading={"max_bad_samples": 2, "workers": 1})
    assert train(config)
    assert rows_of(config.run.out)[-1]["bad_samples"] == "2"
    assert rows_of(config.run.out)[-1]["samples"] == "140"
    with (config.run.out / "bad_samples" / "rank-0.csv").open(newline="") as f:
        written = list(csv.reader(f))
    assert sorted(row[1] for row in written) == sorted(keys)
    assert all("crc32" in row[2] for row in written)
    assert read_meta(checkpoints(config.run.out / "checkpoints")[-1]).n_bad_samples == 2


def test_numbers_that_are_none_are_told_with_the_keys_and_the_state_before_them(
    tiny_config: TinyConfig,
) -> None:
    config = tiny_config(
        steps=9, optim={"lr": 1e30, "warmup_steps": 0}, run={"checkpoint_every": 99}
    )
    with pytest.raises(BadInput, match=r"a finite loss[\s\S]*--init-from"):
        train(config)
    step = _last(config.run.out)
    assert 1 <= step < 9
    (path,) = (config.run.out / "not_finite").iterdir()
    assert path.name == f"step-{step:06d}-rank-0.csv"
    with path.open(newline="") as f:
        told = list(csv.DictReader(f))
    keys = set(read_stream(config.data, "train").table(["key"])["key"].to_pylist())
    assert {row["key"] for row in told} <= keys
    assert any(row["embeddings_finite"] == "False" for row in told)
    saved = read_part(checkpoints(config.run.out / "checkpoints")[-1], "model")
    assert all(values.isfinite().all() for values in saved.values())


@pytest.mark.slow
def test_a_full_disk_loses_nothing_that_was_saved(tiny_dataset: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, tiny_dataset, "run", 10**6, run={"checkpoint_every": 5})
    out = tmp_path / "run"
    process = start(path)
    wait_for_step(process, out, 8)
    # As a disk that is full: nothing grows beyond what a line of metrics needs.
    psutil.Process(process.pid).rlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 1, told
    assert "File too large" in told
    assert "--resume" in told
    step = _last(out)
    assert step >= 5
    assert not list((out / "checkpoints").glob(".*"))
    process = start(path, "--resume")
    assert process.stdout is not None
    assert any(line.startswith(f"step {step + 1},") for line in process.stdout)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 3


def test_a_shard_that_is_gone_or_a_manifest_that_was_edited_is_told_and_put_back_goes_on(
    own_dataset: Path, tmp_path: Path
) -> None:
    config = _config(tmp_path, own_dataset, 8)
    assert not train(config, stop=lambda: True)
    shard = read_stream([own_dataset], "train").shards[1]
    elsewhere = shard.tar.rename(tmp_path / "elsewhere.tar")
    with pytest.raises(BadInput, match=rf"{shard.tar.name}[\s\S]*no such file"):
        train(config, resume=True)
    elsewhere.rename(shard.tar)
    manifest = shard.tar.parent / "manifest.json"
    before = manifest.read_text()
    manifest.write_text(before.replace('"tissue": "test"', '"tissue": "other"'))
    with pytest.raises(BadInput, match="the manifest that the dataset names"):
        train(config, resume=True)
    manifest.write_text(before)
    assert train(config, resume=True)


def test_a_reader_that_is_killed_is_replaced(tiny_dataset: Path, tmp_path: Path) -> None:
    train(read_config(write_config(tmp_path, tiny_dataset, "quiet", 40)))
    path = write_config(tmp_path, tiny_dataset, "run", 40, data_loading={"workers": 2})
    process = start(path)
    wait_for_step(process, tmp_path / "run", 3)
    readers = [p for p in psutil.Process(process.pid).children() if "trainer.worker" in p.cmdline()]
    assert len(readers) == 2
    readers[0].kill()
    finish(process)
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "quiet")


def test_the_trainer_ends_with_the_command_that_started_it(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    path = write_config(tmp_path, tiny_dataset, "run", 10**6, run={"checkpoint_every": 10**6})
    command = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "train", str(path)], stdout=subprocess.DEVNULL
    )
    wait_for_step(command, tmp_path / "run", 2)
    (trainer,) = psutil.Process(command.pid).children()
    command.kill()
    command.wait()
    psutil.wait_procs([trainer], timeout=60)
    assert not trainer.is_running()
    assert _last(tmp_path / "run") >= 2
