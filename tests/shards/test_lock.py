"""A lock is held by one process at a time, and by no dead one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from shards import lock as module
from shards.lock import Owner, hold, is_dead, living_owner, this_process

HOLDER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from shards.lock import hold
    with hold(Path(sys.argv[1]), "the test"):
        print("held", flush=True)
        time.sleep(60)
    """
)


@contextmanager
def other_holder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock; killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_lock_leaves_nothing(tmp_path: Path) -> None:
    with hold(tmp_path / "lock", "it") as claim:
        assert claim.number == 1
        assert claim.is_held()
        assert living_owner(tmp_path / "lock") == this_process()
    assert list(tmp_path.iterdir()) == []
    assert living_owner(tmp_path / "lock") is None


def test_an_error_inside_releases_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold(tmp_path / "lock", "it"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_killed_owner_is_taken_over_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with other_holder(tmp_path / "lock") as process:
        assert living_owner(tmp_path / "lock") is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert living_owner(tmp_path / "lock") is None
    with hold(tmp_path / "lock", "it") as claim:
        assert claim.number == 2
    assert "it: taken over from a process that is gone" in caplog.text


def test_a_living_owner_is_waited_for_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with other_holder(tmp_path / "lock") as process:
        threading.Timer(1.0, process.kill).start()
        with hold(tmp_path / "lock", "it"):
            process.wait(timeout=5)
    assert f"it: waiting for process {process.pid}, which works on it" in caplog.text


def test_a_stopped_owner_that_was_taken_over_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One on another host whose heart stands still: neither side's clock is asked for the time."""
    monkeypatch.setattr(module, "STALE_S", 0.5)
    lock = tmp_path / "lock"
    lock.mkdir()
    far = Owner(host="far away", pid=1, started_s=0)
    (lock / "000001.json").write_text(far.model_dump_json())
    os.utime(lock / "000001.json", (2e9, 2e9))  # its clock is years ahead
    assert not is_dead(far)
    late = module.Claim(lock / "000001.json")
    assert late.is_held()
    start_s = time.monotonic()
    with hold(lock, "it") as claim:
        assert time.monotonic() - start_s >= 0.5
        assert claim.number == 2
        assert not late.is_held()


def test_a_beating_heart_elsewhere_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALE_S", 0.6)
    lock = tmp_path / "lock"
    lock.mkdir()
    path = lock / "000001.json"
    path.write_text(Owner(host="far away", pid=1, started_s=0).model_dump_json())
    ended = threading.Event()

    def beat() -> None:
        for _ in range(10):
            os.utime(path)
            time.sleep(0.2)
        ended.set()
        path.unlink()

    heart = threading.Thread(target=beat)
    heart.start()
    with hold(lock, "it"):
        assert ended.is_set()
    heart.join()


def test_a_number_used_again_by_another_process_is_another_owner() -> None:
    here = this_process()
    assert not is_dead(here)
    assert is_dead(here.model_copy(update={"started_s": here.started_s - 3600}))
    assert not is_dead(here.model_copy(update={"host": "elsewhere", "pid": 1 << 30}))


def test_a_claim_that_was_never_written_is_waited_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALE_S", 0.3)
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "000001.json").touch()
    with hold(tmp_path / "lock", "it") as claim:
        assert claim.number == 2


def test_a_lock_that_goes_while_it_is_looked_for(tmp_path: Path) -> None:
    lock, n_inside, most = tmp_path / "lock", 0, 0

    def take_turns() -> None:
        nonlocal n_inside, most
        for _ in range(40):
            with hold(lock, "it"):
                n_inside += 1
                most = max(most, n_inside)
                n_inside -= 1

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(take_turns) for _ in range(8)]:
            done.result()
    assert most == 1
    assert list(tmp_path.iterdir()) == []


def test_many_processes_take_turns(tmp_path: Path) -> None:
    """Each adds one to a number by a slow read and write, which only turns keep right."""
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from shards.lock import hold
        total = Path(sys.argv[1])
        for _ in range(15):
            with hold(total.with_name("lock"), "the total"):
                n = int(total.read_text())
                time.sleep(0.002)
                total.write_text(str(n + 1))
        """
    )
    total = tmp_path / "total"
    total.write_text("0")
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(total)], stderr=subprocess.DEVNULL)
        for _ in range(4)
    ]
    assert [process.wait() for process in processes] == [0] * 4
    assert total.read_text() == "60"
    assert [p.name for p in tmp_path.iterdir()] == ["total"]
