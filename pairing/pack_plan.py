"""Which cells go into which shard, in what order: known before any shard is written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

# Of a member: its header in the tar, and the header of its array.
_TAR_BLOCK_BYTES, _NPY_HEADER_BYTES = 512, 128
# Rows that are looked at together.
_CHUNK_ROWS = 100_000


@dataclass(frozen=True, slots=True)
class ShardCut:
    """A shard: the `number`-th of its donor, of the rows from `start` to `stop` of the order."""

    donor: int
    number: int
    start: int
    stop: int


def as_numbers(names: npt.NDArray[np.object_]) -> tuple[list[str], npt.NDArray[np.int32]]:
    """The names that are there, sorted, and for each place the number of its own; -1 for None."""
    known = sorted(set(names[names != None].tolist()))  # noqa: E711  # element by element
    number_of = {name: i for i, name in enumerate(known)}
    return known, np.array([number_of.get(name, -1) for name in names.tolist()], np.int32)


def in_hashed_order(
    rows: Rows, donor: npt.NDArray[np.int32], cell_id: npt.NDArray[np.object_], run: str
) -> Rows:
    """Rows by donor, and within a donor by the hash of run and cell.

    Neighbours on the slide must not be neighbours in a shard: readers shuffle only so far.
    """
    hashed = rows[cells_in_hashed_order(cell_id[rows], run)]
    return hashed[np.argsort(donor[hashed], kind="stable")]


def cells_in_hashed_order(cell_id: npt.NDArray[np.object_], run: str) -> Rows:
    """Rows of the cells of a run by the hash of run and cell."""
    digests = b"".join(hashlib.sha256(f"{run}/{name}".encode()).digest() for name in cell_id)
    words = np.frombuffer(digests, ">u8").reshape(-1, 4).T
    return np.lexsort(words[::-1])


def same_donor(
    neighbors: npt.NDArray[np.int32], rows: Rows, donor: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """(n, k) neighbours of rows, and which of them may come along.

    Counts of another donor, who may be in another split, must not; those of no donor may.
    """
    near = np.asarray(neighbors[rows], np.int64)
    of = donor[near]  # of the last cell, where there is no neighbour
    return near, (near >= 0) & ((of == donor[rows][:, None]) | (of == -1))


def tar_bytes(
    rows: Rows,
    jpeg_bytes: npt.NDArray[Any],
    indptr: npt.NDArray[Any],
    neighbors: npt.NDArray[np.int32],
    donor: npt.NDArray[np.int32],
) -> npt.NDArray[np.int64]:
    """(n,) bytes that each row takes in a tar, where no count needs 32 bits.

    `jpeg_bytes` are of each row; `indptr` is that of the counts, (cells + 1,).
    """
    n_entries = np.diff(indptr)
    parts = [np.zeros(0, np.int64)]
    for start in range(0, len(rows), _CHUNK_ROWS):
        some = rows[start : start + _CHUNK_ROWS]
        near, along = same_donor(neighbors, some, donor)
        n_near = np.where(along, n_entries[near], 0).sum(axis=1)
        sizes = (
            jpeg_bytes[start : start + _CHUNK_ROWS],
            _NPY_HEADER_BYTES + 4 * n_entries[some],
            _NPY_HEADER_BYTES + 6 * n_near,
        )
        blocks = [np.asarray(-(-size // _TAR_BLOCK_BYTES) + 1, np.int64) for size in sizes]
        parts.append(np.sum(blocks, axis=0) * _TAR_BLOCK_BYTES)
    return np.concatenate(parts)


def plan_shards(
    donor: npt.NDArray[np.int32],
    n_bytes: npt.NDArray[np.int64],
    *,
    max_samples: int,
    max_bytes: int,
) -> list[ShardCut]:
    """Shards of samples that lie in this order, by donor: each as long as it may be.

    A shard holds one donor, `max_samples` at most, and no more than `max_bytes` but where one
    sample alone has more.
    """
    ends = np.append(np.flatnonzero(np.diff(donor)) + 1, len(donor))
    total = np.cumsum(n_bytes)
    cuts, start = [], 0
    for end in ends.tolist():
        number = 0
        while start < end:
            before = int(total[start - 1]) if start else 0
            fitting = int(np.searchsorted(total, before + max_bytes, side="right"))
            stop = min(end, start + max_samples, max(fitting, start + 1))
            cuts.append(ShardCut(int(donor[start]), number, start, stop))
            number, start = number + 1, stop
    return cuts
