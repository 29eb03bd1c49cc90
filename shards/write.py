"""Pairs to tar shards with their index tables; the same input gives the same bytes."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import BadInput
from shards.schema import (
    COUNTS_MEMBER,
    IMAGE_MEMBER,
    INDEX_SCHEMA,
    NEIGHBORS_MEMBER,
    ShardInfo,
    donor_slug,
    sample_key,
)

MANIFEST_FILE = "manifest.json"

# Each member of a sample, in the tar's order, and what its columns begin with.
_MEMBERS = ((IMAGE_MEMBER, "jpg"), (COUNTS_MEMBER, "counts"), (NEIGHBORS_MEMBER, "neighbors"))
# Columns that follow from the tar.
_OF_THE_TAR = (*(f"{column}_{what}" for _, column in _MEMBERS for what in ("offset", "size")),
               "crc32")  # fmt: skip
# What is known of samples before they lie in a tar.
ROW_SCHEMA = pa.schema([field for field in INDEX_SCHEMA if field.name not in _OF_THE_TAR])
# Bytes that are written, and hashed, at once.
_WRITE_BYTES = 4 * 2**20
_PADDING = [b"\0" * n for n in range(tarfile.BLOCKSIZE)]

# The contents of a sample's members, in order; None where it lacks one (a slide without a run).
Contents = tuple[bytes, bytes | None, bytes | None]


@dataclass(frozen=True, slots=True)
class Sample:
    """One pair on its way into a tar.

    `counts` is (2, n) and `neighbors` (3, m) unsigned integers, as `narrow_counts` makes them;
    None where a sample has none (a slide without a Xenium run). `row` holds the metadata columns
    of `INDEX_SCHEMA`, without the key, the offsets, the sizes, the checksum, run, cell_id, donor.
    """

    cell_id: str
    donor: str
    image_jpeg: bytes
    counts: npt.NDArray[np.unsignedinteger[Any]] | None
    neighbors: npt.NDArray[np.unsignedinteger[Any]] | None
    row: dict[str, Any]


def narrow_counts(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.unsignedinteger[Any]]:
    """uint16 where every value fits, else uint32; counts are never clipped.

    Raises ValueError on negative values and on values beyond uint32.
    """
    top = int(rows.max(initial=0))
    if rows.min(initial=0) < 0 or top > np.iinfo(np.uint32).max:
        raise ValueError(f"indices and counts are 0 … 2^32 - 1, found {rows.min()} … {top}")
    return rows.astype(np.uint16 if top <= np.iinfo(np.uint16).max else np.uint32)


def write_shards(
    out_dir: Path, samples: Iterable[Sample], *, run: str, max_samples: int
) -> list[ShardInfo]:
    """Write tars and their index tables into `out_dir`, in the order of `samples`.

    A shard holds one donor, so samples come grouped by donor, and at most `max_samples`, which are
    in memory together. Raises BadInput on a cell id that a tar key cannot hold and on a repeated
    one, ValueError on a donor that comes back after another.
    """
    infos: list[ShardInfo] = []
    donors: set[str] = set()
    seen: set[str] = set()
    for donor, of_donor in groupby(samples, key=lambda s: s.donor):
        if donor in donors:
            raise ValueError(f"samples of donor {donor!r} are not contiguous")
        donors.add(donor)
        for number, chunk in enumerate(_chunks(of_donor, max_samples)):
            check_cell_ids(run, (sample.cell_id for sample in chunk), seen)
            rows = [
                dict(s.row, key=sample_key(run, s.cell_id), run=run, cell_id=s.cell_id, donor=donor)
                for s in chunk
            ]
            table = pa.Table.from_pylist(rows, schema=ROW_SCHEMA)
            name = shard_name(run, donor, number)
            paths = out_dir / f"{name}.tar", out_dir / f"{name}.parquet"
            infos.append(write_shard(*paths, name, table, map(_contents, chunk)))
    return infos


def _chunks(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    samples = iter(samples)
    while chunk := [sample for _, sample in zip(range(size), samples, strict=False)]:
        yield chunk


def _contents(sample: Sample) -> Contents:
    counts, neighbors = (
        None if array is None else npy_header(array.dtype.str, array.shape) + array.tobytes()
        for array in (sample.counts, sample.neighbors)
    )
    return sample.image_jpeg, counts, neighbors


def shard_name(run: str, donor: str, number: int) -> str:
    return f"{run}-{donor_slug(donor)}-{number:06d}"


def check_cell_ids(run: str, cell_ids: Iterable[str], seen: set[str]) -> None:
    """Raises BadInput on a cell id that a tar key cannot hold, and on one of `seen`: it grows."""
    for cell_id in cell_ids:
        # WebDataset ends a key at the first dot of the member's name; slashes are folders to it.
        if not cell_id or any(c in cell_id for c in "./\\\0"):
            raise BadInput(
                f"run {run}, cell {cell_id!r}",
                expected="a cell id without dots and slashes, since it names members of a tar",
                found=repr(cell_id),
                remedy="rename the cells of the bundle",
            )
        if cell_id in seen:
            raise BadInput(
                f"run {run}, cell {cell_id!r}",
                expected="every cell id once",
                found="the same id on two cells",
                remedy="rename the cells of the bundle",
            )
        seen.add(cell_id)


def write_shard(
    tar_path: Path, table_path: Path, name: str, table: pa.Table, contents: Iterable[Contents]
) -> ShardInfo:
    """Write a tar and its index table; returns what a manifest tells of them under this name.

    `table`, of ROW_SCHEMA, has a row a sample, all of one donor; `contents` come in its order.
    """
    sha = hashlib.sha256()
    columns: dict[str, list[int | None]] = {column: [] for column in _OF_THE_TAR}
    places = [(m.encode(), columns[f"{c}_offset"], columns[f"{c}_size"]) for m, c in _MEMBERS]
    pieces: list[bytes] = []
    n_bytes = n_written = 0
    with tar_path.open("wb") as tar:

        def put_out() -> None:
            nonlocal n_written
            data = b"".join(pieces)
            tar.write(data)
            sha.update(data)
            n_written = n_bytes
            pieces.clear()

        for key, members in zip(table["key"].to_pylist(), contents, strict=True):
            crc = 0
            for (suffix, offsets, sizes), content in zip(places, members, strict=True):
                if content is None:
                    offsets.append(None)
                    sizes.append(None)
                    continue
                size = len(content)
                header = member_header(b"%s.%s" % (key.encode(), suffix), size)
                padding = _PADDING[-size % tarfile.BLOCKSIZE]
                offsets.append(n_bytes + len(header))
                sizes.append(size)
                pieces += (header, content, padding)
                n_bytes += len(header) + size + len(padding)
                crc = zlib.crc32(content, crc)
            columns["crc32"].append(crc)
            if n_bytes - n_written >= _WRITE_BYTES:
                put_out()
        pieces.append(b"\0" * (2 * tarfile.BLOCKSIZE))
        n_bytes += 2 * tarfile.BLOCKSIZE
        pieces.append(b"\0" * (-n_bytes % tarfile.RECORDSIZE))
        n_bytes += -n_bytes % tarfile.RECORDSIZE
        put_out()
    whole = [
        pa.array(columns[f.name], f.type) if f.name in columns else table[f.name]
        for f in INDEX_SCHEMA
    ]
    pq.write_table(pa.table(whole, schema=INDEX_SCHEMA), table_path, compression="zstd")
    return ShardInfo(
        name=name,
        donor=table["donor"][0].as_py(),
        n_samples=table.num_rows,
        tar_bytes=n_bytes,
        tar_sha256=sha.hexdigest(),
        table_sha256=hashlib.sha256(table_path.read_bytes()).hexdigest(),
    )


@lru_cache(maxsize=2**14)
def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What stands before the bytes of a C-contiguous array in an .npy file."""
    buffer = BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


def member_header(name: bytes, size: int) -> bytes:
    """The header of a tar's member, as `tarfile` writes it, with times and owners that are fixed.

    Otherwise two runs of the same input would differ.
    """
    if len(name) > tarfile.LENGTH_NAME:
        return _described(name.decode(), size)
    digits = b"%011o" % size
    # The sum of all bytes, where that of the sum itself is taken for spaces.
    total = _EMPTY_SUM + sum(name) + sum(digits) - sum(b"0" * 11)
    return b"".join(
        (name.ljust(tarfile.LENGTH_NAME, b"\0"), _EMPTY[100:124], digits, _EMPTY[135:148],
         b"%06o\0 " % total, _EMPTY[156:])
    )  # fmt: skip


def _described(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o644
    return info.tobuf(format=tarfile.GNU_FORMAT)


_EMPTY = _described("", 0)
_EMPTY_SUM = int(_EMPTY[148:154], 8)
