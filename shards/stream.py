"""Dataset and cursor to samples: the order is a pure function, a sample is one positioned read.

The cursor of a training run is one integer: how many samples the optimiser has consumed. Position
`cursor` of the endless sequence of epochs names a sample through `Order`, without a list of them,
so a run goes on from any cursor, with any number of ranks and readers.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shards.artifact import sha256_of
from shards.dataset import read_dataset, read_manifest, read_panels
from shards.errors import BadInput
from shards.schema import INDEX_SCHEMA, Dataset, Manifest, Panel, Split, digest
from shards.write import MANIFEST_FILE

Indices = npt.NDArray[np.int64]

_FEISTEL_ROUNDS: Final = 8

# A row of the index in memory: 32 bytes a sample. Gaps are from the image's offset; size 0 is a
# member that the sample lacks.
_ROW = np.dtype(
    [
        ("jpg_offset", "<i8"),
        ("jpg_size", "<u4"),
        ("counts_gap", "<u4"),
        ("counts_size", "<u4"),
        ("neighbors_gap", "<u4"),
        ("neighbors_size", "<u4"),
        ("crc32", "<u4"),
    ]
)
_ROW_COLUMNS = [
    "jpg_offset",
    "jpg_size",
    "counts_offset",
    "counts_size",
    "neighbors_offset",
    "neighbors_size",
    "crc32",
]


@dataclass(frozen=True, slots=True)
class Order:
    """A shuffled order of `n` samples for every epoch, found position by position.

    Each epoch is a Feistel network over the smallest even power of two that holds `n`, keyed by
    (seed, epoch, what) and walked until it lands inside `n` (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002): a permutation by construction, in constant time and memory.
    `what` is the fingerprint of the sample set.
    """

    n: int
    seed: int
    what: str

    def indices(self, positions: npt.ArrayLike) -> Indices:
        """The samples at `positions`, counted from the start of epoch 0, in any epochs."""
        epoch, within = np.divmod(np.atleast_1d(np.asarray(positions, dtype=np.int64)), self.n)
        found = np.empty_like(within)
        for e in np.unique(epoch):
            here = epoch == e
            found[here] = self._permuted(within[here], int(e))
        return found

    def _permuted(self, within: Indices, epoch: int) -> Indices:
        half = np.uint64(max(1, ((self.n - 1).bit_length() + 1) // 2))
        mask = np.uint64((1 << int(half)) - 1)
        key = f"{self.seed}/{epoch}/{self.what}".encode()
        rounds = np.frombuffer(blake2b(key, digest_size=8 * _FEISTEL_ROUNDS).digest(), "<u8")
        value = within.astype(np.uint64)
        walking = np.arange(len(value))
        while len(walking):
            left, right = value[walking] >> half, value[walking] & mask
            for key_of_round in rounds:
                left, right = right, left ^ (_mixed(right ^ key_of_round) & mask)
            value[walking] = (left << half) | right
            walking = walking[value[walking] >= self.n]
        return value.astype(np.int64)


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    # The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def batch_at(cursor: int, n: int, batch_size: int) -> range:
    """Positions of the batch that starts at `cursor`; it ends at the epoch's end at the latest.

    No batch straddles two epochs, so the last one of an epoch may be short, and every sample is
    in exactly one batch an epoch.
    """
    return range(cursor, min(cursor + batch_size, (cursor // n + 1) * n))


def share_of(batch: range, rank: int, world: int) -> range:
    """The contiguous share of a batch that `rank` of `world` reads; sizes differ by one at most."""
    return batch[len(batch) * rank // world : len(batch) * (rank + 1) // world]


@dataclass(frozen=True, slots=True)
class Pair:
    """One sample as read: encoded image, and counts against the panel `Stream.panels[panel]`.

    `counts` is (2, n) and `neighbors` (3, m), as in the tar; None where the sample has none.
    """

    jpeg: bytes
    counts: npt.NDArray[np.unsignedinteger[Any]] | None
    neighbors: npt.NDArray[np.unsignedinteger[Any]] | None
    panel: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar as the index knows it."""

    tar: Path
    manifest: Manifest
    n_samples: int
    panel: int

    @property
    def table(self) -> Path:
        return self.tar.with_suffix(".parquet")


class Stream:
    """The samples of one split of one or more datasets, addressed by index 0 … len - 1.

    Safe to read from several threads: reading keeps no state.
    """

    def __init__(self, shards: Sequence[Shard], panels: Sequence[Panel], fingerprint: str) -> None:
        self.shards = tuple(shards)
        self.panels = tuple(panels)
        self.fingerprint = fingerprint
        self._ends = np.cumsum([s.n_samples for s in self.shards], dtype=np.int64)
        self._rows = np.concatenate([np.empty(0, _ROW), *(_index_of(s) for s in self.shards)])

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: npt.ArrayLike) -> list[Pair]:
        """The samples at `indices`, in that order; each tar is opened once a call.

        Raises BadInput, with tar and key, on a sample that is cut short or whose checksum differs.
        """
        wanted = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        pairs: list[Pair | None] = [None] * len(wanted)
        of_shard = np.searchsorted(self._ends, wanted, side="right")
        for s in np.unique(of_shard):
            shard = self.shards[s]
            file = os.open(shard.tar, os.O_RDONLY)
            try:
                for place in np.flatnonzero(of_shard == s):
                    pairs[place] = self._read_one(file, shard, int(wanted[place]))
            finally:
                os.close(file)
        return [pair for pair in pairs if pair is not None]

    def _read_one(self, file: int, shard: Shard, index: int) -> Pair:
        row = self._rows[index]
        jpg_size, counts_size = int(row["jpg_size"]), int(row["counts_size"])
        counts_gap, neighbors_gap = int(row["counts_gap"]), int(row["neighbors_gap"])
        neighbors_size = int(row["neighbors_size"])
        size = max(jpg_size, counts_gap + counts_size, neighbors_gap + neighbors_size)
        span = os.pread(file, size, int(row["jpg_offset"]))
        jpeg = span[:jpg_size]
        counts = span[counts_gap : counts_gap + counts_size]
        neighbors = span[neighbors_gap : neighbors_gap + neighbors_size]
        crc = zlib.crc32(neighbors, zlib.crc32(counts, zlib.crc32(jpeg)))
        if len(span) != size or crc != int(row["crc32"]):
            raise self.fault(
                index,
                expected=f"{size} bytes with crc32 {int(row['crc32']):08x}",
                found=f"{len(span)} bytes with crc32 {crc:08x}",
            )
        return Pair(
            jpeg=jpeg,
            counts=_npy_rows(counts, 2) if counts_size else None,
            neighbors=_npy_rows(neighbors, 3) if neighbors_size else None,
            panel=shard.panel,
        )

    def fault(self, index: int, *, expected: str, found: str) -> BadInput:
        """The error about the sample at `index`, with its tar and key."""
        shard = self.shards[int(np.searchsorted(self._ends, index, side="right"))]
        return BadInput(
            f"{shard.tar}, sample {self.keys([index])[0]}",
            expected=expected,
            found=found,
            remedy="fetch the shard again, or curate the run again: `cellpair check` names "
            "every damaged sample",
        )

    def keys(self, indices: Sequence[int]) -> list[str]:
        """Keys of the samples at `indices`, fetched from the index tables."""
        found = []
        for index in indices:
            s = int(np.searchsorted(self._ends, index, side="right"))
            within = index - int(self._ends[s]) + self.shards[s].n_samples
            column = pq.read_table(self.shards[s].table, columns=["key"])["key"]
            found.append(str(column[within].as_py()))
        return found

    def table(self, columns: list[str]) -> pa.Table:
        """Metadata columns of `INDEX_SCHEMA` for all samples, by index."""
        tables = [pq.read_table(s.table, columns=columns) for s in self.shards]
        return pa.concat_tables(tables) if tables else INDEX_SCHEMA.empty_table().select(columns)


def read_stream(paths: Sequence[Path], split: Split) -> Stream:
    """The samples of `split` of the datasets at `paths`, in the datasets' own order.

    Raises BadInput where a file is missing or of another size or content than its manifest says,
    where two datasets hold the same run, and where they put a donor into different splits.
    """
    shards: list[Shard] = []
    panels: dict[str, Panel] = {}
    datasets: list[Dataset] = []
    for path in paths:
        dataset, root = read_dataset(path)
        _check_composition(path, dataset, datasets)
        datasets.append(dataset)
        panels |= read_panels(dataset, root)
        shards += _shards_of(dataset, root, split, list(panels))
    fingerprint = digest([[d.fingerprint for d in datasets], split])
    return Stream(shards, list(panels.values()), fingerprint)


def _check_composition(path: Path, dataset: Dataset, before: list[Dataset]) -> None:
    for other in before:
        if twice := {r.run for r in dataset.runs} & {r.run for r in other.runs}:
            raise BadInput(
                path,
                expected="datasets that share no run",
                found=f"run {min(twice)} in more than one",
                remedy="name each dataset once, or curate the runs into one dataset",
            )
        aliases = {**other.aliases, **dataset.aliases}
        here, there = (
            {aliases.get(donor, donor): split for donor, split in d.donors.items()}
            for d in (dataset, other)
        )
        for donor in sorted(here.keys() & there.keys()):
            if here[donor] != there[donor]:
                raise BadInput(
                    path,
                    expected=f"donor {donor} in one split",
                    found=f"{here[donor]} here, {there[donor]} in another dataset",
                    remedy="assign the donor the same split wherever it is curated",
                )


def _shards_of(dataset: Dataset, root: Path, split: Split, panel_ids: list[str]) -> list[Shard]:
    manifests: dict[str, Manifest] = {}
    for run in dataset.runs:
        file = root / run.path / MANIFEST_FILE
        manifests[run.path] = read_manifest(root / run.path)
        if (found := sha256_of(file)) != run.manifest_sha256:
            raise BadInput(
                file,
                expected=f"the manifest that the dataset names, sha256 {run.manifest_sha256}",
                found=f"sha256 {found}",
                remedy="restore the file, or curate the run again",
            )
    shards = []
    for relative in dataset.shards.get(split, ()):
        manifest = manifests[str(Path(relative).parent)]
        info = next(i for i in manifest.shards if i.name == Path(relative).name)
        tar = root / f"{relative}.tar"
        found_size = f"{tar.stat().st_size} bytes" if tar.exists() else "no such file"
        if found_size != f"{info.tar_bytes} bytes":
            raise BadInput(
                tar,
                expected=f"{info.tar_bytes} bytes",
                found=found_size,
                remedy="fetch the shard again, or curate the run again",
            )
        panel = panel_ids.index(manifest.panel_id)
        shards.append(Shard(tar, manifest, info.n_samples, panel))
    return shards


def _index_of(shard: Shard) -> npt.NDArray[np.void]:
    if not shard.table.exists():
        raise BadInput(
            shard.table,
            expected="the index table beside its tar",
            found="no such file",
            remedy="fetch the shard again, or curate the run again",
        )
    table = pq.read_table(shard.table, columns=_ROW_COLUMNS)
    column = {name: table[name].fill_null(0).to_numpy().astype(np.int64) for name in _ROW_COLUMNS}
    rows = np.zeros(table.num_rows, _ROW)
    rows["jpg_offset"], rows["jpg_size"] = column["jpg_offset"], column["jpg_size"]
    rows["crc32"] = column["crc32"]
    end = column["jpg_offset"] + column["jpg_size"]
    for member in ("counts", "neighbors"):
        offset, size = column[f"{member}_offset"], column[f"{member}_size"]
        rows[f"{member}_gap"] = np.where(size > 0, offset - column["jpg_offset"], 0)
        rows[f"{member}_size"] = size
        end = np.maximum(end, offset + size)
    if len(rows) != shard.n_samples or end.max(initial=0) > shard.tar.stat().st_size:
        raise BadInput(
            shard.table,
            expected=f"{shard.n_samples} rows that lie inside {shard.tar.name}",
            found=f"{len(rows)} rows, the last byte at {end.max(initial=0)}",
            remedy="fetch the shard again, or curate the run again",
        )
    return rows


def _npy_rows(content: bytes, n_rows: int) -> npt.NDArray[np.unsignedinteger[Any]]:
    # Version 1.0 of the npy format, whose header length is bytes 8 and 9; the general reader of
    # numpy evaluates the header and costs 25 times this.
    start = 10 + int.from_bytes(content[8:10], "little")
    dtype = np.dtype("<u4" if b"'<u4'" in content[10:start] else "<u2")
    return np.frombuffer(content, dtype, offset=start).reshape(n_rows, -1)
