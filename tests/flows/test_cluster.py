"""The block map: lost workers, errors that pass and errors that stay."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import dask
import psutil
import pytest

from flows import cluster, transient
from flows.cluster import BlockMap, Runtime
from flows.log import logged_to, working_on


def tried(folder: Path, item: int) -> int:
    """How often this item has been tried, this time included."""
    (folder / f"{item}-{time.time_ns()}").touch()
    return sum(name.startswith(f"{item}-") for name in os.listdir(folder))


def square(folder: Path, item: int) -> int:
    tried(folder, item)
    return item * item


def lose_the_worker_once(folder: Path, item: int) -> int:
    if tried(folder, item) == 1 and item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def always_lose_the_worker(folder: Path, item: int) -> int:
    tried(folder, item)
    os.kill(os.getpid(), signal.SIGKILL)
    return item


def fail_once(folder: Path, item: int) -> int:
    if tried(folder, item) == 1 and item == 2:
        raise OSError(errno.ESTALE, "Stale file handle", "slide.tif")
    return item * item


def fail_for_good(folder: Path, item: int) -> int:
    tried(folder, item)
    raise ValueError("bad input")


def tries(folder: Path) -> Counter[int]:
    return Counter(int(name.split("-")[0]) for name in os.listdir(folder))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transient, "PAUSES_S", (0.0, 0.0))


@pytest.mark.parametrize("workers", [1, 2])
def test_every_block_is_done_once(tmp_path: Path, workers: int) -> None:
    with BlockMap(Runtime(workers=workers)) as blocks:
        done = list(blocks(partial(square, tmp_path), list(range(9))))
        assert sorted(done) == [n * n for n in range(9)]
        assert tries(tmp_path) == dict.fromkeys(range(9), 1)
        assert list(blocks.on_gpu(partial(square, tmp_path), [])) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_that_passes_is_tried_again(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    with BlockMap(Runtime(workers=workers)) as blocks:
        assert sorted(blocks(partial(fail_once, tmp_path), [1, 2, 3])) == [1, 4, 9]
    assert tries(tmp_path) == {1: 1, 2: 2, 3: 1}
    assert "slide.tif" in caplog.text


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_fails_at_once(tmp_path: Path, workers: int) -> None:
    with (
        BlockMap(Runtime(workers=workers)) as blocks,
        pytest.raises(ValueError, match="bad input"),
    ):
        list(blocks(partial(fail_for_good, tmp_path), [7]))
    assert tries(tmp_path) == {7: 1}


def test_a_lost_worker_costs_its_block_alone(tmp_path: Path) -> None:
    with BlockMap(Runtime(workers=2)) as blocks:
        done = list(blocks(partial(lose_the_worker_once, tmp_path), list(range(8))))
    assert sorted(done) == [n * n for n in range(8)]
    assert tries(tmp_path)[3] == 2


def test_a_worker_that_dies_while_it_starts_is_replaced(tmp_path: Path) -> None:
    def kill_the_first() -> None:
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s:
            for child in psutil.Process().children(recursive=True):
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()
                    return
            time.sleep(0.005)

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    with BlockMap(Runtime(workers=2)) as blocks:
        done = list(blocks(partial(square, tmp_path), list(range(4))))
    killer.join()
    assert sorted(done) == [0, 1, 4, 9]


def test_a_block_that_kills_every_worker_is_told(tmp_path: Path) -> None:
    with (
        BlockMap(Runtime(workers=2)) as blocks,
        pytest.raises(RuntimeError, match="lost its worker 4 times: it may need more memory"),
    ):
        list(blocks(partial(always_lose_the_worker, tmp_path), [5]))
    assert tries(tmp_path) == {5: 4}


def test_progress_is_told_by_lines_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster, "_TELL_EVERY_S", 0.0)
    caplog.set_level("INFO", logger="cellpair")
    with (
        logged_to(tmp_path / "out"),
        working_on("run-a", "patches"),
        BlockMap(Runtime(workers=1)) as blocks,
    ):
        list(blocks(partial(square, tmp_path), [1, 2]))
    (line, last) = (tmp_path / "out" / "logs" / "run-a.log").read_text().splitlines()
    assert line.endswith("INFO [run-a patches] run-a patches: 1 of 2 blocks")
    assert last.endswith("run-a patches: 2 of 2 blocks")
    assert [p.name for p in (tmp_path / "out" / "logs").iterdir()] == ["run-a.log"]


def seen_gpus(item: int) -> tuple[str | None, dict[str, float]]:
    """The GPUs that a process sees, and what its worker offers."""
    from distributed import get_worker

    time.sleep(0.3)  # long enough for every worker to get some
    return os.environ.get("CUDA_VISIBLE_DEVICES"), dict(get_worker().state.total_resources)


@pytest.fixture
def one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that lists one GPU, as far as the driver's own tool tells."""
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA Something (UUID: GPU-0)'\n")
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("one_gpu")
def test_a_gpu_is_offered_by_one_worker_and_unseen_by_the_others() -> None:
    with BlockMap(Runtime(workers=2, device="auto")) as blocks:
        on_gpu = list(blocks.on_gpu(seen_gpus, range(4)))
        anywhere = list(blocks(seen_gpus, range(6)))
    assert on_gpu == [("0", {"GPU": 1})] * 4
    assert ("", {}) in anywhere
    assert set(map(str, anywhere)) <= {str(("0", {"GPU": 1})), str(("", {}))}
    with BlockMap(Runtime(workers=2, device="cpu")) as blocks:
        assert {resources == {} for _, resources in blocks.on_gpu(seen_gpus, range(4))} == {True}


@pytest.mark.usefixtures("one_gpu")
def test_blocks_for_a_gpu_wait_for_a_worker_that_starts_late(tmp_path: Path) -> None:
    late = tmp_path / "late.py"
    late.write_text(
        "import os, time\nif os.environ.get('CUDA_VISIBLE_DEVICES') == '0':\n    time.sleep(5)\n"
    )
    with (
        dask.config.set({"distributed.worker.preload": [str(late)]}),
        BlockMap(Runtime(workers=2, device="auto")) as blocks,
    ):
        on_gpu = list(blocks.on_gpu(seen_gpus, range(4)))
    assert on_gpu == [("0", {"GPU": 1})] * 4
