"""The files of a Xenium run: a bundle in a folder or in a zip; a store told by its folders."""

from __future__ import annotations

import lzma
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

import pyarrow as pa

from shards.errors import BadInput

MANIFEST = "experiment.xenium"
# Folders of a bundle whose files are read; what else it holds (analysis/, aux_outputs/) is not.
_FOLDERS = ("morphology_focus", "cell_feature_matrix")
# Names that WinSCP, browsers, curl and rsync give to a file until it is whole.
_UNFINISHED = re.compile(
    r".+\.(part|partial|filepart|crdownload|download|tmp)"
    r"|\..+\.(parquet|tif|zip|h5|gz|json|xenium)\.[A-Za-z0-9]{6}"
)

# Names of tables, masks, matrices and images; a folder of such a name is none of them.
_FILE_NAME = re.compile(r".+\.(parquet|csv\.gz|zarr\.zip|h5|json|ome\.tif)")

# What the libraries that parse a bundle raise where a file is damaged; RuntimeError is of codecs
# (which refuse to unpickle, too) and, as RecursionError, of JSON that is nested too deeply.
_PARSE_ERRORS = (
    pa.ArrowException,
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)

# NotImplementedError: what Windows packs above 2 GB is "deflate64", read by few. RuntimeError: a
# member is encrypted.
_UNPACK_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
)


@contextmanager
def parsed(path: Path) -> Iterator[None]:
    """Around the parsing of a file: turns a complaint of the library into a BadInput."""
    try:
        yield
    except BadInput:
        raise
    except (*_PARSE_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the file's
        raise BadInput(
            path,
            expected="a whole file, as the instrument writes it",
            found=f"{type(error).__name__}: {error}",
            remedy="wait until the run is copied, or copy the file again",
        ) from error


def is_spatialdata(path: Path) -> bool:
    """Whether a folder is a zarr store with a table and transcripts or labels beside it."""
    is_zarr = any((path / name).is_file() for name in (".zgroup", "zarr.json"))
    return is_zarr and (path / "tables").is_dir() and (path / "points").is_dir()


class BundleFiles(Protocol):
    """Names of a bundle's files, with / between folders, and each as a file on disk.

    Of the files that a manifest lists many are missing in bundles that are shared, so that what
    is still being copied is told by the names of unfinished files, by empty ones, and by what is
    needed and not there. Raises BadInput on construction where a file is unfinished by its name,
    and on a file without content when it is asked for.
    """

    names: frozenset[str]

    def path(self, name: str) -> Path: ...

    def open(self, name: str) -> IO[bytes]:
        """The file to look into without having all of it on disk."""


class FolderFiles:
    """The files of a bundle folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        patterns = ("*", *(f"{name}/*" for name in _FOLDERS))
        found = [p for pattern in patterns for p in folder.glob(pattern)]
        for path in found:
            if path.is_dir() and _FILE_NAME.fullmatch(path.name):
                raise BadInput(
                    path,
                    expected="a file, as the instrument writes it",
                    found="a folder",
                    remedy="copy the file from the instrument's output again",
                )
        files = (p.relative_to(folder).as_posix() for p in found if p.is_file())
        self.names = _finished(folder, files)

    def path(self, name: str) -> Path:
        return _with_content(self._folder / name)

    def open(self, name: str) -> IO[bytes]:
        return self.path(name).open("rb")


class ZipFiles:
    """The files of a zipped bundle; each is extracted when it is first asked for.

    The bundle may lie in one folder of the archive. Raises BadInput on an archive with members
    that are links, or would be written outside the folder that they are extracted to, or that is
    damaged; and, on extracting, where a member is larger than the disk has room for.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._path = path
        with parsed(path):
            self._zip = stack.enter_context(zipfile.ZipFile(path))
        self._out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xenium-")))
        infos = [i for i in self._zip.infolist() if not i.is_dir()]
        members = [i.filename for i in infos]
        for info in infos:
            member, parts = info.filename, PurePosixPath(info.filename).parts
            is_link = stat.S_ISLNK(info.external_attr >> 16)
            leaves = not parts or member.startswith("/") or ".." in parts or ":" in parts[0]
            if is_link or leaves or "\\" in member:
                raise BadInput(
                    path,
                    expected="members that are files with relative names",
                    found=f"{'a link, ' if is_link else ''}{member!r}",
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
        inside = (m.removeprefix(self._top) for m in kept if m.startswith(self._top))
        self.names = _finished(path, inside)

    def path(self, name: str) -> Path:
        target = self._out / name
        if not target.exists():
            self._check_room(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            with self.open(name) as member, part.open("wb") as out, self._unpacking(name):
                shutil.copyfileobj(member, out, 1 << 20)
            part.rename(target)
        return _with_content(target)

    def open(self, name: str) -> IO[bytes]:
        with self._unpacking(name):
            return self._zip.open(self._top + name)

    def _check_room(self, name: str) -> None:
        # More than it declares a member never unpacks to: the rest is not read.
        n_bytes = self._zip.getinfo(self._top + name).file_size
        n_free = shutil.disk_usage(self._out).free
        if n_bytes > n_free:
            raise BadInput(
                f"{self._path}, {name}",
                expected=f"a member that {self._out.parent} has room for, {n_free:,} bytes",
                found=f"{n_bytes:,} bytes when unpacked",
                remedy="unpack the archive where there is room, and give the folder",
            )

    @contextmanager
    def _unpacking(self, name: str) -> Iterator[None]:
        try:
            yield
        except _UNPACK_ERRORS as error:
            raise BadInput(
                f"{self._path}, {name}",
                expected="a member that unpacks",
                found=str(error),
                remedy="download the archive again, or unpack it and give the folder",
            ) from error


def _finished(where: Path, names: Iterable[str]) -> frozenset[str]:
    """The names without those that macOS adds."""
    kept = frozenset(n for n in names if not PurePosixPath(n).name.startswith("._"))
    unfinished = sorted(n for n in kept if _UNFINISHED.fullmatch(PurePosixPath(n).name))
    if unfinished:
        raise BadInput(
            where,
            expected="a bundle that is copied whole",
            found=f"{unfinished[0]}, the name of a file that is still being copied",
            remedy="wait until the copying has ended; remove that file if it was broken off",
        )
    return kept


def _with_content(path: Path) -> Path:
    if path.stat().st_size == 0:
        raise BadInput(
            path,
            expected="a file with content",
            found="0 bytes, as of a file that is still being copied",
            remedy="wait until the run is copied, or copy the file again",
        )
    return path
