"""Where the members of each sample lie: a flat copy of the index tables, kept once a machine.

A table beside a tar is made for people and filters; reading it takes longer than reading a sample.
So what a reader needs of it is kept as 20 bytes a sample, memory-mapped, in a cache folder under
the table's SHA-256. It can be thrown away at any time: it is made again from the table.
"""

from __future__ import annotations

import hashlib
import io
import logging
import mmap
import os
import struct
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shards.artifact import write_atomically
from shards.cache import cache_folder
from shards.errors import BadInput, BadSetting
from shards.remote import Location
from shards.schema import Manifest, ShardInfo

log = logging.getLogger("cellpair")

FETCH_AGAIN: Final = "fetch the shard again, or curate the run again"

HEADER_BYTES: Final = 16
ROW_BYTES: Final = 20
_HEADER: Final = struct.Struct("<8sII")  # magic and version, rows, crc32 of the rows
_MAGIC: Final = b"cpindex1"
_ROW: Final = struct.Struct("<5I")
# The image's offset is in blocks of a tar. Counts and neighbours follow it, each behind its header;
# size 0 is a member that the sample lacks.
_ROW_DTYPE: Final = np.dtype(
    [
        ("jpg_block", "<u4"),
        ("jpg_size", "<u4"),
        ("counts_size", "<u4"),
        ("neighbors_size", "<u4"),
        ("crc32", "<u4"),
    ]
)
# Of a size: the member's name is longer than the 100 bytes of a plain header, which GNU tar puts
# into two blocks in front of it.
_LONG_NAME: Final = 1 << 31
_BLOCK: Final = tarfile.BLOCKSIZE
_LONG_NAME_BYTES: Final = 2 * _BLOCK
_MEMBERS: Final = ("jpg", "counts", "neighbors")


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar with its table, as its manifest knows it; `panel` is its place in the stream's."""

    tar: Location
    manifest: Manifest
    info: ShardInfo
    panel: int

    @property
    def table(self) -> Location:
        return self.tar.with_suffix(".parquet")

    @property
    def n_samples(self) -> int:
        return self.info.n_samples


class Span(NamedTuple):
    """Where one sample lies: `size` bytes of its tar from `start` (the image's first byte) on.

    Places of the members are counted from `start`; a member of size 0 is not there.
    """

    start: int
    size: int
    jpg_size: int
    counts_at: int
    counts_size: int
    neighbors_at: int
    neighbors_size: int
    crc32: int


def span_at(rows: mmap.mmap | bytes, at: int) -> Span:
    """The sample whose row of the index starts at byte `at` of `rows`."""
    block, jpg_size, counts_size, neighbors_size, crc32 = _ROW.unpack_from(rows, at)
    size, counts_at, neighbors_at = jpg_size, 0, 0
    if counts_size:
        counts_at = (size + _BLOCK - 1) // _BLOCK * _BLOCK + _BLOCK
        if counts_size >= _LONG_NAME:
            counts_size -= _LONG_NAME
            counts_at += _LONG_NAME_BYTES
        size = counts_at + counts_size
    if neighbors_size:
        neighbors_at = (size + _BLOCK - 1) // _BLOCK * _BLOCK + _BLOCK
        if neighbors_size >= _LONG_NAME:
            neighbors_size -= _LONG_NAME
            neighbors_at += _LONG_NAME_BYTES
        size = neighbors_at + neighbors_size
    start = block * _BLOCK
    return Span(start, size, jpg_size, counts_at, counts_size, neighbors_at, neighbors_size, crc32)


def default_cache() -> Path:
    """Folder of the index files: below $CELLPAIR_CACHE, else the user's cache folder."""
    return cache_folder() / "index"


def index_file(shard: Shard, cache: Path) -> Path:
    return cache / f"{shard.info.table_sha256}.index"


def open_index(shard: Shard, cache: Path) -> mmap.mmap:
    """The shard's rows, memory-mapped, behind a header; made from the table where they are not.

    Raises BadInput where the table is missing, is not the one that the manifest names, or tells of
    members that do not lie in the tar as they are written, BadSetting where the cache can't be
    written.
    """
    path = index_file(shard, cache)
    if (rows := _mapped(path, shard.n_samples)) is None:
        if path.exists():
            log.warning("%s: damaged; made again from %s", path, shard.table)
        _build(shard, path)
        rows = _mapped(path, shard.n_samples)
    if rows is None:
        raise BadSetting(
            path,
            expected="the index file that was written just now",
            found="another content",
            remedy="look for a fault of the disk, or set CELLPAIR_CACHE to another folder",
        )
    return rows


def build_index(shards: Iterable[Shard], cache: Path) -> int:
    """Make the index files that are missing or wrong; returns how many. Raises as `open_index`."""
    built = 0
    for shard in shards:
        path = index_file(shard, cache)
        if (rows := _mapped(path, shard.n_samples)) is None:
            _build(shard, path)
            built += 1
        else:
            rows.close()
    return built


def _mapped(path: Path, n: int) -> mmap.mmap | None:
    """The file as it must be, or None."""
    n_bytes = HEADER_BYTES + n * ROW_BYTES
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != n_bytes:
                return None
            rows = mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with memoryview(rows) as whole:
        crc = zlib.crc32(whole[HEADER_BYTES:])
        right = whole[:HEADER_BYTES] == _HEADER.pack(_MAGIC, n, crc)
    if right:
        return rows
    rows.close()
    return None


def _build(shard: Shard, path: Path) -> None:
    rows = _rows_of(shard).tobytes()
    header = _HEADER.pack(_MAGIC, shard.n_samples, zlib.crc32(rows))
    try:
        write_atomically(path, header + rows)
    except OSError as error:
        raise BadSetting(
            path,
            expected="a cache folder that can be written",
            found=str(error.strerror),
            remedy="set CELLPAIR_CACHE to a folder that can be, on a local disk",
        ) from error


def _rows_of(shard: Shard) -> npt.NDArray[np.void]:
    table = _table_of(shard)
    columns = [f"{member}_{what}" for member in _MEMBERS for what in ("offset", "size")]
    try:
        found = pq.ParquetFile(io.BytesIO(table)).read(columns=[*columns, "crc32"])
        column = {name: _numbers(found[name]) for name in [*columns, "crc32"]}
    except (pa.ArrowException, KeyError) as error:
        raise _bad_table(shard, "a table with the columns of INDEX_SCHEMA", str(error)) from error
    if found.num_rows != shard.n_samples:
        raise _bad_table(shard, f"{shard.n_samples} rows", f"{found.num_rows} rows")
    rows = np.zeros(shard.n_samples, _ROW_DTYPE)
    start = column["jpg_offset"]
    lies_well = (start % _BLOCK == 0) & (start < _BLOCK << 32) & (column["jpg_size"] > 0)
    end = start + column["jpg_size"]
    for member in ("counts", "neighbors"):
        offset, size = column[f"{member}_offset"], column[f"{member}_size"]
        there = size > 0
        gap = offset - (end + (-end) % _BLOCK) - _BLOCK
        lies_well &= ~there | (gap == 0) | (gap == _LONG_NAME_BYTES)
        rows[f"{member}_size"] = size + np.where(there & (gap > 0), _LONG_NAME, 0)
        end = np.where(there, offset + size, end)
    lies_well[:-1] &= end[:-1] < start[1:]
    lies_well &= end <= shard.info.tar_bytes
    if not lies_well.all():
        raise _bad_table(
            shard,
            f"jpg, counts and neighbors of each sample one after the other in {shard.tar.name}",
            f"row {int(np.argmin(lies_well))} tells otherwise",
        )
    rows["jpg_block"], rows["jpg_size"] = start // _BLOCK, column["jpg_size"]
    rows["crc32"] = column["crc32"]
    return rows


def _numbers(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    # Not by to_numpy or fill_null: they import pandas, which takes a reading process seconds.
    return np.array([number or 0 for number in column.to_pylist()], dtype=np.int64)


def _table_of(shard: Shard) -> bytes:
    content = _content(shard.table)
    if (sha := hashlib.sha256(content).hexdigest()) != shard.info.table_sha256:
        raise _bad_table(
            shard,
            f"the table that the manifest names, sha256 {shard.info.table_sha256}",
            f"sha256 {sha}",
        )
    return content


def _content(table: Location) -> bytes:
    try:
        return table.read_bytes()
    except FileNotFoundError as error:
        raise no_table(table) from error


def _bad_table(shard: Shard, expected: str, found: str) -> BadInput:
    return BadInput(shard.table, expected=expected, found=found, remedy=FETCH_AGAIN)


def no_table(table: Location) -> BadInput:
    return BadInput(
        table,
        expected="the index table beside its tar",
        found="no such file",
        remedy=FETCH_AGAIN,
    )


def keys_of(shard: Shard, rows: Sequence[int]) -> list[str]:
    """Keys of the samples in `rows` of the shard, from its table. Raises BadInput without it."""
    column = pq.ParquetFile(io.BytesIO(_content(shard.table))).read(columns=["key"])["key"]
    return [str(column[row].as_py()) for row in rows]


def sample_fault(shard: Shard, row: int, *, expected: str, found: str) -> BadInput:
    """The error about the sample in a row of the shard, with its tar and key."""
    try:
        key = keys_of(shard, [row])[0]
    except (BadInput, pa.ArrowException):
        key = f"number {row}"  # its table is gone or broken too; this fault is told first
    return BadInput(
        f"{shard.tar}, sample {key}",
        expected=expected,
        found=found,
        remedy=f"{FETCH_AGAIN}: `cellpair check` names every damaged sample",
    )
