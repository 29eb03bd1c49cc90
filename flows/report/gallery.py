"""Pairs as they lie in the shards, fetched through the index tables."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow.parquet as pq

from flows.report.embed import thumbnail_uri
from shards.schema import Manifest, Panel

N_SAMPLES = 24
_THUMBNAIL_PX = 192
_N_GENES = 3
_COLUMNS = (
    "cell_id",
    "jpg_offset",
    "jpg_size",
    "counts_offset",
    "counts_size",
    "n_counts",
    "nucleus",
    "neighbors",
    "flags",
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One pair: its patch as a data URI and what its row of the index table says."""

    src: str
    cell_id: str
    n_counts: int
    n_genes: int
    genes: list[tuple[str, int]]
    iou: float | None
    distance_um: float | None
    n_neighbors: int
    flags: list[str]


def read_gallery(shard_set: Path, manifest: Manifest, panel: Panel) -> list[Sample]:
    """The first pairs of a run: its shards are in hashed order, so they are a random sample."""
    samples: list[Sample] = []
    for shard in manifest.shards:
        table = pq.ParquetFile(shard_set / f"{shard.name}.parquet")
        wanted = N_SAMPLES - len(samples)
        if not wanted:
            break
        rows = next(table.iter_batches(wanted, columns=list(_COLUMNS))).to_pylist()
        with (shard_set / f"{shard.name}.tar").open("rb") as tar:
            samples += [_sample(tar, row, panel) for row in rows]
    return samples


def kept_cell_ids(shard_set: Path, manifest: Manifest) -> list[str]:
    """The cells of a run that are in its shards."""
    tables = [
        pq.read_table(shard_set / f"{shard.name}.parquet", columns=["cell_id"])
        for shard in manifest.shards
    ]
    return [cell_id for table in tables for cell_id in table["cell_id"].to_pylist()]


def _sample(tar: IO[bytes], row: dict[str, Any], panel: Panel) -> Sample:
    tar.seek(row["jpg_offset"])
    jpeg = tar.read(row["jpg_size"])
    tar.seek(row["counts_offset"])
    counts = np.load(io.BytesIO(tar.read(row["counts_size"])), allow_pickle=False)
    top = np.argsort(-counts[1].astype(np.int64), kind="stable")[:_N_GENES]
    nucleus = row["nucleus"] or {"iou": None, "distance_um": None}
    return Sample(
        src=thumbnail_uri(jpeg, _THUMBNAIL_PX),
        cell_id=row["cell_id"],
        n_counts=row["n_counts"],
        n_genes=counts.shape[1],
        genes=[(panel.genes[g].symbol, n) for g, n in counts[:, top].T.tolist()],
        iou=nucleus["iou"],
        distance_um=nucleus["distance_um"],
        n_neighbors=len(row["neighbors"]),
        flags=row["flags"],
    )
