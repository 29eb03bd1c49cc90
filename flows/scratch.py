"""The temporary folder of a process lies in the output, so that nothing is lost elsewhere."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from shards.artifact import write_atomically
from shards.lock import Owner, is_dead, this_process

SCRATCH_FOLDER = ".scratch"
_OWNER_FILE = "owner.json"
# Where Linux keeps the semaphores by which Dask talks to its workers, as `sem.<name>`.
_SHARED_MEMORY = Path("/dev/shm")


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """A folder below `out/.scratch` for whatever this process and its children put aside.

    It is what `tempfile` uses meanwhile, and is gone on leaving; what killed processes of this
    machine left is swept first. Semaphores made meanwhile bear the name of this process.
    """
    sweep(out)
    sweep_semaphores()
    owner = this_process()
    # What names semaphores is private, and typeshed leaves it out.
    multiprocessing.current_process()._config["semprefix"] = (  # type: ignore[attr-defined]
        f"/{_semaphores_of(owner.host)}-{owner.pid}-{owner.started_s:.0f}"
    )
    root = out / SCRATCH_FOLDER
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root)).resolve()
    write_atomically(folder / _OWNER_FILE, owner.model_dump_json().encode())
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield folder
    finally:
        if before[0] is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before[0]
        tempfile.tempdir = before[1]
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another process has its own there
            root.rmdir()


def sweep(out: Path) -> list[Path]:
    """Remove the temporary folders below `out/.scratch` whose owners are gone; returns them."""
    dead = dead_folders(out)
    for folder in dead:
        shutil.rmtree(folder, ignore_errors=True)
    return dead


def sweep_semaphores() -> None:
    """Remove the semaphores of processes of this machine that are gone with all their children.

    Python removes them itself unless the process that it keeps for this was killed too.
    """
    host = this_process().host
    for path in _SHARED_MEMORY.glob(f"sem.{_semaphores_of(host)}-*"):
        pid, started_s = path.name.split("-")[2:4]
        if is_dead(Owner(host=host, pid=int(pid), started_s=float(started_s))):
            path.unlink(missing_ok=True)


def _semaphores_of(host: str) -> str:
    return f"cellpair-{hashlib.sha256(host.encode()).hexdigest()[:8]}"


def dead_folders(out: Path) -> list[Path]:
    """Temporary folders below `out/.scratch` whose owners are gone."""
    return [folder for folder in sorted((out / SCRATCH_FOLDER).glob("*")) if _is_dead(folder)]


def _is_dead(folder: Path) -> bool:
    try:
        return is_dead(Owner.model_validate_json((folder / _OWNER_FILE).read_bytes()))
    except (OSError, ValidationError):
        # Killed before it said whose it is; or it is about to say so, and then its number lives.
        number = folder.name.partition("-")[0]
        return not (number.isdigit() and Path("/proc", number).exists())
