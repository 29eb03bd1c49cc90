"""The temporary folder of a process lies in the output, so that nothing is lost elsewhere."""

from __future__ import annotations

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


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """A folder below `out/.scratch` for whatever this process and its children put aside.

    It is what `tempfile` uses meanwhile, and is gone on leaving; what killed processes of this
    machine left is swept first.
    """
    sweep(out)
    root = out / SCRATCH_FOLDER
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root)).resolve()
    write_atomically(folder / _OWNER_FILE, this_process().model_dump_json().encode())
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
