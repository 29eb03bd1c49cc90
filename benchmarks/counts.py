"""Transcripts to counts beside pyarrow and other tools; 1 where a limit isn't met.

python -m benchmarks.counts --dir DIR [--rows N N] [--only PART …]

DIR keeps the files between calls: a simulated run of 2,000 cells, and bundles of 10 and 100 million
transcripts that repeat it side by side, every copy with cells of its own, in row groups of a
million. Some 3 GB. Speeds are of one pinned core, in alternating pairs in one process, so that what
else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from benchmarks.registration.limits import Limits
from flows.cluster import BlockMap, Runtime
from pairing.counts import MapTasks, write_counts
from pairing.geometry import Affine
from pairing.he_cells import count_by_place, he_cells_table
from pairing.simulate import SimulationParams, simulate
from pairing.warp import Warp
from pairing.xenium import open_xenium
from pairing.xenium.tables import cell_id_text

N_CELLS, ROW_GROUP = 2_000, 1_000_000
COLUMNS = ("cell_id", "feature_name", "codeword_category", "is_gene", "qv")
TEXTS = ("cell_id", "feature_name", "codeword_category")
MIN_SHARE_OF_PYARROW, MIN_TWO_WORKERS, MAX_MEMORY = 0.25, 1.6, 1.1
# The table of cells with its texts, identifiers sorted for looking up, and sums.
BYTES_PER_CELL = 400
PAIRS, N_SLICE = 9, 200_000
PARTS = ("speed", "workers", "memory", "lookup", "peers")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="for the files that are made")
    parser.add_argument("--rows", type=int, nargs=2, default=[10_000_000, 100_000_000])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        _count(given.alone, map)
        print(_peak_bytes())
        return 0
    folder = given.dir.resolve()
    small, large = (bundle_of(folder, n) for n in given.rows)
    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    limits = Limits()
    measured: dict[str, Callable[[], None]] = {
        "speed": lambda: _speed(limits, small),
        "workers": lambda: _workers(limits, large),
        "memory": lambda: _memory(limits, small, large),
        "lookup": lambda: _lookup(limits, folder, small),
        "peers": lambda: _peers(limits, small),
    }
    for part in given.only:
        measured[part]()
    return 0 if limits.met else 1


def _peak_bytes() -> int:
    """Most memory that this process had; on Linux not by getrusage, which counts its parent's."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM:")).split()[1])


# ---------------------------------------------------------------- files


def bundle_of(folder: Path, n_rows: int) -> Path:
    """A bundle of at least `n_rows` transcripts and no matrix, made where it is not there."""
    path = folder / f"{n_rows // 1_000_000}m"
    if (path / "done").exists():
        return path / "outs"
    base = folder / "base"
    if not (base / "done").exists():
        shutil.rmtree(base, ignore_errors=True)
        simulate(base, SimulationParams(n_cells=N_CELLS, seed=1))
        (base / "done").touch()
    shutil.rmtree(path, ignore_errors=True)
    outs = path / "outs"
    outs.mkdir(parents=True)
    for name in ("experiment.xenium", "gene_panel.json"):
        shutil.copyfile(base / "outs" / name, outs / name)
    cells = pq.read_table(base / "outs" / "cells.parquet")
    transcripts = pq.read_table(
        base / "outs" / "transcripts.parquet", read_dictionary=[*TEXTS, "fov_name"]
    )
    n_copies = -(-n_rows // len(transcripts))
    width_um = _width_um(transcripts)
    copied = [_copy(cells, k, width_um) for k in range(n_copies)]
    pq.write_table(pa.concat_tables(copied), outs / "cells.parquet", compression="zstd")
    _write_transcripts(outs / "transcripts.parquet", transcripts, cells["cell_id"], n_copies)
    (path / "done").touch()
    return outs


def _ids(k: int, n: int) -> list[str]:
    """Identifiers of the k-th copy, as 10x makes them."""
    prefix = (np.arange(n, dtype=np.uint64) + k * n) * 2_654_435_761 % 2**32
    pairs = np.stack([prefix, np.ones(n)], axis=1).astype(np.uint32)
    return [str(cell_id) for cell_id in cell_id_text(pairs)]


def _copy(cells: pa.Table, k: int, width_um: float) -> pa.Table:
    """The k-th copy of the cells: to the right of the one before it."""
    table = cells.set_column(0, "cell_id", pa.array(_ids(k, len(cells))))
    x_um = table["x_centroid"].to_numpy() + k * width_um
    return table.set_column(
        table.schema.get_field_index("x_centroid"), "x_centroid", pa.array(x_um)
    )


def _width_um(transcripts: pa.Table) -> float:
    return float(np.ceil(transcripts["x_location"].to_numpy().max() / 512 + 0.5) * 512)


def _write_transcripts(
    path: Path, transcripts: pa.Table, cell_ids: pa.ChunkedArray, n_copies: int
) -> None:
    """Copies of the table one after the other, in row groups of ROW_GROUP."""
    table = transcripts.combine_chunks().unify_dictionaries()
    column = table["cell_id"].chunk(0)
    known = {cell: i for i, cell in enumerate(cell_ids.to_pylist())}
    number = np.array([known.get(c, len(known)) for c in column.dictionary.to_pylist()])
    codes = pa.array(number[column.indices.to_numpy()].astype(np.int32))
    width_um = _width_um(table)
    schema = table.schema
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        waiting: list[pa.Table] = []
        for k in range(n_copies):
            ids = pa.array([*_ids(k, len(known)), "UNASSIGNED"])
            x_um = (table["x_location"].to_numpy() + k * width_um).astype(np.float32)
            copied = table.set_column(
                schema.get_field_index("cell_id"),
                schema.field("cell_id"),
                pa.DictionaryArray.from_arrays(codes, ids).cast(schema.field("cell_id").type),
            ).set_column(schema.get_field_index("x_location"), "x_location", pa.array(x_um))
            waiting.append(copied)
            while sum(len(t) for t in waiting) >= ROW_GROUP:
                joined = pa.concat_tables(waiting).unify_dictionaries()
                writer.write_table(joined.slice(0, ROW_GROUP), row_group_size=ROW_GROUP)
                waiting = [joined.slice(ROW_GROUP)]
        if len(waiting[0]):
            writer.write_table(pa.concat_tables(waiting).unify_dictionaries())


# ---------------------------------------------------------------- ours


def _count(bundle: Path, map_tasks: MapTasks) -> tuple[float, float]:
    """Seconds of counting a bundle from opening to the written files; and of this process's CPU."""
    with tempfile.TemporaryDirectory(dir=bundle.parent) as name:
        out, kept = Path(name, "out"), Path(name, "kept")
        out.mkdir()
        kept.mkdir()
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        with open_xenium(bundle) as run:
            write_counts(out, kept, run, 20, np.ones(run.n_cells, bool), map_tasks)
        return time.perf_counter() - start_s, time.process_time() - start_cpu_s


def _pyarrow(path: Path, texts: Sequence[str]) -> tuple[float, float]:
    """Seconds of reading the same columns and nothing more, on one thread."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    with pq.ParquetFile(path, read_dictionary=list(texts)) as file:
        for batch in file.iter_batches(1_000_000, columns=list(COLUMNS), use_threads=False):
            batch.validate()
    return time.perf_counter() - start_s, time.process_time() - start_cpu_s


def _speed(limits: Limits, bundle: Path) -> None:
    transcripts = bundle / "transcripts.parquet"
    n_rows = pq.read_metadata(transcripts).num_rows
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "pyarrow, texts as dictionaries": lambda: _pyarrow(transcripts, TEXTS),
        "pyarrow, texts as texts": lambda: _pyarrow(transcripts, ()),
        "ours, from the bundle to the written counts": lambda: _count(bundle, map),
    }
    for way in ways.values():
        way()  # the file is in the system's cache from here on
    taken: dict[str, list[tuple[float, float]]] = {what: [] for what in ways}
    for _ in range(PAIRS):
        for what, way in ways.items():
            taken[what].append(way())
    os.sched_setaffinity(0, cores)
    limits.head(
        f"{n_rows:,} transcripts on one core, by processor time (by the clock), {PAIRS} turns"
    )
    for what, turns in taken.items():
        cpu, clock = (n_rows / median(t[k] for t in turns) / 1e6 for k in (1, 0))
        limits.told(what, f"{cpu:.2f} M transcripts/s ({clock:.2f})")
    *theirs, ours = taken.values()
    for (what, _), turns in zip(taken.items(), theirs, strict=False):
        share = median(t[1] / o[1] for t, o in zip(turns, ours, strict=True))
        limits.line(f"share of {what}, median of pairs", share, "≥", MIN_SHARE_OF_PYARROW)


def _workers(limits: Limits, bundle: Path) -> None:
    n_rows = pq.read_metadata(bundle / "transcripts.parquet").num_rows
    with (
        BlockMap(Runtime(workers=1, device="cpu")) as one,
        BlockMap(Runtime(workers=2, device="cpu")) as two,
    ):
        list(two(abs, [1, 2, 3, 4]))  # started, as it is when a run comes to its cells
        turns = [(_count(bundle, one)[0], _count(bundle, two)[0]) for _ in range(3)]
    limits.head(f"{n_rows:,} transcripts on two workers, 3 pairs, load {os.getloadavg()[0]:.1f}")
    for what, k in (("one worker", 0), ("two workers", 1)):
        limits.told(what, f"{n_rows / median(t[k] for t in turns) / 1e6:.2f} M transcripts/s")
    ratio = median(a / b for a, b in turns)
    limits.line("two workers, times one, median of pairs", ratio, "≥", MIN_TWO_WORKERS)


def _memory(limits: Limits, small: Path, large: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.counts", "--dir", ".", "--alone"]
    peaks, cells = [], []
    for bundle in (small, large):
        done = subprocess.run([*command, str(bundle)], check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout.split()[-1]))
        cells.append(pq.read_metadata(bundle / "cells.parquet").num_rows)
    limits.head("Peak memory of a process that counts alone")
    for what, peak, n_cells in zip(("fewer", "more"), peaks, cells, strict=True):
        limits.told(f"{what} transcripts, {n_cells:,} cells", f"{peak / 2**20:.0f} MiB")
    more = cells[1] - cells[0]
    limits.told("bytes per cell that came", f"{(peaks[1] - peaks[0]) / more:.0f}")
    allowed = MAX_MEMORY * peaks[0] + BYTES_PER_CELL * more
    limits.line(
        f"of {MAX_MEMORY} × fewer + {BYTES_PER_CELL} B a cell", peaks[1] / allowed, "≤", 1.0
    )


# ---------------------------------------------------------------- by lookup


def _nuclei(folder: Path, bundle: Path) -> pa.Table:
    """The nuclei of the simulated run, copied like its cells, as if found on a slide in µm."""
    with open_xenium(folder / "base" / "outs") as run:
        outlines = run.read_nuclei()["polygon"].to_numpy()
    table = pq.read_table(folder / "base" / "outs" / "transcripts.parquet", columns=["x_location"])
    width_um = _width_um(table)
    n_copies = pq.read_metadata(bundle / "cells.parquet").num_rows // N_CELLS
    aside = [Affine.similarity(1.0, 0.0, (k * width_um, 0.0)) for k in range(n_copies)]
    copies = [shapely.transform(outlines, moved) for moved in aside]
    all_um: npt.NDArray[np.object_] = np.concatenate(copies)
    centres = shapely.get_coordinates(shapely.centroid(all_um))
    return pa.table(
        {
            "nucleus_id": np.arange(1, len(all_um) + 1),
            "x_px": centres[:, 0],
            "y_px": centres[:, 1],
            "area_um2": shapely.area(all_um),
            "polygon_px": pa.array(shapely.to_wkb(all_um).tolist(), pa.binary()),
        }
    )


def _lookup(limits: Limits, folder: Path, bundle: Path) -> None:
    he_nuclei, warp = _nuclei(folder, bundle), Warp(Affine.scale(1.0))
    n_rows = pq.read_metadata(bundle / "transcripts.parquet").num_rows
    seconds: dict[str, float] = {}

    def timed(fn: Any, items: Any) -> Iterator[str]:
        start_s = time.process_time()
        yield from map(fn, items)
        seconds[fn.func.__name__] = time.process_time() - start_s

    with tempfile.TemporaryDirectory(dir=folder) as name, open_xenium(bundle) as run:
        out, kept = Path(name, "out"), Path(name, "kept")
        out.mkdir()
        kept.mkdir()
        table = he_cells_table(he_nuclei, warp)
        stays = np.ones(len(table), bool)
        start_s = time.process_time()
        *_, qc = count_by_place(out, kept, run, 20, he_nuclei, warp, 1.0, table, 5.0, stays, timed)
        whole_s = time.process_time() - start_s
    limits.head('unit = "he_nuclei" on one core, by processor time')
    limits.told(
        f"{len(table):,} nuclei grown by 5 µm", f"{len(table) / seconds['make_tile']:,.0f} nuclei/s"
    )
    limits.told(
        "transcripts looked up", f"{n_rows / seconds['tally_span'] / 1e6:.2f} M transcripts/s"
    )
    limits.told("all of it", f"{n_rows / whole_s / 1e6:.2f} M transcripts/s")
    limits.told("good transcripts in cells", f"{sum(qc.by_category.values()) / n_rows:.0%}")


# ---------------------------------------------------------------- other tools


def _peers(limits: Limits, bundle: Path) -> None:
    """Tools that join points and polygons, on the first N_SLICE transcripts, of which all rate."""
    # Seconds of import that no other part needs.
    import geopandas
    from spatialdata import aggregate
    from spatialdata.models import PointsModel, ShapesModel

    columns = ["x_location", "y_location", "feature_name", "qv"]
    with pq.ParquetFile(bundle / "transcripts.parquet") as file:
        part = next(file.iter_batches(N_SLICE, columns=columns)).to_pandas()
    with open_xenium(bundle.parents[1] / "base" / "outs") as run:
        outlines = run.read_cell_polygons()
    x1, y1 = part[["x_location", "y_location"]].max()
    near = [p for p in outlines if p is not None and p.bounds[0] < x1 and p.bounds[1] < y1]
    cells = geopandas.GeoDataFrame(geometry=near, index=[f"c{i}" for i in range(len(near))])

    def sjoin() -> None:
        good = part[part["qv"] >= 20]
        at = geopandas.points_from_xy(good["x_location"], good["y_location"])
        points = geopandas.GeoDataFrame(good[["feature_name"]], geometry=at)
        joined = points.sjoin(cells, predicate="within")
        pd.crosstab(joined.iloc[:, -1], joined["feature_name"])

    def of_spatialdata() -> None:
        good = part[part["qv"] >= 20].rename(columns={"x_location": "x", "y_location": "y"})
        good["feature_name"] = good["feature_name"].astype("category")
        points = PointsModel.parse(good[["x", "y", "feature_name"]].reset_index(drop=True))
        shapes = ShapesModel.parse(cells)
        aggregate(
            values=points, by=shapes, value_key="feature_name", agg_func="count",
            values_sdata=None, by_sdata=None,
        )  # fmt: skip

    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    limits.head(f"{len(part):,} transcripts of the same file, {len(near):,} cells, in memory")
    for what, way in (("geopandas sjoin", sjoin), ("spatialdata aggregate", of_spatialdata)):
        start_s = time.process_time()
        way()
        rate = len(part) / (time.process_time() - start_s)
        hours = 1e8 / rate / 3600
        limits.told(what, f"{rate / 1e6:.3f} M transcripts/s; of 100 M, {hours:.2f} h by this rate")
    os.sched_setaffinity(0, cores)


if __name__ == "__main__":
    print(json.dumps({"pyarrow": pa.__version__, "numpy": np.__version__}))
    sys.exit(main())
