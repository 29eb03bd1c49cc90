"""What a process puts aside lies in its output, and goes with it, or with the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import psutil
import pytest

from flows.scratch import scratch, sweep, sweep_semaphores

KILLED = textwrap.dedent(
    """
    import multiprocessing, sys, tempfile, time
    from pathlib import Path
    from flows.scratch import scratch
    if __name__ == "__main__":
        with scratch(Path(sys.argv[1])):
            queue = multiprocessing.get_context("spawn").Queue()
            tempfile.NamedTemporaryFile(delete=False).close()
            print("ready", flush=True)
            time.sleep(60)
    """
)
SHARED_MEMORY = Path("/dev/shm")


def semaphores_of(pid: int) -> list[Path]:
    return list(SHARED_MEMORY.glob(f"sem.cellpair-*-{pid}-*"))


def test_temporary_files_lie_in_the_output_and_go(tmp_path: Path) -> None:
    before = tempfile.gettempdir(), os.environ.get("TMPDIR")
    with scratch(tmp_path) as folder:
        assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(folder)
        tempfile.NamedTemporaryFile(delete=False).close()
        assert len(list(folder.iterdir())) == 2
        with scratch(tmp_path):  # of another thread of work; both are alive
            assert len(list((tmp_path / ".scratch").iterdir())) == 2
    assert (tempfile.gettempdir(), os.environ.get("TMPDIR")) == before
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, str(script), str(out)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert sweep(out) == []
        if SHARED_MEMORY.is_dir():
            assert semaphores_of(process.pid)
        # With the process that would remove its semaphores, as a scheduler kills a whole job.
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        os.kill(process.pid, signal.SIGKILL)
    left = semaphores_of(process.pid)
    if not left and SHARED_MEMORY.is_dir():
        pytest.fail("the semaphores went by themselves: nothing is proved")
    sweep_semaphores()
    assert semaphores_of(process.pid) == []
    (folder,) = sweep(out)
    assert not folder.exists()
