"""Files behind a URL, on S3 or whatever else fsspec opens: a path that is asked over the network.

Credentials come from where the store's own client finds them (for S3: the environment, or the
files of the AWS command line), never from a URL, which is written into configs, logs and records.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import posixpath
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import BeforeValidator
from pydantic_core import core_schema

from shards.errors import BadInput

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

log = logging.getLogger("cellpair")

# One request each: large enough that its round trip does not count, small enough that a lost
# connection loses little.
CHUNK_BYTES: Final = 8 << 20
_AHEAD: Final = 4
# What S3's client makes of "internal error" and "slow down".
_BUSY: Final = (getattr(errno, "EREMOTEIO", errno.EIO), errno.EIO, errno.EBUSY)
PAUSES_S: Final = (1.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True)
class ObjectFacts:
    """What a store tells of an object: its size, and what changes whenever its content does."""

    st_size: int
    version: str


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A file or a folder behind `url`, with those of `Path`'s methods that readers need.

    Holds no connection and can be pickled. What a method raises names the URL: FileNotFoundError,
    PermissionError, ConnectionError where the store does not answer (worth another try), BadInput
    where it wants credentials and finds none, and other OSErrors as the store gives them.
    """

    url: str

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        text = core_schema.to_string_ser_schema(when_used="json")
        return core_schema.is_instance_schema(cls, serialization=text)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, relative: str | Path) -> RemotePath:
        return RemotePath(f"{self.url}/{relative}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.url.rpartition("/")[0])

    def with_suffix(self, suffix: str) -> RemotePath:
        return self.parent / f"{self.stem}{suffix}"

    def stat(self) -> ObjectFacts:
        """Of a file. Raises FileNotFoundError for a folder too."""
        with _asking(self) as (fs, path):
            info = fs.info(path)
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "a folder, not a file", self.url)
        return _facts(info)

    def is_file(self) -> bool:
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        with _asking(self) as (fs, path):
            return bool(fs.isdir(path))

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def files(self, depth: int | None = None) -> dict[str, ObjectFacts]:
        """The files below a folder by their paths in it, ordered as those of a local folder are.

        With `depth` 1 those that lie in it directly. macOS `._*` leftovers are no content. Empty
        where there is no such folder.
        """
        with _asking(self) as (fs, path):
            found = fs.find(path, maxdepth=depth, detail=True)
        prefix = f"{path.rstrip('/')}/"
        below = {
            name.removeprefix(prefix): _facts(info)
            for name, info in found.items()
            if name.startswith(prefix) and not name.endswith("/")
        }
        names = (n for n in below if not n.rpartition("/")[2].startswith("._"))
        return {name: below[name] for name in sorted(names, key=lambda n: n.split("/"))}

    def names(self) -> list[str]:
        """Names of the files and folders that lie in a folder directly."""
        with _asking(self) as (fs, path):
            try:
                return sorted(n.rstrip("/").rpartition("/")[2] for n in fs.ls(path, detail=False))
            except FileNotFoundError:
                return []

    def read_bytes(self) -> bytes:
        with _asking(self) as (fs, path):
            return bytes(fs.cat_file(path))

    def read_range(self, start: int, end: int) -> bytes:
        """The bytes `start` … `end` - 1, or what there is of them."""
        with _asking(self) as (fs, path):
            try:
                return bytes(fs.cat_file(path, start=start, end=end))
            except OSError as error:
                # S3 has no other word for a range that lies behind the end of the object.
                if error.errno == errno.EINVAL and fs.size(path) <= start:
                    return b""
                raise

    def write_bytes(self, data: bytes) -> None:
        """Put the object, whole or not at all."""
        with _asking(self) as (fs, path):
            fs.pipe_file(path, data)

    def create(self, data: bytes) -> bool:
        """Put the object unless there is one; whether it was put.

        Exclusive where the store has conditional puts, as S3 has.
        """
        with _asking(self) as (fs, path):
            try:
                fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            except NotImplementedError:
                fs.pipe_file(path, data)
        return True

    def upload(self, source: Path) -> ObjectFacts:
        """Put a local file, in parts where it is large; whole or not at all."""
        with _asking(self) as (fs, path):
            fs.put_file(str(source), path)
        return self.stat()

    def remove(self, names: Sequence[str]) -> None:
        """Remove files below this folder; those that are gone already are no error."""
        with _asking(self) as (fs, path):
            for name in names:
                try:
                    fs.rm_file(f"{path}/{name}")
                except FileNotFoundError:
                    continue

    def download(self, facts: ObjectFacts, target: Path) -> str:
        """Write the object of these facts to `target`; returns its SHA-256.

        Goes on from what an earlier try of the same facts has left there. Raises BadInput where the
        object is another by the end: then nothing is left.
        """
        sha = hashlib.sha256()
        with target.open("a+b") as out:
            out.seek(0)
            while chunk := out.read(CHUNK_BYTES):
                sha.update(chunk)
            for chunk in self._chunks(out.tell(), facts.st_size):
                sha.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
            n_bytes = out.tell()
        found = self.stat()
        if found != facts or n_bytes != facts.st_size:
            target.unlink()
            raise BadInput(
                self,
                expected=f"an object that stays as it is while it is fetched, {facts.st_size} "
                "bytes",
                found=f"{n_bytes} bytes, of one of {found.st_size}",
                remedy="wait until it is written whole, then run again",
            )
        return sha.hexdigest()

    def sha256(self) -> str:
        """Of the object as it is now; nothing is kept of it."""
        sha = hashlib.sha256()
        for chunk in self._chunks(0, self.stat().st_size):
            sha.update(chunk)
        return sha.hexdigest()

    def _chunks(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end`, a few requests ahead."""
        starts = iter(range(start, end, CHUNK_BYTES))
        under_way: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(_AHEAD, thread_name_prefix="fetch") as pool:
            for at in starts:
                if len(under_way) == _AHEAD:
                    yield under_way.popleft().result()
                last = min(at + CHUNK_BYTES, end)
                under_way.append(pool.submit(self.read_range, at, last))
            while under_way:
                yield under_way.popleft().result()


def is_url(text: str) -> bool:
    """Whether a text that names a file or a folder is a URL."""
    return "://" in text


def _of_url(value: object) -> object:
    return remote_path(value) if isinstance(value, str) and is_url(value) else value


# A local file or folder, or one behind a URL; a field of a record takes it as a text, too.
Location = Annotated[Path | RemotePath, BeforeValidator(_of_url)]


def location(text: str) -> Path | RemotePath:
    """What a text names: a local path, or a URL. Raises BadInput as `remote_path`."""
    return remote_path(text) if is_url(text) else Path(text)


def remote_path(url: str) -> RemotePath:
    """The file or folder behind a URL; nothing is asked.

    Raises BadInput for a URL that holds credentials (a name, or the signature of a signed one), one
    of several joined by `::`, `file://`, and a protocol that is unknown or not installed.
    """
    parts = urlsplit(url)
    hidden = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if "@" in parts.netloc or parts.query:
        raise BadInput(
            hidden,
            expected="a URL without a name, a password, a query or a signature",
            found="one that has such a part (left out here)",
            remedy="give credentials by the environment, as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or by the files of the AWS command line",
        )
    if parts.scheme in ("file", "local") or "::" in url or not parts.netloc:
        raise BadInput(
            hidden,
            expected="a URL as s3://bucket/folder",
            found="a local file" if parts.scheme in ("file", "local") else "another kind of URL",
            remedy="write the path of a local file without file://, and of a URL all its parts",
        )
    from fsspec import get_filesystem_class

    try:
        get_filesystem_class(parts.scheme)
    except (ValueError, ImportError) as error:
        raise BadInput(
            hidden,
            expected="a protocol that fsspec has here, as s3://",
            found=str(error),
            remedy="mend it, or install the package that it is of",
        ) from error
    return RemotePath(url.rstrip("/"))


def _facts(info: dict[str, Any]) -> ObjectFacts:
    # Which of these a store has is its own affair; S3 and most others have an ETag.
    version = next(
        (str(info[k]) for k in ("ETag", "etag", "LastModified", "mtime", "created") if k in info),
        "",
    )
    return ObjectFacts(int(info["size"]), version.strip('"'))


@contextmanager
def _asking(remote: RemotePath) -> Iterator[tuple[AbstractFileSystem, str]]:
    """The file system of the URL and the path in it; what is raised inside is put into words."""
    fs = _filesystem(urlsplit(remote.url).scheme, os.getpid())
    try:
        yield fs, str(fs._strip_protocol(remote.url))
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "nothing there", remote.url) from error
    except PermissionError as error:
        words = f"access denied ({error})"
        raise PermissionError(errno.EACCES, words, remote.url) from error
    except _no_answers() as error:
        if "credentials" in str(error).lower():
            raise BadInput(
                remote,
                expected="credentials of the store",
                found=str(error),
                remedy="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
            ) from error
        raise _away(remote, error) from error
    except OSError as error:
        if error.errno in _BUSY:
            raise _away(remote, error) from error
        raise


def _away(remote: RemotePath, error: BaseException) -> ConnectionError:
    return ConnectionError(
        f"{remote.url}: the store does not answer ({type(error).__name__}: {error}); what is there "
        "stays as it is: run the same command again to go on"
    )


@cache
def _filesystem(protocol: str, pid: int) -> AbstractFileSystem:
    """The client of a store, one for all threads of a process, and another behind a fork."""
    import fsspec  # a second, with the client of S3

    # Parts of 50 MB, two at a time, of as many files as are uploaded at a time.
    options = {"max_concurrency": 2} if protocol in ("s3", "s3a") else {}
    # Listings are not kept: others write there too.
    fs: AbstractFileSystem = fsspec.filesystem(
        protocol, use_listings_cache=False, skip_instance_cache=True, **options
    )
    return fs


def persistent_range(remote: RemotePath, start: int, end: int) -> bytes:
    """As `read_range`, tried again after pauses where the store does not answer: a network's bad
    moment must not end what has run for days."""
    for pause_s in PAUSES_S:
        try:
            return remote.read_range(start, end)
        except ConnectionError as error:
            log.warning("%s; tried again in %.0f s", error, pause_s)
            time.sleep(pause_s)
    return remote.read_range(start, end)


def _no_answers() -> tuple[type[Exception], ...]:
    """What clients of stores raise for want of an answer; looked up when something was raised."""
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError

    return BotoCoreError, ClientError, ConnectionError, TimeoutError
