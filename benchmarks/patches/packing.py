"""Packing beside writing the same bytes: by webdataset's own writer, and by copying the files."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset

from benchmarks.patches.slides import MPP, SPEC
from pairing.cells import CELLS_FILE, NEIGHBORS_FILE, PANEL_FILE, find_neighbors
from pairing.geometry import Affine, Points
from pairing.pack import Filters, PackConfig, write_shard_set
from shards.artifact import fsync
from shards.schema import Gene, Panel

N_GENES, GENES_A_CELL, K = 5000, 150, 8


def write_cells(folder: Path, centres_px: Points) -> Path:
    """A cells artifact by hand, of cells with some 150 of 5,000 genes and eight neighbours."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(2)
    n = len(centres_px)
    centres_um = centres_px * MPP
    n_genes = rng.poisson(GENES_A_CELL, n)
    indptr = np.concatenate([[0], np.cumsum(n_genes)]).astype(np.int64)
    start = rng.integers(0, N_GENES - 25 * int(n_genes.max()) // 10 - 1, n)
    within = np.arange(indptr[-1]) - np.repeat(indptr[:-1], n_genes)
    indices = (np.repeat(start, n_genes) + within * 2).astype(np.int32)
    data = rng.geometric(0.5, len(indices)).astype(np.uint32)
    table = {
        "cell_id": [f"aaaa{i:08d}-1" for i in range(n)],
        "x_um": centres_um[:, 0],
        "y_um": centres_um[:, 1],
        "center": np.full(n, "nucleus"),
        "n_counts": np.add.reduceat(data, indptr[:-1]).astype(np.int64),
        "he_nucleus_id": np.arange(n),
        **{f"he_{name}": rng.uniform(0, 1, n) for name in ("area_um2", "iou", "distance_um")},
    }
    pq.write_table(pa.table(table), folder / CELLS_FILE)
    panel = Panel.of("human", [Gene(symbol=f"G{i}") for i in range(N_GENES)])
    (folder / PANEL_FILE).write_text(panel.model_dump_json())
    neighbors = find_neighbors(centres_um, K, 50.0)
    np.save(folder / NEIGHBORS_FILE, neighbors, allow_pickle=False)
    for name, array in (("indptr", indptr), ("indices", indices), ("data", data)):
        np.save(folder / f"counts_{name}.npy", array, allow_pickle=False)
    return folder


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of the processor and of the clock."""

    cpu_s: float
    clock_s: float


@contextmanager
def _timed(times: list[Took]) -> Iterator[None]:
    cpu_s, clock_s = time.process_time(), time.perf_counter()
    yield
    times.append(Took(time.process_time() - cpu_s, time.perf_counter() - clock_s))


def pack(out: Path, cells: Path, patches: Path) -> Took:
    """The stage, by one worker."""
    shutil.rmtree(out, ignore_errors=True)
    kept = out.with_name(f"{out.name}-kept")
    shutil.rmtree(kept, ignore_errors=True)
    out.mkdir()
    kept.mkdir()
    config = PackConfig(
        run="r", donor="D1", source_id=None, tissue="breast", filters=Filters(drop_flags=())
    )
    times: list[Took] = []
    with _timed(times):
        write_shard_set(
            out, kept, config, SPEC, cells, patches, Affine.scale(1 / MPP), MPP, map, error_um=None
        )
    shutil.rmtree(kept)
    return times[0]


def by_webdataset(shards: Path, out: Path) -> Took:
    """webdataset's TarWriter writes the same samples; they are read untimed."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    times: list[Took] = []
    for tar_path in sorted(shards.glob("*.tar")):
        samples = list(_samples(tar_path))
        with _timed(times):
            with webdataset.TarWriter(str(out / tar_path.name)) as sink:
                for sample in samples:
                    sink.write(sample)
            fsync(out / tar_path.name)
    return Took(sum(t.cpu_s for t in times), sum(t.clock_s for t in times))


def _samples(tar_path: Path) -> Any:
    tar = tar_path.read_bytes()
    members = (("jpg", "jpg"), ("counts.npy", "counts"), ("neighbors.npy", "neighbors"))
    for row in pq.read_table(tar_path.with_suffix(".parquet")).to_pylist():
        cuts = {m: (row[f"{c}_offset"], row[f"{c}_size"]) for m, c in members}
        yield {"__key__": row["key"], **{m: tar[at : at + size] for m, (at, size) in cuts.items()}}


def by_copying(shards: Path, out: Path) -> Took:
    """The same files are copied, hashed, and synced."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    times: list[Took] = []
    with _timed(times):
        for path in sorted(shards.glob("*.tar")):
            data = path.read_bytes()
            hashlib.sha256(data)
            (out / path.name).write_bytes(data)
            fsync(out / path.name)
    return times[0]
