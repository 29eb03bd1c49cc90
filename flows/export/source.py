"""What is exported: the shards of a dataset, run by run, each with its table and its counts."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse
from tqdm import tqdm

from flows.outfolder import read_out
from shards.artifact import sha256_of
from shards.dataset import read_dataset, read_panels
from shards.errors import BadInput
from shards.index import FETCH_AGAIN, Shard
from shards.reader import npy_rows, read_at
from shards.schema import Dataset, Manifest, Panel, Split
from shards.stream import read_stream

log = logging.getLogger("cellpair")

_TELL_EVERY_S = 30.0
_COUNTS = ["counts_offset", "counts_size", "n_counts"]


@dataclass(frozen=True, slots=True)
class Part:
    """One shard, and the split that its donor is in."""

    shard: Shard
    split: Split

    @property
    def manifest(self) -> Manifest:
        return self.shard.manifest

    @property
    def tar(self) -> Path:
        assert isinstance(self.shard.tar, Path), "of a dataset in a folder"
        return self.shard.tar

    @property
    def table(self) -> Path:
        return self.tar.with_suffix(".parquet")

    def read_table(self, columns: list[str]) -> pa.Table:
        """Columns of its index table, one row a sample in the tar's order."""
        return pq.read_table(self.table, columns=columns)

    def most_counts(self) -> int:
        """What the counts of all samples are at most in number: each takes four bytes or more."""
        return int(sum(self.read_table(["counts_size"])["counts_size"].to_pylist())) // 4

    def most_neighbors(self) -> int:
        """What the neighbours of all samples are at most in number, without reading them."""
        facts = pq.read_metadata(self.table)
        (column,) = (
            i
            for i in range(facts.num_columns)
            if facts.schema.column(i).path.startswith("neighbors.")
            and facts.schema.column(i).name == "dx_um"
        )
        return sum(
            facts.row_group(g).column(column).num_values for g in range(facts.num_row_groups)
        )

    def read_counts(self, n_genes: int) -> sparse.csr_matrix:
        """(samples, genes) int32 CSR of raw counts against the run's own panel.

        Of each sample only its counts are read, not its image, so what is proved is what the index
        table says of them: where they lie, and what they add up to. Raises BadInput where they
        don't.
        """
        table = self.read_table(_COUNTS)
        offset, size, n_counts = (table[name].to_pylist() for name in _COUNTS)
        rows = [np.zeros((2, 0), np.uint16)]
        file = os.open(self.tar, os.O_RDONLY)
        try:
            for at, n_bytes, total in zip(offset, size, n_counts, strict=True):
                rows.append(self._checked(read_at(file, n_bytes, at, self.shard), total))
        finally:
            os.close(file)
        genes, values = np.concatenate(rows, axis=1, dtype=np.int32, casting="same_kind")
        indptr = np.cumsum([row.shape[1] for row in rows], dtype=np.int64)
        if len(genes) and (genes.max() >= n_genes or values.min() < 1):
            raise self._damaged(f"genes up to {genes.max()}, counts from {values.min()} on")
        return sparse.csr_matrix((values, genes, indptr), shape=(len(size), n_genes))

    def _checked(self, content: memoryview, total: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        try:
            row = npy_rows(content, 2)
        except (ValueError, IndexError):
            raise self._damaged("what is no array where counts lie") from None
        if (found := int(row[1].sum())) != total:
            raise self._damaged(f"counts of a sample that add up to {found}, not {total}")
        return row

    def _damaged(self, found: str) -> BadInput:
        return BadInput(
            self.shard.tar,
            expected="counts as its index table tells of them",
            found=found,
            remedy=FETCH_AGAIN,
        )


@dataclass(frozen=True, slots=True)
class Source:
    """The parts of a dataset that are exported, those of a run together, and all its panels."""

    dataset: Dataset
    root: Path
    parts: tuple[Part, ...]
    panels: dict[str, Panel]

    def person(self, donor: str) -> str:
        """The canonical name of a donor, whatever name the shard has."""
        return self.dataset.aliases.get(donor, donor)

    def runs(self) -> dict[str, tuple[Part, ...]]:
        """The parts of each run."""
        by_run: dict[str, list[Part]] = {}
        for part in self.parts:
            by_run.setdefault(part.manifest.run, []).append(part)
        return {run: tuple(parts) for run, parts in by_run.items()}


def open_source(path: Path, splits: Sequence[Split], runs: Collection[str]) -> Source:
    """The shards of these splits of the dataset at `path`; of `runs` only, where any is named.

    Manifests and index tables are compared with their hashes, tars with their sizes. Raises
    BadInput where one differs, where the dataset holds a donor who is withdrawn, and where nothing
    is left to export.
    """
    dataset, root = checked_dataset(path, runs)
    parts = [
        Part(shard, split)
        for split in splits
        for shard in read_stream([path], split).shards
        if not runs or shard.manifest.run in runs
    ]
    if not parts:
        raise BadInput(
            path,
            expected="at least one sample to export",
            found=f"none in {', '.join(splits)}" + (f" of {', '.join(runs)}" if runs else ""),
            remedy="name other splits or runs",
        )
    for part in parts:
        _check_table(part)
    place = {run.run: i for i, run in enumerate(dataset.runs)}
    parts.sort(key=lambda part: place[part.manifest.run])
    return Source(dataset, root, tuple(parts), read_panels(dataset, root))


def checked_dataset(path: Path, runs: Collection[str]) -> tuple[Dataset, Path]:
    """The dataset at `path` and its root, by its texts alone; raises BadInput as `open_source`."""
    dataset, root = read_dataset(path)
    assert isinstance(root, Path), "the root of a path"
    _check_nobody_is_withdrawn(dataset, root)
    known = [run.run for run in dataset.runs]
    if strangers := sorted(set(runs) - set(known)):
        raise BadInput(
            "--run",
            expected=f"runs of the dataset: {', '.join(known)}",
            found=", ".join(strangers),
            remedy="name runs of the dataset, or leave --run out for all",
        )
    return dataset, root


def _check_nobody_is_withdrawn(dataset: Dataset, root: Path) -> None:
    owner = read_out(root)
    withdrawn = set() if owner is None else set(owner.withdrawn)
    if held := sorted(withdrawn & {*dataset.donors, *dataset.aliases.values()}):
        raise BadInput(
            root,
            expected="a dataset without withdrawn donors",
            found=f"{len(held)} of them in dataset {dataset.fingerprint}",
            remedy="run `cellpair curate`, which makes one without, and `cellpair clean`",
        )


def _check_table(part: Part) -> None:
    shard, found = part.shard, sha256_of(part.table)
    if found != shard.info.table_sha256:
        raise BadInput(
            shard.table,
            expected=f"the table that the manifest names, sha256 {shard.info.table_sha256}",
            found=f"sha256 {found}",
            remedy=FETCH_AGAIN,
        )


class Progress:
    """How many samples of some parts are done: a bar on a terminal, now and then a line else."""

    def __init__(self, parts: Sequence[Part], what: str) -> None:
        self._total = sum(part.shard.n_samples for part in parts)
        self._what = what
        self._told_s, self._n_done = time.monotonic(), 0
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=self._total, desc=what, unit="", leave=False, disable=not on_terminal
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def add(self, n_samples: int) -> None:
        self._n_done += n_samples
        self._bar.update(n_samples)
        if self._bar.disable and time.monotonic() - self._told_s >= _TELL_EVERY_S:
            self._told_s = time.monotonic()
            log.info("%s: %d of %d samples", self._what, self._n_done, self._total)
