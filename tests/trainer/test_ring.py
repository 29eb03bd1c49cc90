"""Worker processes and the memory that they share: killed, outlived, kept small."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from shards.errors import BadInput
from shards.stream import read_stream
from shards.vocabulary import Vocabulary
from tests.trainer.batches import assert_same, copied
from trainer.batch import Batch
from trainer.config import PRESETS, DataLoadingConfig
from trainer.data import Loader, Step

ROOT = Path(__file__).resolve().parents[2]
CONFIG = DataLoadingConfig.model_validate(PRESETS["small"]["data_loading"])
SHM = Path("/dev/shm")


@pytest.fixture
def loader(tiny_dataset: Path) -> Loader:
    stream = read_stream([tiny_dataset], "train")
    return Loader(stream, Vocabulary.union(stream.panels))


@contextlib.contextmanager
def _training(loader: Loader, workers: int) -> Iterator[Iterator[Step]]:
    config = CONFIG.model_copy(update={"batch_size": 20, "micro_batch": 7, "workers": workers})
    with contextlib.closing(loader.training(loader.stream.order(3), 0, config)) as steps:
        yield steps


def _workers(parent: int) -> list[psutil.Process]:
    children = psutil.Process(parent).children()
    return [c for c in children if "trainer.worker" in c.cmdline()]


def _taken(steps: Iterator[Step], n: int) -> list[list[Batch]]:
    return [[copied(b) for b in step.chunks] for step in itertools.islice(steps, n)]


def test_a_killed_worker_is_replaced_and_the_sequence_unbroken(
    loader: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    with _training(loader, 0) as steps:
        want = _taken(steps, 12)
    with _training(loader, 2) as steps, caplog.at_level(logging.WARNING, "cellpair"):
        found = _taken(steps, 3)
        _workers(os.getpid())[0].kill()
        found += _taken(steps, 3)
        for worker in _workers(os.getpid()):
            worker.kill()
        found += _taken(steps, 6)
    for one, other in zip(itertools.chain(*found), itertools.chain(*want), strict=True):
        assert_same(one, other)
    assert "ended by signal 9: started again" in caplog.text
    assert _workers(os.getpid()) == []


def test_a_chunk_that_ends_worker_after_worker_ends_the_run(loader: Loader) -> None:
    over = threading.Event()

    def kill_all() -> None:
        while not over.wait(0.01):
            for worker in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "trainer.worker" in worker.cmdline():
                        worker.kill()

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with (
            _training(loader, 1) as steps,
            pytest.raises(RuntimeError, match="4 times on the same chunk, the last by signal 9"),
        ):
            next(steps)
    finally:
        over.set()
        killer.join()


_RUN = """
import sys
from pathlib import Path
from shards.stream import read_stream
from trainer.config import PRESETS, DataLoadingConfig
from trainer.data import Loader
from shards.vocabulary import Vocabulary

stream = read_stream([Path(sys.argv[1])], "train")
loader = Loader(stream, Vocabulary.union(stream.panels))
settings = {**PRESETS["small"]["data_loading"], "batch_size": 20, "workers": 2}
for step in loader.training(stream.order(0), 0, DataLoadingConfig.model_validate(settings)):
    print(step.positions.start, flush=True)
"""


@pytest.mark.skipif(not SHM.is_dir(), reason="needs a system with /dev/shm")
def test_a_killed_run_leaves_no_worker_and_no_shared_memory(tiny_dataset: Path) -> None:
    before = set(os.listdir(SHM))
    command = [sys.executable, "-c", _RUN, str(tiny_dataset)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as run:
        assert run.stdout is not None
        assert [run.stdout.readline() for _ in range(4)] == ["0\n", "20\n", "40\n", "60\n"]
        workers = _workers(run.pid)
        assert len(workers) == 2
        run.kill()
    deadline = time.monotonic() + 20
    while any(map(_lives, workers)) or set(os.listdir(SHM)) - before:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def test_workers_leave_stopping_to_the_run(loader: Loader) -> None:
    with _training(loader, 1) as steps:
        _taken(steps, 2)
        before = _workers(os.getpid())
        for number in (signal.SIGTERM, signal.SIGINT):
            before[0].send_signal(number)
        _taken(steps, 6)
        assert _workers(os.getpid()) == before


def test_bad_input_of_a_worker_is_the_run_s(loader: Loader, tmp_path: Path) -> None:
    in_the_way = tmp_path / "a file"
    in_the_way.touch()
    loader.stream.index_cache = in_the_way
    with _training(loader, 1) as steps, pytest.raises(BadInput, match="CELLPAIR_CACHE"):
        next(steps)


def test_memory_stays_flat_over_many_steps(loader: Loader) -> None:
    def rss() -> list[int]:
        return [p.memory_info().rss for p in (psutil.Process(), *_workers(os.getpid()))]

    with _training(loader, 1) as steps:
        for _ in itertools.islice(steps, 50):
            pass
        before = rss()
        for _ in itertools.islice(steps, 450):
            pass
        for mib in ((a - b) / 2**20 for a, b in zip(rss(), before, strict=True)):
            assert mib < 16


def test_what_a_worker_imports_is_light() -> None:
    script = "import sys, trainer.worker; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not {"torch", "pandas", "timm", "scipy"} & set(done.stdout.split())
