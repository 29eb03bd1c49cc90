"""Pairs to tar shards with their index tables; the same input gives the same bytes."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Sample:
    """One pair on its way into a tar.

    `counts` is (2, n) and `neighbors` (3, m) unsigned integers, as `counts_member` makes them;
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

    A shard holds one donor, so samples come grouped by donor, and at most `max_samples`. Raises
    BadInput on a cell id that a tar key cannot hold and on a repeated one, ValueError on a donor
    that comes back after another.
    """
    infos: list[ShardInfo] = []
    donors: set[str] = set()
    seen: set[str] = set()
    for donor, of_donor in groupby(samples, key=lambda s: s.donor):
        if donor in donors:
            raise ValueError(f"samples of donor {donor!r} are not contiguous")
        donors.add(donor)
        for number, chunk in enumerate(_chunks(of_donor, max_samples)):
            name = f"{run}-{donor_slug(donor)}-{number:06d}"
            infos.append(_write_shard(out_dir, name, donor, chunk, run, seen))
    return infos


def _chunks(samples: Iterable[Sample], size: int) -> Iterator[Iterator[Sample]]:
    samples = iter(samples)

    def chunk(first: Sample) -> Iterator[Sample]:
        yield first
        for _, sample in zip(range(size - 1), samples, strict=False):
            yield sample

    for first in samples:
        yield chunk(first)


def _write_shard(
    out_dir: Path, name: str, donor: str, samples: Iterator[Sample], run: str, seen: set[str]
) -> ShardInfo:
    rows: list[dict[str, Any]] = []
    sha = hashlib.sha256()
    with (out_dir / f"{name}.tar").open("wb") as tar:

        def put(data: bytes) -> None:
            tar.write(data)
            sha.update(data)

        for sample in samples:
            key = _checked_key(run, sample.cell_id, seen)
            row = dict(sample.row, key=key, run=run, cell_id=sample.cell_id, donor=donor)
            crc = 0
            for member, column, content in _members(sample):
                put(_header(f"{key}.{member}", len(content)))
                row[f"{column}_offset"], row[f"{column}_size"] = tar.tell(), len(content)
                put(content)
                put(b"\0" * (-len(content) % tarfile.BLOCKSIZE))
                crc = zlib.crc32(content, crc)
            row["crc32"] = crc
            rows.append(row)
        put(b"\0" * (2 * tarfile.BLOCKSIZE))
        put(b"\0" * (-tar.tell() % tarfile.RECORDSIZE))
        tar_bytes = tar.tell()
    table_path = out_dir / f"{name}.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), table_path, compression="zstd")
    return ShardInfo(
        name=name,
        donor=donor,
        n_samples=len(rows),
        tar_bytes=tar_bytes,
        tar_sha256=sha.hexdigest(),
        table_sha256=hashlib.sha256(table_path.read_bytes()).hexdigest(),
    )


def _checked_key(run: str, cell_id: str, seen: set[str]) -> str:
    # WebDataset ends a key at the first dot of the member's name and takes slashes for folders.
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
    return sample_key(run, cell_id)


def _members(sample: Sample) -> Iterator[tuple[str, str, bytes]]:
    yield IMAGE_MEMBER, "jpg", sample.image_jpeg
    if sample.counts is not None:
        yield COUNTS_MEMBER, "counts", _npy(sample.counts)
    if sample.neighbors is not None:
        yield NEIGHBORS_MEMBER, "neighbors", _npy(sample.neighbors)


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _header(name: str, size: int) -> bytes:
    # Fixed times and owners, or two runs of the same input would differ.
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o644
    return info.tobuf(format=tarfile.GNU_FORMAT)
