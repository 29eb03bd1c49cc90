"""Packing beside writing the same bytes: by webdataset's own writer, and by copying the files."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
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
    np.save(folder / NEIGHBORS_FILE, find_neighbors(centres_um, K, 50.0))
    for name, array in (("indptr", indptr), ("indices", indices), ("data", data)):
        np.save(folder / f"counts_{name}.npy", array)
    return folder


def pack(out: Path, cells: Path, patches: Path) -> float:
    """Seconds of the stage, by one worker."""
    shutil.rmtree(out, ignore_errors=True)
    kept = out.with_name(f"{out.name}-kept")
    shutil.rmtree(kept, ignore_errors=True)
    out.mkdir()
    kept.mkdir()
    config = PackConfig(
        run="r", donor="D1", source_id=None, tissue="breast", filters=Filters(drop_flags=())
    )
    started = time.perf_counter()
    write_shard_set(
        out, kept, config, SPEC, cells, patches, Affine.scale(1 / MPP), MPP, map, error_um=None
    )
    took = time.perf_counter() - started
    shutil.rmtree(kept)
    return took


def by_webdataset(shards: Path, out: Path) -> float:
    """Seconds in which webdataset's TarWriter writes the same samples; they are read untimed."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    took = 0.0
    for tar_path in sorted(shards.glob("*.tar")):
        samples = list(_samples(tar_path))
        started = time.perf_counter()
        with webdataset.TarWriter(str(out / tar_path.name)) as sink:
            for sample in samples:
                sink.write(sample)
        _sync(out / tar_path.name)
        took += time.perf_counter() - started
    return took


def _samples(tar_path: Path) -> Any:
    tar = tar_path.read_bytes()
    members = (("jpg", "jpg"), ("counts.npy", "counts"), ("neighbors.npy", "neighbors"))
    for row in pq.read_table(tar_path.with_suffix(".parquet")).to_pylist():
        cuts = {m: (row[f"{c}_offset"], row[f"{c}_size"]) for m, c in members}
        yield {"__key__": row["key"], **{m: tar[at : at + size] for m, (at, size) in cuts.items()}}


def by_copying(shards: Path, out: Path) -> float:
    """Seconds in which the same files are copied, hashed, and synced."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    started = time.perf_counter()
    for path in sorted(shards.glob("*.tar")):
        data = path.read_bytes()
        hashlib.sha256(data)
        (out / path.name).write_bytes(data)
        _sync(out / path.name)
    return time.perf_counter() - started


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
