"""The output folder knows whose it is, so that no config writes into another's."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Final, Literal

from shards.artifact import write_if_changed
from shards.dataset import read_record
from shards.errors import BadInput
from shards.lock import hold
from shards.schema import Record
from shards.store import Store

OUT_FILE: Final = "cellpair.json"
LOCK_FOLDER: Final = ".clean.lock"  # held while the folder is claimed, and while it is cleaned
# What may lie in the folder before its first run: a config, and what file managers leave.
_MAY_LIE_THERE = (".toml",)
# Both together are the work of a version that did not say whose a folder is.
_OF_EARLIER_VERSIONS = {"runs", "content-hashes.json"}
_BAD_PLACE = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "a read-only file system",
    errno.ENOTDIR: "a file in the place of a folder",
    errno.EEXIST: "a file in the place of a folder",
    errno.ENAMETOOLONG: "a name that is too long",
    errno.ELOOP: "links that go in a circle",
}


class OutFolder(Record):
    """`OUT/cellpair.json`: the config's name, and the donors that must not be found here."""

    schema_version: Literal[1] = 1
    name: str
    withdrawn: tuple[str, ...]


def read_out(out: Path) -> OutFolder | None:
    """Whose folder this is; None where it is nobody's. Raises BadInput on a broken record."""
    return read_record(out / OUT_FILE, OutFolder) if (out / OUT_FILE).exists() else None


def claim_out(out: Path, name: str, withdrawn: tuple[str, ...], store: Store | None = None) -> None:
    """Make the folder, or find that it is this config's; say there which donors are withdrawn.

    Waits while the folder is cleaned, and for another config that claims it in this moment.
    `store` keeps it, where it is the working copy of what lies behind a URL. Raises BadInput where
    it belongs to a config of another name, is in use for something else, or can't be written; and
    where somebody who was withdrawn is so no more.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # rights alone don't tell: root, mounts, quotas
            pass
    except OSError as error:
        found = _BAD_PLACE.get(error.errno or 0)
        if found is None:
            raise
        raise BadInput(
            f"out = {out}",
            expected="a folder that this user can write to",
            found=f"{found}: {error.filename}",
            remedy="change its permissions, or set out to another folder",
        ) from error
    store = store or Store(out)
    where = store.told(out)
    with hold(out / LOCK_FOLDER, where):
        names = store.open()
        owner = read_out(out)
        if owner is None:
            _check_unused(where, names)
        elif owner.name != name:
            raise BadInput(
                f"out = {where}",
                expected=f"a new folder, or the one of {name!r}",
                found=f"the folder of {owner.name!r}",
                remedy="set out to another folder, or name to the one that this folder belongs to",
            )
        elif taken_back := sorted(set(owner.withdrawn) - set(withdrawn)):
            raise BadInput(
                f"out = {where}",
                expected="[split] withdraw with all whom this folder must not hold",
                found=f"without {', '.join(map(repr, taken_back))}",
                remedy="name them in withdraw; to take them back in, remove their names from "
                f"{OUT_FILE} there first",
            )
        record = OutFolder(name=name, withdrawn=withdrawn)
        data = record.model_dump_json(indent=1).encode()
        try:
            store.claim(OUT_FILE, data)
        except (FileNotFoundError, PermissionError) as error:
            raise BadInput(
                f"out = {where}",
                expected="a bucket or container that is there and can be written to",
                found=str(error.strerror),
                remedy="make it, or mend the rights of the credentials; or set out to another URL",
            ) from error
        write_if_changed(out / OUT_FILE, data)


def _check_unused(where: str, names: list[str]) -> None:
    others = sorted(
        name for name in names if not name.startswith(".") and not name.endswith(_MAY_LIE_THERE)
    )
    if others and not _OF_EARLIER_VERSIONS.issubset(others):
        raise BadInput(
            f"out = {where}",
            expected="a new or empty folder, or one that cellpair made",
            found=f"{', '.join(others[:3])}{' …' if len(others) > 3 else ''}, and no {OUT_FILE}",
            remedy="set out to a folder of its own",
        )
