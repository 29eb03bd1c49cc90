"""The block map on clusters that others start, where workers come, go and are killed."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from flows import cluster, transient, workers
from flows.cluster import BlockMap, Runtime
from flows.workers import Crew
from segmentation.maps import Tasks

PATIENCE_S = 180.0


def slept(folder: Path, seconds: float, item: int) -> tuple[int, int]:
    """An item after some time, and the process that it was slept in; tells that it was begun.

    Where a file `enough` lies beside the folder, at once.
    """
    (folder / f"{item}-{os.getpid()}-{time.time_ns()}").touch()
    if not folder.with_name("enough").exists():
        time.sleep(seconds)
    return item, os.getpid()


def begun_in(folder: Path) -> set[int]:
    """Processes in which a block has been begun."""
    return {int(name.split("-")[1]) for name in os.listdir(folder)}


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transient, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(cluster, "_LOOK_EVERY_S", 0.2)
    monkeypatch.setattr(workers, "_ASK_EVERY_S", 0.1)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    folder = tmp_path / "begun"
    folder.mkdir()
    return folder


class Commands:
    """`dask scheduler` and `dask worker` as a cluster's own scripts start them."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._file = folder / "scheduler.json"
        self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        wait_until(self._file.exists)

    @property
    def address(self) -> str:
        with Client(scheduler_file=str(self._file)) as client:
            return str(client.scheduler.address)

    def worker(self) -> subprocess.Popen[bytes]:
        return self._start(
            "worker", "--nthreads", "1", "--no-nanny", "--no-dashboard",
            "--local-directory", str(self._folder),
        )  # fmt: skip

    def _start(self, kind: str, *options: str) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "dask", kind, "--scheduler-file", str(self._file), *options]
        log = self._stack.enter_context((self._folder / f"{kind}.log").open("ab"))
        process = subprocess.Popen(argv, stdout=log, stderr=log)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    with contextlib.ExitStack() as stack:
        yield Commands(tmp_path, stack)


def test_workers_join_late_and_are_killed(
    commands: Commands, begun: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="cellpair")
    with (
        BlockMap(Runtime(scheduler=commands.address)) as blocks,
        ThreadPoolExecutor(1) as aside,
    ):
        done = aside.submit(lambda: list(blocks(partial(slept, begun, 0.5), list(range(200)))))
        wait_until(lambda: "no worker is there: waiting until one is" in caplog.text)
        first = commands.worker()
        wait_until(lambda: len(begun_in(begun)) == 1)
        assert "workers are there: 1 threads" in caplog.text
        second = commands.worker()
        wait_until(lambda: len(begun_in(begun)) == 2)
        os.kill(first.pid, signal.SIGKILL)
        begun.with_name("enough").touch()
        items, processes = zip(*done.result(PATIENCE_S), strict=True)
    assert sorted(items) == list(range(200))
    assert set(processes) <= {first.pid, second.pid}
    assert second.pid in processes


def test_a_cluster_grows_by_demand_and_shrinks_in_the_middle(begun: Path) -> None:
    with (
        LocalCluster(n_workers=0, processes=False, threads_per_worker=1, dashboard_address=None) as
        local,
        BlockMap(Runtime(scheduler=local.scheduler_address)) as blocks,
    ):  # fmt: skip
        adaptive = local.adapt(
            minimum=0, maximum=3, interval="100ms", target_duration="1s", wait_count=2
        )
        grown = blocks(partial(slept, begun, 0.05), list(range(150)))
        n_workers = [len(local.scheduler.workers) for _ in grown]
        assert (len(n_workers), max(n_workers)) == (150, 3)
        wait_until(lambda: not local.scheduler.workers)
        # From none again; and told to shrink while blocks are under way.
        adaptive.stop()
        local.scale(3)
        done = []
        for item, _ in blocks(partial(slept, begun, 0.02), list(range(90))):
            done.append(item)
            if len(done) == 30:
                local.scale(1)
        assert sorted(done) == list(range(90))
        wait_until(lambda: len(local.scheduler.workers) == 1)


def test_blocks_under_way_follow_the_threads_that_are_there() -> None:
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=None) as local,
        Client(local.scheduler_address) as client,
    ):
        crew, of_two = Crew(client, None), Crew(client, 2)
        assert (crew.limit(), of_two.limit()) == (64, 4)
        local.new_spec["options"]["nthreads"] = 40
        local.scale(1)
        client.wait_for_workers(1)
        wait_until(lambda: crew.limit() == 80)
        local.scale(0)
        wait_until(lambda: crew.limit() == 64)


def test_several_threads_share_a_map(begun: Path) -> None:
    with BlockMap(Runtime(workers=2, device="cpu")) as blocks, ThreadPoolExecutor(3) as threads:

        def mapped(start: int) -> list[int]:
            items = Tasks(range(start, start + 10), "items")
            return sorted(item for item, _ in blocks(partial(slept, begun, 0.0), items))

        assert list(threads.map(mapped, (0, 100, 200))) == [
            list(range(start, start + 10)) for start in (0, 100, 200)
        ]
    assert len(begun_in(begun)) == 2


def test_as_many_local_workers_as_memory_holds(
    begun: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from distributed.system import MEMORY_LIMIT

    monkeypatch.setattr(workers, "WORKER_BYTES", MEMORY_LIMIT // 2 + 1)
    with BlockMap(Runtime(workers=2, device="cpu")) as blocks:
        list(blocks(partial(slept, begun, 0.1), list(range(6))))
    assert len(begun_in(begun)) == 1
    assert "1 workers, not 2: each is to have" in caplog.text


def test_small_workers_of_others_are_told(begun: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        LocalCluster(
            n_workers=1, processes=False, memory_limit="1GiB", dashboard_address=None
        ) as local,
        BlockMap(Runtime(scheduler=local.scheduler_address)) as blocks,
    ):
        assert len(list(blocks(partial(slept, begun, 0.0), [1]))) == 1
    assert "1 workers have less than 2 GiB, the smallest 1.0: a block may kill them" in caplog.text
