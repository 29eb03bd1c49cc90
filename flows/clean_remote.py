"""`cellpair clean` of what lies behind a URL: planned on a view of it, then done there.

Nothing can be hidden by one rename there, so what names others goes before what it names, and of an
artifact its record first: whenever this is stopped, what is left of it is nothing.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from flows.outfolder import OUT_FILE, read_out
from flows.removals import Removal, plan_removals
from shards.artifact import RECORD_FILE
from shards.cache import Cache
from shards.claim import CLAIM_SUFFIX, read_claim
from shards.errors import BadInput
from shards.lock import living_owner
from shards.remote import RemotePath
from shards.store import working_folder
from shards.view import View, view_of


def clean_remote(remote: RemotePath, *, dry_run: bool) -> tuple[list[Removal], Path]:
    """Remove there what `clean` would remove from a folder; returns what, and below which folder.

    This machine's own copies of it go too. Raises BadInput as `clean` does.
    """
    with view_of(remote) as view:
        view.add()
        owner = read_out(view.root)
        if owner is None:
            raise BadInput(
                remote,
                expected="the URL that `out` of a config of `cellpair curate` names",
                found=f"no {OUT_FILE} there",
                remedy="give that URL",
            )
        _check_nobody_works(view)
        removals = plan_removals(view.root, owner.withdrawn)
        if not dry_run:
            for removal in removals:
                _remove(view, removal)
            _forget_copies(remote)
        return removals, view.root


def _remove(view: View, removal: Removal) -> None:
    relative = removal.path.relative_to(view.root).as_posix()
    if removal.rest is not None:
        (view.remote / relative).write_bytes(removal.rest)
        return
    if removal.path.is_file():
        view.remote.remove([relative])
        return
    names = [p.relative_to(view.root).as_posix() for p in removal.path.rglob("*") if p.is_file()]
    view.remote.remove(sorted(names, key=lambda name: not name.endswith(f"/{RECORD_FILE}")))


def _check_nobody_works(view: View) -> None:
    """Raise BadInput where a claim is there, or a process of this machine has its working copy."""
    claims = sorted(view.root.glob(f"runs/*/*/.*{CLAIM_SUFFIX}"))
    locks = sorted(working_folder(view.remote).glob("runs/*/*/.*.lock"))
    for path in claims:
        relative = path.relative_to(view.root).as_posix()
        claim = read_claim(view.remote / relative)
        if claim is not None:
            where = claim.owner.host.split()[0]
            _refuse(view, f"process {claim.owner.pid} on {where}, which holds {relative}")
    for lock in locks:
        if (holder := living_owner(lock)) is not None:
            _refuse(view, f"process {holder.pid} of this machine, which holds {lock.name}")


def _refuse(view: View, found: str) -> None:
    raise BadInput(
        view.remote,
        expected="a dataset that no process works on",
        found=found,
        remedy="run clean when it is done; if its machine is gone for good, remove that object",
    )


def _forget_copies(remote: RemotePath) -> None:
    """Remove this machine's copies: of the output, and of inputs, which may be a withdrawn donor's.

    Those that another process uses stay until it ends and room is needed.
    """
    shutil.rmtree(working_folder(remote), ignore_errors=True)
    Cache.of_user().clear()
