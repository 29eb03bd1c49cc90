"""How long a run takes to go on with 50 million samples, and what the index costs before it.

python -m benchmarks.resume [--shards N] [--rows N] [--out DIR]

Manifests of 500 runs, empty tars and tables of the right names and sizes, and index files that are
whole but hold zeros, all sparse: what is opened, looked at and computed is what a real dataset of
this size asks for. A process of its own, as one that goes on after a kill, opens the stream, finds
the batch at a cursor in the middle of the third epoch, and touches the index of each of its
samples. Files lie in the page cache; `--out` on another file system measures that.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import zlib
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.registration.limits import Limits
from shards.artifact import sha256_of
from shards.dataset import panel_path, publish_dataset
from shards.index import Shard, build_index, index_file, open_index
from shards.order import batch_at
from shards.schema import (
    INDEX_SCHEMA,
    Dataset,
    DatasetRun,
    Gene,
    Manifest,
    Panel,
    PatchSpec,
    ShardInfo,
    Totals,
)
from shards.stream import Reading, read_stream
from shards.write import MANIFEST_FILE

LIMIT_S = 2.0
N_RUNS = 500
N_SAMPLES = 5_000  # of a shard
SAMPLE_BYTES = 13_824  # headers and padding among them
BATCH = 4_096
PATCH = PatchSpec(image="he", fov_um=56.0, size_px=224, center="nucleus", jpeg_quality=95)


def sparse(path: Path, n_bytes: int, head: bytes = b"") -> None:
    with path.open("wb") as file:
        file.write(head)
        file.truncate(n_bytes)


def fabricate(root: Path, n_shards: int, panel: Panel) -> None:
    """The dataset and, in `root/index`, its index files."""
    index = root / "index"
    for folder in (index, (root / panel_path(panel.panel_id)).parent):
        folder.mkdir(parents=True)
    (root / panel_path(panel.panel_id)).write_text(panel.model_dump_json())
    rows = 20 * N_SAMPLES
    head = struct.pack("<8sII", b"cpindex1", N_SAMPLES, zlib.crc32(bytes(rows)))
    runs, shards = [], []
    for r in range(N_RUNS):
        folder = root / f"runs/run{r}/shards/{r:020x}"
        folder.mkdir(parents=True)
        infos = []
        for s in range(n_shards // N_RUNS):
            name = f"run{r}-D{r}-{s:06d}"
            info = ShardInfo(
                name=name,
                donor=f"D{r}",
                n_samples=N_SAMPLES,
                tar_bytes=N_SAMPLES * SAMPLE_BYTES,
                tar_sha256="0" * 64,
                table_sha256=hashlib.sha256(name.encode()).hexdigest(),
            )
            sparse(folder / f"{name}.tar", info.tar_bytes)
            sparse(folder / f"{name}.parquet", 0)
            sparse(index / f"{info.table_sha256}.index", len(head) + rows, head)
            infos.append(info)
            shards.append(f"runs/run{r}/shards/{r:020x}/{name}")
        manifest = manifest_of(f"run{r}", panel, infos)
        (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1))
        runs.append(
            DatasetRun(
                run=manifest.run,
                path=str(folder.relative_to(root)),
                fingerprint=folder.name,
                manifest_sha256=sha256_of(folder / MANIFEST_FILE),
                species=manifest.species,
                tissue=None,
                panel_id=panel.panel_id,
                totals=manifest.totals,
            )
        )
    panels = {panel.panel_id: panel_path(panel.panel_id)}
    donors = {f"D{r}": "train" for r in range(N_RUNS)}
    publish_dataset(root, Dataset.of("large", runs, panels, donors, {"train": tuple(shards)}))


def manifest_of(run: str, panel: Panel, infos: list[ShardInfo]) -> Manifest:
    n = sum(info.n_samples for info in infos)
    return Manifest(
        run=run,
        source_id=None,
        tissue=None,
        species="human",
        panel_id=panel.panel_id,
        patch=PATCH,
        totals=Totals(seen=n, kept=n, dropped={}),
        shards=tuple(infos),
    )


def resume(root: Path, reading: Reading, balanced: bool) -> None:
    """Prints seconds: imports, stream, order and first indices, first touches; one a line."""
    times = [time.monotonic()]
    stream = read_stream([root], "train", index_cache=root / "index")
    times.append(time.monotonic())
    order = stream.order(0, reading=reading, balanced=balanced)
    cursor = int(2.5 * len(stream)) // BATCH * BATCH
    found = order.batch(batch_at(cursor, len(stream), BATCH))
    times.append(time.monotonic())
    order.batch(batch_at(cursor + BATCH, len(stream), BATCH))
    times.append(time.monotonic())
    touched, _ = stream.parts.locate(found)
    for s in set(touched.tolist()):
        open_index(stream.shards[s], stream.index_cache).close()
    times.append(time.monotonic())
    pickle.dumps(stream)
    times.append(time.monotonic())
    print(len(stream), len(set(touched.tolist())))
    print(*(later - earlier for earlier, later in pairwise(times)))


def table_of(n_rows: int) -> pa.Table:
    """An index table as of real samples of which each takes 13 kB."""
    row = {
        "jpg_size": 10_000,
        "counts_size": 1_128,
        "neighbors_size": 500,
        "crc32": 1,
        "run": "run",
        "donor": "D",
        "species": "human",
        "panel": "p" * 20,
        "x_um": 1.0,
        "y_um": 1.0,
        "x_px": 1.0,
        "y_px": 1.0,
        "center": "nucleus",
        "mpp": 0.25,
        "fov_um": 56.0,
        "n_counts": 200,
        "neighbors": [{"cell_id": f"n{i}-1", "dx_um": 3.0, "dy_um": i} for i in range(8)],
        "flags": [],
    }
    starts = [512 + i * SAMPLE_BYTES for i in range(n_rows)]
    rows = [
        row
        | {
            "key": f"run__{i:09d}-1",
            "cell_id": f"{i:09d}-1",
            "jpg_offset": start,
            "counts_offset": start + 10_752,
            "neighbors_offset": start + 12_800,
        }
        for i, start in enumerate(starts)
    ]
    return pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)


def build(root: Path, n_rows: int, panel: Panel) -> float:
    """Seconds to make the index of so many rows, in shards of 10,000."""
    root.mkdir(parents=True)
    shards, table = [], table_of(10_000)
    for s in range(-(-n_rows // 10_000)):
        tar = root / f"run-D-{s:06d}.tar"
        of_shard = table.replace_schema_metadata({"shard": str(s)})  # each with a hash of its own
        pq.write_table(of_shard, tar.with_suffix(".parquet"), compression="zstd")
        info = ShardInfo(
            name=tar.stem,
            donor="D",
            n_samples=10_000,
            tar_bytes=10_001 * SAMPLE_BYTES,
            tar_sha256="0" * 64,
            table_sha256=sha256_of(tar.with_suffix(".parquet")),
        )
        shards.append(Shard(tar, manifest_of("run", panel, [info]), info, 0))
    started = time.monotonic()
    assert build_index(shards, root / "index") == len(shards)
    seconds = time.monotonic() - started
    assert index_file(shards[0], root / "index").stat().st_size == 20 * 10_000 + 16
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=10_000, help="a multiple of 500")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the index that is built")
    parser.add_argument("--out", type=Path, default=Path("build/resume"))
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        resume(given.out / "large", given.alone[0], given.alone[1] == "balanced")
        return 0
    shutil.rmtree(given.out, ignore_errors=True)
    panel = Panel.of("human", [Gene(symbol=f"GENE{i}") for i in range(500)])
    fabricate(given.out / "large", given.shards, panel)
    limits = Limits()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for reading in ("global", "block"):
        for balanced in ("", "balanced"):
            command = [sys.executable, "-m", "benchmarks.resume", "--out", str(given.out)]
            started = time.monotonic()
            done = subprocess.run(
                [*command, "--alone", reading, balanced], capture_output=True, text=True, check=True
            )
            process_s = time.monotonic() - started
            counts, seconds = done.stdout.splitlines()
            n, n_touched = map(int, counts.split())
            opened, first, second, touched, pickled = map(float, seconds.split())
            limits.head(f"{n:,} samples, {reading} {balanced}")
            limits.line("stream and first batch of indices, s", opened + first, "≤", LIMIT_S)
            limits.line(
                "the same with the index of its shards, s", opened + first + touched, "≤", LIMIT_S
            )
            limits.told("stream, s", f"{opened:.2f}")
            limits.told(f"first {BATCH} indices, ms", f"{1e3 * first:.1f}")
            limits.told(f"next {BATCH} indices, ms", f"{1e3 * second:.1f}")
            limits.told(f"index of its {n_touched:,} shards, s", f"{touched:.2f}")
            limits.told("stream packed for a worker, s", f"{pickled:.2f}")
            limits.told("whole process with its imports, s", f"{process_s:.2f}")
    seconds = build(given.out / "build", given.rows, panel)
    limits.head(f"index of {given.rows:,} samples")
    limits.told("built from tables, s", f"{seconds:.1f}")
    limits.told("µs a sample", f"{1e6 * seconds / given.rows:.2f}")
    print("\nmet" if limits.met else "\nNOT MET")
    return 0 if limits.met else 1


if __name__ == "__main__":
    sys.exit(main())
