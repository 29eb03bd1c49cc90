"""Artifacts: what a stage made, named by what it was made from, and whole or absent.

An artifact is a folder `<stage>/<fingerprint>/`; it exists if and only if its `artifact.json`
exists. The stage writes into a folder aside, the record is written last, then one rename publishes.
Beside it, hidden, lie its lock, the folder aside, and the blocks of a stage that takes long: those
outlive a killed process, and the next one goes on from them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeVar

from pydantic import ValidationError

from shards.lock import hold
from shards.schema import Record, digest

log = logging.getLogger("cellpair")

A_co = TypeVar("A_co", covariant=True)

RECORD_FILE = "artifact.json"
PARTIAL_SUFFIX = ".partial"
SCHEMA_VERSION: Final = 2
_CHUNK_BYTES = 1 << 22


class FileFacts(Record):
    """What a file of an artifact must be: the size is looked at on every reuse, all by `check`."""

    sha256: str
    n_bytes: int


class ArtifactRecord(Record):
    """`artifact.json`: what this is, what it was made from, what is in it, what it found.

    `provenance` (device, versions) is told and never enters the fingerprint; `summary` holds the
    stage's own figures, a pure function of what enters the fingerprint.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    stage: str
    stage_version: int
    fingerprint: str
    config: dict[str, Any]
    parents: dict[str, str]
    inputs: dict[str, str]
    provenance: dict[str, str]
    files: dict[str, FileFacts]  # by path inside the folder
    summary: dict[str, Any]


class Identity(Record):
    """All that decides the bytes of an artifact; `config` is the stage's whole config.

    `parents` are fingerprints of artifacts, `inputs` hashes of the content of raw files.
    """

    stage: str
    stage_version: int
    config: dict[str, Any]
    parents: dict[str, str]
    inputs: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """20 hex digits that name the artifact."""
        return digest([self.stage, self.stage_version, self.config, self.parents, self.inputs])


class Lost(RuntimeError):
    """The lock was taken over while this process stood still; what it did is thrown away."""


@dataclass(frozen=True, slots=True)
class Made:
    """The figures of a stage, and SHA-256 of files that it knows from writing them.

    Files of gigabytes would have to be read back for it, when they have left the system's cache.
    """

    summary: dict[str, Any]
    sha256s: Mapping[str, str]


# Makes the files of an artifact in the first folder and returns its figures. What it publishes
# block by block in the second one is there again after a kill.
Make = Callable[[Path, Path], dict[str, Any] | Made]


def read_artifact(directory: Path) -> ArtifactRecord | None:
    """The record of a published artifact, or None where there is none.

    Raises ValidationError where the record is not one of this version.
    """
    try:
        return ArtifactRecord.model_validate_json((directory / RECORD_FILE).read_bytes())
    except FileNotFoundError:
        return None


def find_artifact(directory: Path) -> ArtifactRecord | None:
    """As `read_artifact`, but None too where a file is missing or of another size than recorded.

    What is wrong is logged. Contents are not read: a run of terabytes is found in a moment.
    """
    try:
        record = read_artifact(directory)
    except ValidationError:
        log.warning("%s: not a record of this version; made again", directory / RECORD_FILE)
        return None
    for name, facts in record.files.items() if record is not None else ():
        path = directory / name
        n_bytes = path.stat().st_size if path.is_file() else None
        if n_bytes != facts.n_bytes:
            found = "missing" if n_bytes is None else f"{n_bytes} bytes"
            log.warning("%s: %s, not %d bytes; made again", path, found, facts.n_bytes)
            return None
    return record


def build_artifact(
    parent: Path,
    identity: Identity,
    make: Make,
    *,
    provenance: Mapping[str, str],
    check_inputs: Callable[[], None],
) -> tuple[Path, ArtifactRecord, bool]:
    """Make `parent/<fingerprint>/` by `make(folder, blocks)`, unless it is there.

    Returns the folder, its record, and whether it was reused. One process builds an artifact at a
    time: others wait for it and then reuse. `check_inputs` raises where a raw input is not what it
    was when `identity` was taken: then nothing is published.
    """
    directory = parent / identity.fingerprint
    if (record := find_artifact(directory)) is not None:
        return directory, record, True
    parent.mkdir(parents=True, exist_ok=True)
    what = f"{parent.parent.name} {identity.stage}"
    with hold(_beside(directory, "lock"), what) as claim:
        if (record := find_artifact(directory)) is not None:
            return directory, record, True
        _make_room(directory)
        aside = _beside(directory, f"{claim.number}{PARTIAL_SUFFIX}")
        blocks = _beside(directory, "blocks")
        try:
            aside.mkdir()
            blocks.mkdir(exist_ok=True)
            made = make(aside, blocks)
            check_inputs()
            record = _record(
                aside, identity, provenance, made if isinstance(made, Made) else Made(made, {})
            )
            _publish(aside, directory, record)
        except OSError as error:
            # Whoever stands still for long is taken for dead, and another goes on in its place.
            if (record := find_artifact(directory)) is not None:
                return directory, record, True
            if claim.is_held():
                raise
            raise Lost(f"{what}: another process took over, and goes on with it") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(blocks, ignore_errors=True)
    return directory, record, False


def _beside(directory: Path, what: str) -> Path:
    return directory.with_name(f".{directory.name}.{what}")


def _make_room(directory: Path) -> None:
    """Remove what dead owners left; put a damaged artifact away, under a name that nobody reads."""
    for left in directory.parent.glob(f".{directory.name}.*{PARTIAL_SUFFIX}"):
        # Renamed first: an owner that is not dead but late finds its folder gone at once, whole,
        # and can't publish what is left of it.
        shutil.rmtree(left.rename(_beside(directory, f"late-{secrets.token_hex(4)}")))
    if directory.exists():
        directory.rename(_beside(directory, f"damaged-{secrets.token_hex(4)}"))


def _record(
    aside: Path, identity: Identity, provenance: Mapping[str, str], made: Made
) -> ArtifactRecord:
    files = {str(path.relative_to(aside)): path for path in files_under(aside)}
    return ArtifactRecord(
        **identity.model_dump(),
        fingerprint=identity.fingerprint,
        provenance=dict(provenance),
        files={
            name: FileFacts(
                sha256=made.sha256s.get(name) or sha256_of(path), n_bytes=path.stat().st_size
            )
            for name, path in files.items()
        },
        summary=made.summary,
    )


def _publish(aside: Path, directory: Path, record: ArtifactRecord) -> None:
    for path in files_under(aside):
        fsync(path)
    with written_aside(aside / RECORD_FILE) as path:  # which makes no folder: see _make_room
        path.write_text(record.model_dump_json(indent=1), encoding="utf-8")
    # Fails where the folder is there: then somebody who took over published the same bytes.
    aside.rename(directory)
    fsync(directory.parent)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; on leaving it is synced and renamed to `path`.

    A reader sees the old file or the new one, never half of one. After an error nothing is left.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    try:
        yield aside
        fsync(aside)
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole small file as `written_aside`, its folder made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_bytes(data)


def write_if_changed(path: Path, data: bytes) -> None:
    """As `write_atomically`, but a file that holds these bytes is left as it is."""
    if not path.is_file() or path.read_bytes() != data:
        write_atomically(path, data)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file where the file system has such, else a copy of it."""
    try:
        os.link(source, target)
    except OSError:  # which error it is depends on the file system; the copy tells a real one
        shutil.copyfile(source, target)


def tell_found(n_found: int, n_blocks: int) -> None:
    """Log how many blocks of a stage a process that was stopped has left."""
    if n_found:
        log.info("going on: %d of %d blocks are there already", n_found, n_blocks)


class Items(Protocol[A_co]):
    """What is to be mapped: how many, and one after the other, perhaps as they become ready."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[A_co]: ...


def make_left(
    map_tasks: Callable[[Callable[[Any], str], Any], Iterable[str]],
    make: Callable[[Any], str],
    left: Items[Any],
    n_blocks: int,
) -> None:
    """Make those of the `n_blocks` blocks of a stage that are left to be made, anywhere."""
    tell_found(n_blocks - len(left), n_blocks)
    for _ in map_tasks(make, left):
        pass


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex; memory bounded."""
    sha = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()


def files_under(folder: Path) -> list[Path]:
    """Regular files below a folder, sorted; macOS `._*` leftovers are no content."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("._"))


def fsync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
