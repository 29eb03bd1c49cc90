"""The folder of an export: whole under its name, or not there; what it was made of told inside."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from shards.artifact import files_under, fsync, write_atomically
from shards.errors import BadInput
from shards.lock import hold
from shards.schema import Record, Split

EXPORT_FILE: Final = "export.json"
Format = Literal["spatialdata", "h5ad", "openclip"]
# What the cells of a SpatialData store are drawn by.
Outlines = Literal["instrument", "circles"]


class ExportedFile(Record):
    """One file, store or folder of an export."""

    n_samples: int
    n_bytes: int


class Export(Record):
    """`export.json`, written last: the dataset, what was taken of it, and where it lies.

    `options` are those that change the files, `notes` what a reader of them should know.
    """

    schema_version: Literal[1] = 1
    to: Format
    cellpair: str
    dataset: str
    fingerprint: str
    runs: tuple[str, ...]
    samples: dict[Split, int]
    options: dict[str, int | str]
    files: dict[str, ExportedFile]
    notes: tuple[str, ...]


def publish(out: Path, make: Callable[[Path], Export]) -> Export:
    """Make an export in a folder aside, which then becomes `out`; after an error nothing is left.

    What a killed export left aside is removed. Raises BadInput where `out` is there.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.export.partial")
    with hold(out.with_name(f".{out.name}.export.lock"), f"export {out}"):
        check_new(out)  # another export may have been waited for
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            record = make(aside)
            for path in files_under(aside):
                fsync(path)
            write_atomically(aside / EXPORT_FILE, record.model_dump_json(indent=1).encode())
            aside.rename(out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return record


def exported(path: Path, n_samples: int) -> ExportedFile:
    """The entry of a file or a folder that is written."""
    files = files_under(path) if path.is_dir() else [path]
    return ExportedFile(n_samples=n_samples, n_bytes=sum(file.stat().st_size for file in files))


def check_new(out: Path) -> None:
    """Raises BadInput where something is there."""
    if out.exists() or out.is_symlink():
        raise BadInput(
            f"--out {out}",
            expected="a folder that is not there yet",
            found="a file" if out.is_file() else "an existing folder",
            remedy="give another folder, or remove this one",
        )
