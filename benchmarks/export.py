"""How fast a dataset is exported, and in how much memory, beside the plain way of each layout.

    python -m benchmarks.export --out DIR [--cells 10000 40000]

Samples of real size: patches of 224 px, 377 genes, eight neighbours. The plain ways: anndata reads
the same cells from one file and writes them, with the same compression; webdataset's own writer
makes such tars from the same shards. Each in a process of its own, in alternating pairs; times are
those of the work, without imports, and peaks of memory are above what imports take.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.loader.corpus import plain_row, publish_runs
from benchmarks.loader.samples import GENES_OF_A_CELL, N_GENES, PATCH
from benchmarks.loader.samples import samples as samples_of_real_size
from benchmarks.registration.limits import Limits
from shards.artifact import Identity, build_artifact
from shards.dataset import read_dataset, read_panels
from shards.schema import Gene, Panel
from shards.write import Sample, narrow_counts

N_RUNS, SHARD, N_PATCHES, N_NEAR = 4, 2_500, 64, 8
N_PAIRS = (1, 3)  # of the fewer cells, whose peak of memory alone is wanted, and of the more
AREA_UM2 = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", type=int, nargs=2, default=[10_000, 40_000])
    parser.add_argument("--one", nargs=2)
    args = parser.parse_args()
    if args.one:
        name, dataset = args.one
        print(json.dumps(_measured(name, Path(dataset), args.out)))
        return 0
    limits = Limits()
    small, large = (_dataset(args.out / f"cells-{n}", n) for n in args.cells)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for dataset in (small, large):
        _in_a_process("h5ad", dataset, args.out)
        shutil.move(args.out / "exported" / "human.h5ad", _matrix(dataset))
    for ours, plain in (("h5ad", "anndata"), ("openclip", "webdataset")):
        limits.head(f"{ours} beside {plain}")
        peaks = []
        for n, dataset, n_pairs in zip(args.cells, (small, large), N_PAIRS, strict=True):
            of_ours, of_plain = _pairs(ours, plain, dataset, args.out, n_pairs)
            limits.told(f"{n} cells: {ours}", _words(n, of_ours))
            limits.told(f"{n} cells: {plain}", _words(n, of_plain))
            peaks.append(np.median([found["mib"] for found in of_ours]))
        for key, what in (("cpu_s", "CPU time"), ("wall_s", "time")):
            ratio = [b[key] / a[key] for a, b in zip(of_ours, of_plain, strict=True)]
            limits.told(f"{what} of {plain}, times ours", f"{np.median(ratio):.2f}")
        what = f"{ours}: peak at {args.cells[1] / args.cells[0]:g} times the cells, times"
        limits.line(what, float(peaks[1] / peaks[0]), "≤", 1.5)
    limits.head("SpatialData, all cells of a run at once")
    for n, dataset in zip(args.cells, (small, large), strict=True):
        found = _in_a_process("spatialdata", dataset, args.out)
        limits.told(f"{n} cells", _words(n, [found]))
        limits.told(
            f"{n} cells: peak a cell of a run", f"{found['mib'] * 2**20 / (n / N_RUNS):.0f} B"
        )
    print(f"load {os.getloadavg()[0]:.1f}")
    return 0 if limits.met else 1


def _words(n: int, found: list[dict[str, float]]) -> str:
    wall_s, cpu_s, mib = (
        float(np.median([f[key] for f in found])) for key in ("wall_s", "cpu_s", "mib")
    )
    return f"{n / cpu_s:,.0f} cells a CPU second, {n / wall_s:,.0f} a second, peak {mib:.0f} MiB"


def _pairs(
    ours: str, plain: str, dataset: Path, out: Path, n_pairs: int
) -> tuple[list[Any], list[Any]]:
    found: tuple[list[Any], list[Any]] = [], []
    for pair in range(n_pairs):
        for i in (0, 1) if pair % 2 else (1, 0):
            found[i].append(_in_a_process((ours, plain)[i], dataset, out))
    return found


def _in_a_process(name: str, dataset: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.export", "--out", str(out / "exported")]
    done = subprocess.run(
        [*command, "--one", name, str(dataset)], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measured(name: str, dataset: Path, out: Path) -> dict[str, float]:
    shutil.rmtree(out, ignore_errors=True)
    work = _WAYS[name](dataset, out)
    before_mib = _peak_mib()
    wall_s, cpu_s = time.monotonic(), time.process_time()
    work()
    return {
        "wall_s": time.monotonic() - wall_s,
        "cpu_s": time.process_time() - cpu_s,
        "mib": _peak_mib() - before_mib,
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _exported(to: Any, dataset: Path, out: Path) -> Callable[[], object]:
    import flows.export.h5ad
    import flows.export.openclip

    if to == "spatialdata":
        import flows.export.spatial  # noqa: F401  # seconds that are not the work's
    from flows.export.command import export

    outlines = "circles" if to == "spatialdata" else None
    return lambda: export(dataset, to, out, outlines=outlines)


def _by_anndata(dataset: Path, out: Path) -> Callable[[], object]:
    import anndata

    path = _matrix(dataset)
    out.mkdir()

    def work() -> None:
        data = anndata.read_h5ad(path)
        data.write_h5ad(out / "plain.h5ad", compression="gzip", compression_opts=1)

    return work


def _matrix(dataset: Path) -> Path:
    """What anndata reads: the same cells as we export them."""
    return dataset.with_suffix(".h5ad")


def _by_webdataset(dataset: Path, out: Path) -> Callable[[], object]:
    import webdataset

    record, root = read_dataset(dataset)
    (panel,) = read_panels(record, root).values()
    symbols = np.array([gene.symbol for gene in panel.genes], dtype=object)
    urls = [str(root / f"{name}.tar") for name in record.shards["train"]]
    out.mkdir()

    def work() -> None:
        with webdataset.ShardWriter(str(out / "%06d.tar"), maxcount=2500, verbose=0) as sink:
            for sample in webdataset.WebDataset(urls, shardshuffle=False):
                genes, values = np.load(
                    io.BytesIO(sample["counts.npy"]), allow_pickle=False
                ).astype(np.int64)
                most = np.argsort(-values, kind="stable")[:50]
                sink.write(
                    {
                        "__key__": sample["__key__"],
                        "jpg": sample["jpg"],
                        "txt": " ".join(symbols[genes[most]]),
                        "json": {"key": sample["__key__"]},
                    }
                )

    return work


_WAYS: dict[str, Callable[[Path, Path], Callable[[], object]]] = {
    **{to: partial(_exported, to) for to in ("h5ad", "openclip", "spatialdata")},
    "anndata": _by_anndata,
    "webdataset": _by_webdataset,
}


def _dataset(root: Path, n_cells: int) -> Path:
    panel = Panel.of("human", [Gene(symbol=f"GENE{i}", ensembl=None) for i in range(N_GENES)])
    sizes = [n_cells // N_RUNS] * N_RUNS
    return publish_runs(root, panel, PATCH, sizes, _samples, SHARD, _cells_artifact)


def _samples(panel: Panel, donor: str, n: int, seed: int) -> Iterator[Sample]:
    """Cells with counts of their own that share a few patches: to make them is not to take long."""
    rng = np.random.default_rng(seed)
    pool = list(islice(samples_of_real_size(panel, donor, N_PATCHES, seed), N_PATCHES))
    for i in range(n):
        genes = np.flatnonzero(rng.random(N_GENES) < GENES_OF_A_CELL / N_GENES)
        counts = np.stack([genes, 1 + rng.poisson(1.5, len(genes))])
        near = range(max(0, i - N_NEAR), i)
        neighbors = [np.stack([np.full(len(genes), k), *counts]) for k in range(len(near))]
        row = plain_row(panel, PATCH, i, int(counts[1].sum()))
        row["x_um"] = row["x_px"] = float(i % 300) * 8
        row["y_um"] = row["y_px"] = float(i // 300) * 8
        row["neighbors"] = [
            {"cell_id": f"c{k:06d}", "dx_um": 8.0 * (k - i), "dy_um": 0.0} for k in near
        ]
        yield Sample(
            f"c{i:06d}",
            donor,
            pool[i % N_PATCHES].image_jpeg,
            narrow_counts(counts),
            narrow_counts(np.concatenate([np.zeros((3, 0), np.int64), *neighbors], axis=1)),
            row,
        )


def _cells_artifact(run: Path, n: int) -> dict[str, str]:
    def make(folder: Path, blocks: Path) -> dict[str, Any]:
        cell_id = [f"c{i:06d}" for i in range(n)]
        table = pd.DataFrame({"cell_id": cell_id, "cell_area_um2": AREA_UM2})
        table.to_parquet(folder / "cells.parquet", index=False)
        return {}

    identity = Identity(stage="cells", stage_version=1, config={"n": n}, parents={}, inputs={})
    build_artifact(run / "cells", identity, make, provenance={}, check_inputs=lambda: None)
    return {"cells": identity.fingerprint}


if __name__ == "__main__":
    sys.exit(main())
