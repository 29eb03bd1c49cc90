"""Killed anywhere and gone on with, on other ranks too: the same steps on the same samples."""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from trainer.checkpoint import checkpoints, read_meta
from trainer.config import read_config
from trainer.metrics import MEASURED, METRICS_FILE
from trainer.train import train

from .conftest import PLAIN, write_config

_ENV = os.environ | {"OMP_NUM_THREADS": "1"}


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


def wait_for_step(process: subprocess.Popen[Any], out: Path, step: int) -> None:
    while not (rows := rows_of(out)) or int(rows[-1]["step"]) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def kill_all(process: subprocess.Popen[str]) -> None:
    """The process and whatever it started, at once."""
    own = psutil.Process(process.pid)
    for one in [own, *own.children(recursive=True)]:
        one.kill()
    process.communicate()


@pytest.mark.slow
def test_200_steps_equal_100_then_a_kill_then_100(tiny_dataset: Path, tmp_path: Path) -> None:
    # Checkpoints do not lie where it is killed: steps are done again, and told once.
    run, readers = {"checkpoint_every": 30}, {"workers": 1}
    before = set(_shared_memory())
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    train(read_config(write_config(tmp_path, tiny_dataset, "straight", 200, run=run)))
    config = write_config(tmp_path, tiny_dataset, "cut", 200, run=run, data_loading=readers)
    process = start(config)
    wait_for_step(process, cut, 100)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    _, left = psutil.wait_procs(children, timeout=20)
    assert not left
    assert set(_shared_memory()) <= before
    assert 0 < read_meta(checkpoints(cut / "checkpoints")[-1]).step < 200
    finish(start(config, "--resume"))

    assert [int(r["step"]) for r in rows_of(straight)] == list(range(1, 201))
    assert rows_of(cut) == rows_of(straight)
    ends = [checkpoints(out / "checkpoints")[-1] for out in (straight, cut)]
    assert read_meta(ends[0]).files["model.pt"] == read_meta(ends[1]).files["model.pt"]


def _shared_memory() -> list[str]:
    return os.listdir("/dev/shm") if Path("/dev/shm").exists() else []


@pytest.mark.slow
def test_ranks_and_readers_may_change(tiny_dataset: Path, tmp_path: Path) -> None:
    """The same batches, of which only the sums are made in another order."""

    def config(out: str, workers: int) -> Path:
        return write_config(
            tmp_path,
            tiny_dataset,
            out,
            9,
            model=PLAIN,
            data_loading={"workers": workers, "keep_counts": 1.0},
            run={"checkpoint_every": 3},
        )

    train(read_config(config("one", 0)))
    many = tmp_path / "many"
    for workers, ranks, step in ((1, 1, 3), (2, 2, 6)):
        process = start(config("many", workers), "--resume", ranks=ranks)
        wait_for_step(process, many, step)
        kill_all(process)
    finish(start(config("many", 3), "--resume"))

    for a, b in zip(rows_of(tmp_path / "one"), rows_of(many), strict=True):
        assert (a["step"], a["samples"], a["effective_runs"]) == (
            b["step"], b["samples"], b["effective_runs"],
        )  # fmt: skip
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=2e-4)


@pytest.mark.slow
def test_a_lost_rank_ends_the_others_with_what_was_done_saved(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_dataset, "run", 10**6, run={"checkpoint_every": 10**6})
    process = start(config, ranks=2)
    wait_for_step(process, tmp_path / "run", 3)
    (lost,) = [p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1"]
    lost.kill()
    told, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert read_meta(checkpoints(tmp_path / "run" / "checkpoints")[-1]).step >= 3, told
