"""Killed anywhere and gone on with, on other ranks too: the same steps on the same samples."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trainer.checkpoint import checkpoints, read_meta
from trainer.metrics import MEASURED, METRICS_FILE

from .conftest import TINY

_ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def write_config(folder: Path, dataset: Path, out: str, steps: int, more: str = "") -> Path:
    path = folder / f"{out}.toml"
    path.write_text(TINY.format(data=dataset, out=out, steps=steps) + more)
    return path


def start(*words: str | Path, ranks: int = 1) -> subprocess.Popen[str]:
    """`python -m trainer.train WORDS`, on so many ranks, each a process of this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    alone = [sys.executable, "-m", "trainer.train"]
    together = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
        *("--master-addr", "127.0.0.1", "--master-port", port, "-m", "trainer.train"),
    ]
    return subprocess.Popen(
        [*(alone if ranks == 1 else together), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_ENV,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed, once it ended well."""
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told
    return told


def rows_of(out: Path) -> list[dict[str, str]]:
    path = out / METRICS_FILE
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return [{k: v for k, v in r.items() if k not in MEASURED} for r in csv.DictReader(f)]


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    while not (rows := rows_of(out)) or int(rows[-1]["step"]) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def kill_all(process: subprocess.Popen[str]) -> None:
    """The process and whatever it started, at once."""
    own = psutil.Process(process.pid)
    for one in [own, *own.children(recursive=True)]:
        one.kill()
    process.communicate()


def test_200_steps_equal_100_then_a_kill_then_100(tiny_dataset: Path, tmp_path: Path) -> None:
    # Checkpoints do not lie where it is killed: steps are done again, and told once.
    more = "checkpoint_every = 30\n"
    before = set(os.listdir("/dev/shm")) if Path("/dev/shm").exists() else set()
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    finish(start(write_config(tmp_path, tiny_dataset, "straight", 200, more)))
    config = write_config(tmp_path, tiny_dataset, "cut", 200, more)
    process = start(config)
    wait_for_step(process, cut, 100)
    own = psutil.Process(process.pid)
    readers = own.children(recursive=True)
    os.kill(process.pid, 9)
    process.communicate()
    _, left = psutil.wait_procs(readers, timeout=20)
    assert not left
    if Path("/dev/shm").exists():
        assert set(os.listdir("/dev/shm")) <= before
    assert 0 < read_meta(checkpoints(cut / "checkpoints")[-1]).step < 200
    finish(start(config, "--resume"))

    assert [int(r["step"]) for r in rows_of(straight)] == list(range(1, 201))
    assert rows_of(cut) == rows_of(straight)
    ends = [checkpoints(out / "checkpoints")[-1] for out in (straight, cut)]
    assert read_meta(ends[0]).files["model.pt"] == read_meta(ends[1]).files["model.pt"]


def test_ranks_and_readers_may_change(tiny_dataset: Path, tmp_path: Path) -> None:
    """A network without batch statistics or dropout: only the order of sums differs."""
    plain = ['image = "test_vit"', "image_px = 32", "dropout = 0.0"]

    def config(out: str, steps: int, workers: int) -> Path:
        path = write_config(tmp_path, tiny_dataset, out, 9)
        text = path.read_text()
        text = text.replace('image = "test_resnet"', "\n".join(plain)).replace(
            "image_px = 32\nfov_um", "fov_um"
        )
        text = text.replace("batch_size = 48", f"batch_size = 48\nworkers = {workers}")
        path.write_text(text)
        return path

    finish(start(config("one", 9, 1)))
    parts = config("many", 9, 1)
    parts.write_text(parts.read_text().replace("checkpoint_every = 4", "checkpoint_every = 3"))
    process = start(parts)
    wait_for_step(process, tmp_path / "many", 3)
    kill_all(process)
    config_two = parts.read_text().replace("workers = 1", "workers = 2")
    parts.write_text(config_two)
    process = start(parts, "--resume", ranks=2)
    wait_for_step(process, tmp_path / "many", 6)
    kill_all(process)
    parts.write_text(config_two.replace("workers = 2", "workers = 3"))
    finish(start(parts, "--resume"))

    one, many = rows_of(tmp_path / "one"), rows_of(tmp_path / "many")
    assert [r["samples"] for r in many] == [r["samples"] for r in one]
    for a, b in zip(one, many, strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=2e-4)
        assert b["runs_per_batch"] == a["runs_per_batch"]


def test_a_lost_rank_ends_the_others_with_what_was_done_saved(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_dataset, "run", 100_000, "checkpoint_every = 100000\n")
    process = start(config, ranks=2)
    wait_for_step(process, tmp_path / "run", 3)
    ranks = [
        p
        for p in psutil.Process(process.pid).children()
        if "trainer.train" in " ".join(p.cmdline()) and p.environ().get("RANK") == "1"
    ]
    assert len(ranks) == 1
    ranks[0].kill()
    told, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert read_meta(newest).step >= 3, told
