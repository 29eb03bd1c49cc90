"""`cellpair clean`: remove what no dataset points to, and all that holds a withdrawn donor.

What names others goes before what it names, and a folder is hidden, whole, before its files are
deleted: whenever this is killed, nothing half is left that looks like something whole.
"""

from __future__ import annotations

import secrets
import shutil
from contextlib import nullcontext, suppress
from pathlib import Path

from flows.clean_remote import clean_remote
from flows.failures import DONE
from flows.outfolder import LOCK_FOLDER, OUT_FILE, read_out
from flows.removals import Removal, plan_removals
from flows.scratch import SCRATCH_FOLDER, dead_folders, sweep_semaphores
from flows.sizes import in_words
from shards.artifact import write_atomically
from shards.dataset import POINTER_FILE
from shards.errors import BadInput
from shards.lock import hold, living_owner
from shards.remote import Location, RemotePath


def clean(out: Location, *, dry_run: bool) -> int:
    """Clean the output folder of `curate`; prints what goes and how much; returns the exit code.

    Raises BadInput where it is none, where a process works in it, and where a dataset or what it
    points to can't be read; then nothing is removed.
    """
    if isinstance(out, RemotePath):
        return _tell(*clean_remote(out, dry_run=dry_run), dry_run=dry_run)
    out = out.resolve()
    owner = read_out(out)
    if owner is None:
        raise BadInput(
            out,
            expected="the output folder of `cellpair curate`",
            found=f"no {OUT_FILE} in it",
            remedy="give the folder that `out` of the config names",
        )
    with nullcontext() if dry_run else hold(out / LOCK_FOLDER, "clean"):
        _check_nobody_works(out)
        removals = plan_removals(out, owner.withdrawn)
        if not dry_run:
            _check_nobody_works(out)  # one that had claimed the folder when this began
            _remove(removals)
            _remove_empty_folders(out)
            sweep_semaphores()
    return _tell(removals, out, dry_run=dry_run)


def _tell(removals: list[Removal], out: Path, *, dry_run: bool) -> int:
    done = "would remove" if dry_run else "removed"
    for r in removals:
        what = "" if r.rest is None else "lines of "
        print(f"{done} {what}{r.path.relative_to(out)}: {r.why}, {in_words(r.n_bytes)}")
    print(f"{done} {in_words(sum(r.n_bytes for r in removals))} in all")
    if out / POINTER_FILE in {r.path for r in removals}:
        print("the newest dataset holds a withdrawn donor: `cellpair curate` makes one without")
    return DONE


def wait_for_clean(out: Path) -> None:
    """Return when no other process cleans `out`.

    Whoever has its temporary folder there before it asks is seen by the next `clean`, or sees it.
    """
    if living_owner(out / LOCK_FOLDER) is not None:
        with hold(out / LOCK_FOLDER, "curate"):
            pass


def _check_nobody_works(out: Path) -> None:
    """Raise BadInput where a living process holds an artifact or has its temporary folder."""
    working = {}
    for lock in sorted(out.glob("runs/*/*/.*.lock")):
        if (owner := living_owner(lock)) is not None:
            working[lock] = f"process {owner.pid or 'unknown'} on {owner.host.split()[0]}"
    dead = dead_folders(out)
    for folder in sorted((out / SCRATCH_FOLDER).glob("*")):
        if folder not in dead:
            working[folder] = f"process {folder.name.partition('-')[0]}"
    for path, process in working.items():
        raise BadInput(
            out,
            expected="a folder that no process works in",
            found=f"{process}, which holds {path.relative_to(out)}",
            remedy="run clean when it is done; if its machine is gone for good, remove that folder",
        )


def _remove(removals: list[Removal]) -> None:
    hidden = []
    for r in removals:
        if r.rest is not None:
            write_atomically(r.path, r.rest)
        elif r.path.is_symlink() or not r.path.is_dir():  # what a link names is not ours
            r.path.unlink()
        elif r.path.name.startswith(".") or r.path.parent.name == SCRATCH_FOLDER:
            hidden.append(r.path)
        else:
            name = f".{r.path.name}.gone-{secrets.token_hex(4)}"
            hidden.append(r.path.rename(r.path.with_name(name)))
    for folder in hidden:
        shutil.rmtree(folder)


def _remove_empty_folders(out: Path) -> None:
    for folder in (*out.glob("runs/*/*"), *out.glob("runs/*"), out / SCRATCH_FOLDER):
        with suppress(OSError):  # it is not empty, or not a folder, or not there
            folder.rmdir()
