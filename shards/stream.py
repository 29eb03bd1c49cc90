"""Dataset and cursor to samples: the order is a pure function, a sample is one positioned read.

The cursor of a training run is one integer: how many samples the optimiser has consumed. Position
`cursor` of the endless sequence of epochs names a sample through an `Order`, without a list of
them, so a run goes on from any cursor, with any number of ranks and readers.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shards.blocks import BlockReader
from shards.dataset import read_dataset, read_manifest, read_panels
from shards.errors import BadInput
from shards.index import (
    Shard,
    build_index,
    default_cache,
    keys_of,
    no_table,
    sample_fault,
)
from shards.mix import ALL_ONCE, Mix, Parts, mixed
from shards.order import Balanced, Blocks, Indices, Order, Shuffled, as_indices
from shards.reader import GlobalReader, Pair, Reader, Verify, wrong_size
from shards.remote import Location, ObjectFacts, RemotePath
from shards.schema import INDEX_SCHEMA, INDEX_SCHEMAS, Dataset, Manifest, Panel, Split, digest
from shards.write import MANIFEST_FILE

Reading = Literal["global", "block"]

PIECES: Final = 512
PIECE_SAMPLES: Final = 256
CACHE_BYTES: Final = 4 << 30


class Stream:
    """The samples of one split of one or more datasets, addressed by index 0 … len - 1.

    Shards lie in the index by run. A sample that the mix repeats has several indices. Holds no open
    file and can be pickled: a process that is handed one looks at no file before it reads.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        parts: Parts,
        panels: Sequence[Panel],
        fingerprint: str,
        *,
        verify: Verify,
        index_cache: Path,
    ) -> None:
        self.shards = tuple(shards)
        self.parts = parts
        self.panels = tuple(panels)
        self.fingerprint = fingerprint
        self.verify = verify
        self.index_cache = index_cache
        self.runs = tuple(dict.fromkeys(shard.manifest.run for shard in self.shards))
        number = {run: r for r, run in enumerate(self.runs)}
        run_of_shard = [number[shard.manifest.run] for shard in self.shards]
        self._run_of_shard = np.array(run_of_shard, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.parts)

    def run_of(self, indices: npt.ArrayLike) -> Indices:
        """The run of each sample, as its place in `runs`."""
        return self._run_of_shard[self.parts.locate(as_indices(indices))[0]]

    def sample_of(self, indices: npt.ArrayLike) -> Indices:
        """The same number for all copies of a sample: the index of the first."""
        return self.parts.sample_of(as_indices(indices))

    def order(
        self,
        seed: int,
        *,
        reading: Reading = "global",
        balanced: bool = False,
        pieces: int = PIECES,
        piece_samples: int = PIECE_SAMPLES,
    ) -> Order:
        """The order in which training takes the samples; each once an epoch.

        `balanced`: every stretch holds each run in its share. With `reading = "block"` so many
        pieces of so many samples at most are mixed with each other at a time.
        """
        run_P = self._run_of_shard[self.parts.shard_P]
        if reading == "block":
            return Blocks(
                self.parts.n_P,
                run_P,
                seed,
                self.fingerprint,
                pieces=pieces,
                piece_samples=piece_samples,
                balanced=balanced,
            )
        if balanced:
            sizes = np.zeros(len(self.runs), dtype=np.int64)
            np.add.at(sizes, run_P, self.parts.n_P)
            return Balanced(sizes, seed, self.fingerprint)
        return Shuffled(len(self), seed, self.fingerprint)

    def reader(
        self,
        reading: Reading = "global",
        *,
        piece_samples: int = PIECE_SAMPLES,
        cache_bytes: int = CACHE_BYTES,
    ) -> Reader:
        """What reads samples in one process. `piece_samples` is to be that of the order."""
        if reading == "block":
            return BlockReader(
                self.shards,
                self.parts,
                self.index_cache,
                self.verify,
                piece_samples=piece_samples,
                cache_bytes=cache_bytes,
            )
        return GlobalReader(self.shards, self.parts, self.index_cache, self.verify)

    def read(self, indices: npt.ArrayLike) -> list[Pair]:
        """The samples at `indices`, in that order; each tar is opened once a call.

        Raises BadInput, with tar and key, on a sample that is cut short or whose checksum differs.
        Safe to call from several threads.
        """
        wanted = as_indices(indices)
        pairs: dict[int, Pair] = {}
        with self.reader() as reader:
            for place, pair in reader.each(wanted):
                if isinstance(pair, BadInput):
                    raise pair
                pairs[place] = pair
        return [pairs[place] for place in range(len(wanted))]

    def build_index(self) -> int:
        """Make what is missing of the index cache, which reading would do shard by shard.

        Returns of how many shards.
        """
        return build_index(self.shards, self.index_cache)

    def fault(self, index: int, *, expected: str, found: str) -> BadInput:
        """The error about the sample at `index`, with its tar and key."""
        (s,), (row,) = self.parts.locate(as_indices(index))
        return sample_fault(self.shards[s], int(row), expected=expected, found=found)

    def keys(self, indices: npt.ArrayLike) -> list[str]:
        """Keys of the samples at `indices`, fetched from the index tables."""
        shards, rows = self.parts.locate(as_indices(indices))
        found: dict[int, str] = {}
        for s in np.unique(shards).tolist():
            places = np.flatnonzero(shards == s)
            found |= zip(
                places.tolist(), keys_of(self.shards[s], rows[places].tolist()), strict=True
            )
        return [found[place] for place in range(len(rows))]

    def table(self, columns: list[str]) -> pa.Table:
        """Metadata columns of `INDEX_SCHEMA` for all samples, by index.

        Those that a shard of an earlier schema version lacks are null.
        """
        tables = [INDEX_SCHEMA.empty_table().select(columns)]
        for s, n in zip(self.parts.shard_P.tolist(), self.parts.n_P.tolist(), strict=True):
            shard = self.shards[s]
            there = INDEX_SCHEMAS[shard.manifest.schema_version].names
            own = [column for column in columns if column in there]
            content = io.BytesIO(shard.table.read_bytes())
            tables.append(pq.read_table(content, columns=own)[:n])
        return pa.concat_tables(tables, promote_options="default").select(columns)


def read_stream(
    paths: Sequence[Location],
    split: Split,
    mix: Mix = ALL_ONCE,
    *,
    verify: Verify = "crc32",
    index_cache: Path | None = None,
) -> Stream:
    """The samples of `split` of the datasets at `paths`, run by run in the datasets' own order.

    `verify = "sha256"` has each reader hash every shard when it first touches it. `index_cache` is
    the folder of the index files, `default_cache()` if not given. Sizes of files are looked at, and
    no sample. Raises BadInput where a file is missing or of another size or content than its
    manifest says, where two datasets hold the same run, where they put a donor into different
    splits, and where the mix names what is not there.
    """
    shards: list[Shard] = []
    panels: dict[str, Panel] = {}
    datasets: list[Dataset] = []
    aliases: dict[str, str] = {}
    for path in paths:
        dataset, root = read_dataset(path)
        _check_composition(path, dataset, datasets)
        datasets.append(dataset)
        panels |= read_panels(dataset, root)
        aliases |= dataset.aliases
        shards += _shards_of(dataset, root, split, list(panels))
    n_kept, copies = mixed(shards, aliases, mix)
    used = [s for s, n in enumerate(n_kept) if n]
    _check_files([shards[s] for s in used])
    return Stream(
        [shards[s] for s in used],
        Parts.of([n_kept[s] for s in used], [copies[s] for s in used]),
        list(panels.values()),
        digest([[d.fingerprint for d in datasets], split, mix.model_dump()]),
        verify=verify,
        index_cache=index_cache or default_cache(),
    )


def _check_composition(path: Location, dataset: Dataset, before: list[Dataset]) -> None:
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


def _shards_of(dataset: Dataset, root: Location, split: Split, panel_ids: list[str]) -> list[Shard]:
    """The split's shards, those of a run together."""
    by_run: dict[str, list[Shard]] = {run.path: [] for run in dataset.runs}
    manifests: dict[str, Manifest] = {}
    for run in dataset.runs:
        file = root / run.path / MANIFEST_FILE
        manifests[run.path] = read_manifest(root / run.path)
        if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != run.manifest_sha256:
            raise BadInput(
                file,
                expected=f"the manifest that the dataset names, sha256 {run.manifest_sha256}",
                found=f"sha256 {found}",
                remedy="restore the file, or curate the run again",
            )
    infos = {
        f"{path}/{info.name}": info
        for path, manifest in manifests.items()
        for info in manifest.shards
    }
    for relative in dataset.shards.get(split, ()):
        path = relative.rpartition("/")[0]
        panel = panel_ids.index(manifests[path].panel_id)
        tar = root / f"{relative}.tar"
        by_run[path].append(Shard(tar, manifests[path], infos[relative], panel))
    return [shard for of_run in by_run.values() for shard in of_run]


def _check_files(shards: Sequence[Shard]) -> None:
    listed: dict[RemotePath, dict[str, ObjectFacts]] = {}
    for shard in shards:
        if isinstance(shard.tar, RemotePath):  # one request a folder, not two a shard
            folder = shard.tar.parent
            if folder not in listed:
                listed[folder] = folder.files()
            tar, has_table = listed[folder].get(shard.tar.name), shard.table.name in listed[folder]
            n_bytes = None if tar is None else tar.st_size
        else:
            n_bytes, has_table = _n_bytes(shard.tar), shard.table.exists()
        if n_bytes != shard.info.tar_bytes:
            raise wrong_size(shard, "no such file" if n_bytes is None else f"{n_bytes} bytes")
        if not has_table:
            raise no_table(shard.table)


def _n_bytes(path: Path) -> int | None:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None
