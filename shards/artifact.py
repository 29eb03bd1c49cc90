"""Artifacts: what a stage made, named by what it was made from, and whole or absent.

An artifact is a folder `<stage>/<fingerprint>/`; it exists if and only if its `artifact.json`
exists. The stage writes into a folder aside, the record is written last, then one rename publishes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from shards.schema import Record, digest

RECORD_FILE = "artifact.json"
SCHEMA_VERSION: Final = 1
_CHUNK_BYTES = 1 << 22


class ArtifactRecord(Record):
    """`artifact.json`: what this is, what it was made from, what is in it, what it found.

    `provenance` (device, versions) is told and never enters the fingerprint; `summary` holds the
    stage's own figures, a pure function of what enters the fingerprint.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    stage: str
    stage_version: int
    fingerprint: str
    config: dict[str, Any]
    parents: dict[str, str]
    inputs: dict[str, str]
    provenance: dict[str, str]
    files: dict[str, str]  # path inside the folder -> sha256
    summary: dict[str, Any]


def fingerprint_of(
    stage: str,
    stage_version: int,
    config: Mapping[str, Any],
    parents: Mapping[str, str],
    inputs: Mapping[str, str],
) -> str:
    """Hash of all that decides the bytes of an artifact; `config` is the stage's whole config."""
    return digest([stage, stage_version, dict(config), dict(parents), dict(inputs)])


def read_artifact(directory: Path) -> ArtifactRecord | None:
    """The record of a published artifact, or None where there is none."""
    try:
        return ArtifactRecord.model_validate_json((directory / RECORD_FILE).read_bytes())
    except FileNotFoundError:
        return None


def build_artifact(
    parent: Path,
    *,
    stage: str,
    stage_version: int,
    config: Mapping[str, Any],
    parents: Mapping[str, str],
    inputs: Mapping[str, str],
    provenance: Mapping[str, str],
    make: Callable[[Path], dict[str, Any]],
) -> tuple[Path, ArtifactRecord, bool]:
    """Make `parent/<fingerprint>/` by `make(folder) -> summary`, unless it is there already.

    Returns the folder, its record, and whether it was reused. One process builds an artifact at a
    time: others wait for the lock and then reuse. The lock is the operating system's, so that a
    killed owner holds nothing.
    """
    fingerprint = fingerprint_of(stage, stage_version, config, parents, inputs)
    directory = parent / fingerprint
    if (record := read_artifact(directory)) is not None:
        return directory, record, True
    parent.mkdir(parents=True, exist_ok=True)
    with _lock(parent / f".{fingerprint}.lock"):
        if (record := read_artifact(directory)) is not None:
            return directory, record, True
        aside = parent / f".{fingerprint}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        summary = make(aside)
        record = ArtifactRecord(
            stage=stage,
            stage_version=stage_version,
            fingerprint=fingerprint,
            config=dict(config),
            parents=dict(parents),
            inputs=dict(inputs),
            provenance=dict(provenance),
            files={str(p.relative_to(aside)): sha256_of(p) for p in files_under(aside)},
            summary=summary,
        )
        for path in files_under(aside):
            _fsync(path)
        write_atomically(aside / RECORD_FILE, record.model_dump_json(indent=1).encode())
        aside.rename(directory)
        _fsync(parent)
    return directory, record, False


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with aside.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    aside.rename(path)
    _fsync(path.parent)


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


class ContentHashes:
    """Content hashes of raw inputs, remembered by (path, size, mtime).

    So a second run over a 60 GB bundle answers in seconds. A folder's hash is of its files'
    relative paths and hashes.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[str, str] = json.loads(memory.read_text()) if memory.exists() else {}

    def of(self, path: Path) -> str:
        """20 hex digits for a file or a folder."""
        if path.is_dir():
            return digest([[str(p.relative_to(path)), self._file(p)] for p in files_under(path)])
        return self._file(path)[:20]

    def save(self) -> None:
        write_atomically(self._memory, json.dumps(self._known, indent=0, sort_keys=True).encode())

    def _file(self, path: Path) -> str:
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in self._known:
            self._known[key] = sha256_of(path)
        return self._known[key]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
