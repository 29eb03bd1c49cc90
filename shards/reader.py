"""Samples from tars: each by one positioned read, checked, or told as what is wrong with it."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from imagecodecs import deflate_crc32  # on a patch, 3 to 8 times as fast as zlib's

from shards.artifact import sha256_of
from shards.cache import Cache, Entry, cache_bytes
from shards.copies import fetch_checked
from shards.errors import BadInput, BadSetting
from shards.index import (
    FETCH_AGAIN,
    HEADER_BYTES,
    ROW_BYTES,
    Shard,
    Span,
    open_index,
    sample_fault,
    span_at,
)
from shards.mix import Parts
from shards.order import as_indices
from shards.remote import RemotePath, persistent_range

Verify = Literal["crc32", "sha256"]

_SPARE_FILES: Final = 256  # of the limit of open files, left to the rest of the process

_GONE: Final = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
_FAULTS_OF_A_FILE: Final = _GONE | {errno.EACCES, errno.EIO, errno.EISDIR, errno.EPERM}


class Pair(NamedTuple):
    """One sample as read: encoded image, and counts against the panel `Stream.panels[panel]`.

    `counts` is (2, n) and `neighbors` (3, m), as in the tar; None where the sample has none. All
    are views of what was read, which lives as long as they do.
    """

    jpeg: memoryview
    counts: npt.NDArray[np.unsignedinteger[Any]] | None
    neighbors: npt.NDArray[np.unsignedinteger[Any]] | None
    panel: int


class Reader(ABC):
    """Reads samples of a stream, on the way that suits where the tars lie. One a process.

    Not to be used by two threads at a time, nor on both sides of a fork. Closed at the end of a
    `with`.
    """

    def __init__(
        self, shards: Sequence[Shard], parts: Parts, index_cache: Path, verify: Verify
    ) -> None:
        self._shards = shards
        self._parts = parts
        self._index_cache = index_cache
        self._files = Files(shards, verify)

    @abstractmethod
    def each(self, indices: npt.ArrayLike) -> Iterator[tuple[int, Pair | BadInput]]:
        """Every sample of `indices`, with its place in them, in the order of reading.

        What is wrong with a sample, or with the whole of its shard, comes in its place. Raises
        BadSetting where no sample is at fault, and OSError as the system gives it.
        """

    @abstractmethod
    def expect(self, indices: npt.ArrayLike) -> None:
        """Tell what a coming call of `each` will ask for: once for each call, in their order.

        What it is good for is the reader's business; samples are the same without.
        """

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class GlobalReader(Reader):
    """Reads any sample by one positioned read, and keeps files open: for local disks.

    `expect` has no use here.
    """

    def __init__(
        self, shards: Sequence[Shard], parts: Parts, index_cache: Path, verify: Verify
    ) -> None:
        super().__init__(shards, parts, index_cache, verify)
        self._files.check_room()
        # By shard: its tar and its index, in the order of opening. Both hold a file open.
        self._opened: dict[int, tuple[int, mmap.mmap]] = {}
        self._most_opened = _files_allowed(2 * len(shards)) // 2

    def each(self, indices: npt.ArrayLike) -> Iterator[tuple[int, Pair | BadInput]]:
        wanted = as_indices(indices)
        places = np.argsort(wanted, kind="stable")
        shards, rows = self._parts.locate(wanted[places])
        for place, s, row in zip(places.tolist(), shards.tolist(), rows.tolist(), strict=True):
            yield place, self._read(s, row)

    def expect(self, indices: npt.ArrayLike) -> None:
        pass

    def close(self) -> None:
        while self._opened:
            self._close_one()

    def _read(self, s: int, row: int) -> Pair | BadInput:
        try:
            file, index = self._opened.get(s) or self._open(s)
        except BadSetting:
            raise
        except BadInput as fault:
            return fault
        span = span_at(index, HEADER_BYTES + row * ROW_BYTES)
        shard = self._shards[s]
        try:
            data = read_at(file, span.size, span.start, shard)
        except BadInput as fault:
            return fault
        return unpacked(data, span, shard, row)

    def _open(self, s: int) -> tuple[int, mmap.mmap]:
        if len(self._opened) >= self._most_opened:
            self._close_one()
        index = open_index(self._shards[s], self._index_cache)
        try:
            file = self._files.open(s)
        except BadInput:
            index.close()
            raise
        self._opened[s] = file, index
        return file, index

    def _close_one(self) -> None:
        s = next(iter(self._opened))
        file, index = self._opened.pop(s)
        os.close(file)
        self._files.let_go(s)
        index.close()


class Files:
    """Opens the tars of a stream, each checked against its manifest.

    Of tars behind URLs, it is copies in the cache that are opened; `read` needs none.
    """

    def __init__(self, shards: Sequence[Shard], verify: Verify) -> None:
        self._shards = shards
        self._verify = verify
        self._hashed: dict[int, BadInput | None] = {}
        self._copies: dict[int, Entry] = {}

    def check_room(self) -> None:
        """Raise BadSetting where copies of all tars behind URLs would not fit into the cache."""
        n_bytes = sum(
            shard.info.tar_bytes for shard in self._shards if isinstance(shard.tar, RemotePath)
        )
        if n_bytes > cache_bytes():
            raise BadSetting(
                "data_loading.reading",
                expected='"block", which reads large pieces and keeps no copies',
                found=f'"global", for which {n_bytes} bytes of tars would be fetched into a cache '
                f"of {cache_bytes()}",
                remedy="set it to block, or raise CELLPAIR_CACHE_BYTES",
            )

    def open(self, s: int) -> int:
        """A file descriptor of shard `s`, for the caller to close; then `let_go` of it.

        Raises BadInput where the tar is gone or of another size, and, with sha256, of other content
        when it was first opened.
        """
        shard = self._shards[s]
        try:
            file = os.open(self._local(s), os.O_RDONLY)
        except OSError as error:
            raise lost(shard, error) from error
        try:
            n_bytes = os.fstat(file).st_size
            if n_bytes != shard.info.tar_bytes:
                raise wrong_size(shard, f"{n_bytes} bytes")
            if self._verify == "sha256" and (fault := self._fault_in(s)) is not None:
                raise fault
        except BaseException:
            os.close(file)
            raise
        return file

    def let_go(self, s: int) -> None:
        """Shard `s` is open no more."""
        if (copy := self._copies.pop(s, None)) is not None:
            copy.close()

    def read(self, s: int, start: int, n_bytes: int) -> memoryview:
        """So many bytes of shard `s`, or what there is of them. Raises as `open`."""
        shard = self._shards[s]
        if isinstance(shard.tar, RemotePath):
            if self._verify == "sha256" and (fault := self._fault_in(s)) is not None:
                raise fault
            try:
                return memoryview(persistent_range(shard.tar, start, start + n_bytes))
            except OSError as error:
                raise lost(shard, error) from error
        file = self.open(s)
        try:
            return read_at(file, n_bytes, start, shard)
        finally:
            os.close(file)

    def _local(self, s: int) -> Path:
        """The tar, or its copy, which has the hash that the manifest says."""
        tar, info = self._shards[s].tar, self._shards[s].info
        if isinstance(tar, Path):
            return tar
        entry = self._copies.get(s) or Cache.of_user().entry(f"shard-{info.tar_sha256}")
        self._copies[s] = entry
        copy = entry.folder / tar.name
        with entry.filling():
            if not copy.exists():
                entry.make_room(info.tar_bytes, tar)
                fetch_checked(tar, tar.stat(), copy, info.tar_sha256)
        return copy

    def _fault_in(self, s: int) -> BadInput | None:
        if s not in self._hashed:
            shard = self._shards[s]
            tar, want = shard.tar, shard.info.tar_sha256
            found = sha256_of(tar) if isinstance(tar, Path) else tar.sha256()
            self._hashed[s] = (
                None
                if found == want
                else BadInput(
                    shard.tar,
                    expected=f"the tar that the manifest names, sha256 {want}",
                    found=f"sha256 {found}",
                    remedy=FETCH_AGAIN,
                )
            )
        return self._hashed[s]


def read_at(file: int, n_bytes: int, start: int, shard: Shard) -> memoryview:
    """So many bytes of the shard's tar, or what there is of them. Raises BadInput as `lost`."""
    try:
        data = os.pread(file, n_bytes, start)
        while len(data) < n_bytes:  # a system may give less than it has
            more = os.pread(file, n_bytes - len(data), start + len(data))
            if not more:
                break
            data += more
    except OSError as error:
        raise lost(shard, error) from error
    return memoryview(data)


def unpacked(data: memoryview, span: Span, shard: Shard, row: int) -> Pair | BadInput:
    """The sample in `data`, the bytes of `span`, if they are whole; else what is wrong with it."""
    _, size, jpg_size, counts_at, counts_size, neighbors_at, neighbors_size, crc32 = span
    jpeg = data[:jpg_size]
    crc = deflate_crc32(jpeg)  # type: ignore[arg-type]  # takes any buffer
    counts = neighbors = None
    try:
        if counts_size:
            content = data[counts_at : counts_at + counts_size]
            crc = zlib.crc32(content, crc)  # the faster of the two on little
            counts = npy_rows(content, 2)
        if neighbors_size:
            content = data[neighbors_at:size]
            crc = deflate_crc32(content, crc)  # type: ignore[arg-type]  # as above
            neighbors = npy_rows(content, 3)
    except (ValueError, IndexError):
        damaged = True
    else:
        damaged = crc != crc32 or len(data) != size
    if damaged:
        return sample_fault(
            shard,
            row,
            expected=f"{size} bytes with crc32 {crc32:08x}, and arrays in npy format",
            found=f"{len(data)} bytes with crc32 {crc:08x}",
        )
    return Pair(jpeg, counts, neighbors, shard.panel)


_U2: Final = np.dtype("<u2")
_U4: Final = np.dtype("<u4")


def npy_rows(content: memoryview, n_rows: int) -> npt.NDArray[np.unsignedinteger[Any]]:
    # Version 1.0 of the npy format, whose header length is bytes 8 and 9 and whose header begins
    # with the type; the general reader of numpy evaluates the header and costs 25 times this.
    start = 10 + content[8] + 256 * content[9]
    dtype = _U2 if bytes(content[20:25]) == b"'<u2'" else _U4
    rows: npt.NDArray[np.unsignedinteger[Any]] = np.frombuffer(content, dtype, offset=start)
    return rows.reshape(n_rows, -1)


def wrong_size(shard: Shard, found: str) -> BadInput:
    return BadInput(
        shard.tar, expected=f"{shard.info.tar_bytes} bytes", found=found, remedy=FETCH_AGAIN
    )


def lost(shard: Shard, error: OSError) -> BadInput:
    """The error about a tar that can be read no more. Raises what is no fault of that file."""
    if error.errno not in _FAULTS_OF_A_FILE:
        raise error
    return BadInput(
        shard.tar,
        expected="a tar that can be read",
        found="no such file" if error.errno in _GONE else str(error.strerror),
        remedy=FETCH_AGAIN,
    )


def _files_allowed(wanted: int) -> int:
    """How many files this process may open, `wanted` at most; the soft limit is raised for it."""
    wanted += _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        except (ValueError, OSError):
            pass  # some systems have a lower limit of their own
        else:
            soft = raised
    allowed = wanted if soft == resource.RLIM_INFINITY else min(soft, wanted)
    return max(2, allowed - min(_SPARE_FILES, allowed // 2))
