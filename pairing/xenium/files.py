"""The files of a Xenium run: a bundle in a folder or in a zip; a store told by its folders."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Protocol

import pyarrow as pa

from shards.errors import BadInput

MANIFEST = "experiment.xenium"


_PARSE_ERRORS = (
    pa.ArrowInvalid,
    json.JSONDecodeError,
    zipfile.BadZipFile,
    KeyError,
    UnicodeDecodeError,
)


@contextmanager
def parsed(path: Path) -> Iterator[None]:
    """Around the parsing of a file: turns a complaint of the library into a BadInput."""
    try:
        yield
    except (*_PARSE_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the file's
        raise BadInput(
            path,
            expected="a whole file, as the instrument writes it",
            found=f"{type(error).__name__}: {error}",
            remedy="copy the file again from the instrument's output",
        ) from error


def is_spatialdata(path: Path) -> bool:
    """Whether a folder is a zarr store with a table and transcripts or labels beside it."""
    is_zarr = any((path / name).is_file() for name in (".zgroup", "zarr.json"))
    return is_zarr and (path / "tables").is_dir() and (path / "points").is_dir()


class BundleFiles(Protocol):
    """Names of a bundle's files, with / between folders, and each as a file on disk."""

    names: frozenset[str]

    def path(self, name: str) -> Path: ...


class FolderFiles:
    """The files of a bundle folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        found = [p for p in (*folder.glob("*"), *folder.glob("morphology_focus/*")) if p.is_file()]
        self.names = frozenset(
            p.relative_to(folder).as_posix() for p in found if not p.name.startswith("._")
        )

    def path(self, name: str) -> Path:
        return self._folder / name


class ZipFiles:
    """The files of a zipped bundle; each is extracted when it is first asked for.

    The bundle may lie in one folder of the archive. Raises BadInput on an archive whose members
    would be written outside the folder that they are extracted to, or that is damaged.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._path = path
        self._zip = stack.enter_context(zipfile.ZipFile(path))
        self._out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xenium-")))
        members = [i.filename for i in self._zip.infolist() if not i.is_dir()]
        for member in members:
            parts = PurePosixPath(member).parts
            if member.startswith("/") or ".." in parts or "\\" in member or ":" in parts[0]:
                raise BadInput(
                    path,
                    expected="members with relative names",
                    found=f"{member!r}",
                    remedy="pack the bundle again; this archive is not an instrument's",
                )
        kept = [m for m in members if not m.startswith("__MACOSX/") and "/._" not in f"/{m}"]
        tops = [m.removesuffix(MANIFEST) for m in kept if PurePosixPath(m).name == MANIFEST]
        if len(tops) != 1:
            raise BadInput(
                path,
                expected=f"a zip of one Xenium bundle, with one {MANIFEST}",
                found=f"{len(tops)} of them among {len(kept)} files",
                remedy="give the zip of one run's output folder",
            )
        self._top = tops[0]
        self.names = frozenset(m.removeprefix(self._top) for m in kept if m.startswith(self._top))

    def path(self, name: str) -> Path:
        target = self._out / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            try:
                with self._zip.open(self._top + name) as member, part.open("wb") as out:
                    shutil.copyfileobj(member, out, 1 << 20)
            except zipfile.BadZipFile as error:
                raise BadInput(
                    f"{self._path}, {name}",
                    expected="a member that unpacks",
                    found=str(error),
                    remedy="download the archive again",
                ) from error
            part.rename(target)
        return target
