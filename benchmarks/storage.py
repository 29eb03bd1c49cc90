"""Curating to S3 and training from it, beside a folder and beside the plain S3 client.

    python -m benchmarks.storage --out DIR [--cells N] [--samples N]

The server is moto's, of one process of Python on this machine: its own rate is told by the plain
client (s3fs), which asks it for the same ranges one after the other. Requests and bytes of curating
are counted on the line; readers have none between.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg

from benchmarks.loader.corpus import plain_row, publish_runs
from benchmarks.registration.limits import Limits
from flows.cli import main as cellpair
from shards.errors import BadInput
from shards.remote import Location, RemotePath, remote_path
from shards.schema import Gene, Panel, PatchSpec
from shards.stream import read_stream
from shards.write import Sample, narrow_counts
from tests.s3 import BUCKET, ENVIRONMENT, Line, make_bucket, server

PX, N_GENES, N_KINDS = 224, 300, 32
PATCH = PatchSpec(image="he", fov_um=56.0, size_px=PX, center="nucleus", jpeg_quality=95)
PAIRS = 7
PIECES, PIECE_SAMPLES, BATCH = 64, 256, 512
CONFIG = """
name = "storage"
out = "{out}"
[segmentation]
model = "none"
[split]
assign = {{ D1 = "train" }}
[[runs]]
id = "r1"
xenium = "{run}/outs"
slide = "{run}/he.ome.tif"
alignment = "{run}/he_imagealignment.csv"
donor = "D1"
"""


def main() -> int:
    """0 if every limit is met, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/storage"))
    parser.add_argument("--cells", type=int, default=3000)
    parser.add_argument("--samples", type=int, default=6000)
    given = parser.parse_args()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.update(ENVIRONMENT)
    limits = Limits()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with server(out / "server.log") as port:
        make_bucket(port)
        line = Line(port)
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{line.port}"
        _curating(limits, line, out, given.cells)
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        _forget_clients()
        _reading(limits, out, given.samples)
    return 0 if limits.met else 1


def _curating(limits: Limits, line: Line, out: Path, n_cells: int) -> None:
    run = out / f"run-{n_cells}"
    if not (run / "he.ome.tif").exists():
        assert cellpair(["simulate", str(run), "--cells", str(n_cells)]) == 0
    limits.head(f"curating {n_cells:,} simulated cells")
    remote = remote_path(f"s3://{BUCKET}/curated")
    shutil.rmtree(out / "local", ignore_errors=True)
    local_s = _curate(out, run, out / "local", "a")
    line.clear()
    remote_s = _curate(out, run, remote, "a")
    n_bytes = sum(facts.st_size for facts in remote.files().values())
    limits.told("to a folder", f"{local_s:.1f} s")
    limits.told("to S3", f"{remote_s:.1f} s, {_asked(line)}")
    limits.told("what lies there", f"{n_bytes / 1e6:.1f} MB, {len(remote.files())} objects")
    limits.line("bytes sent over bytes that lie there", line.n_bytes_up / n_bytes, "≤", 1.1)
    line.clear()
    again_s = _curate(out, run, remote, "a")
    limits.told("again, nothing to do", f"{again_s:.1f} s, {_asked(line)}")
    line.clear()
    other_s = _curate(out, run, remote, "b")
    limits.told("again, from another machine", f"{other_s:.1f} s, {_asked(line)}")
    limits.line("bytes it got over bytes that lie there", line.n_bytes_down / n_bytes, "≤", 0.1)
    same = [
        name
        for name in remote.files()
        if name.startswith(("runs/", "panels/", "datasets/"))
        and (remote / name).read_bytes() != (out / "local" / name).read_bytes()
    ]
    limits.none("objects with other bytes than the file of the folder", same, len(remote.files()))


def _curate(out: Path, run: Path, to: Location, machine: str) -> float:
    os.environ["CELLPAIR_CACHE"] = str(out / f"cache-{machine}")
    config = out / "curate.toml"
    config.write_text(CONFIG.format(out=to, run=run))
    started_s = time.monotonic()
    assert cellpair(["curate", str(config), "--workers", "1", "--device", "cpu"]) == 0
    return time.monotonic() - started_s


def _asked(line: Line) -> str:
    methods = Counter(method for method, _ in line.requests)
    told = ", ".join(f"{n} {method}" for method, n in sorted(methods.items()))
    return f"{told}; {line.n_bytes_up / 1e6:.2f} MB up, {line.n_bytes_down / 1e6:.2f} MB down"


def _reading(limits: Limits, out: Path, n_samples: int) -> None:
    os.environ["CELLPAIR_CACHE"] = str(out / "cache-reading")
    panel = Panel.of("human", [Gene(symbol=f"G{i}", ensembl=None) for i in range(N_GENES)])
    folder = publish_runs(out / f"data-{n_samples}", panel, PATCH, [n_samples], _samples, 1000)
    remote = remote_path(f"s3://{BUCKET}/data")
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        (remote / path.relative_to(folder).as_posix()).upload(path)
    n_bytes = sum(f.st_size for name, f in remote.files().items() if name.endswith(".tar"))
    limits.head(f"reading {n_samples:,} patches of {PX} px, {n_bytes / 1e6:.0f} MB, by blocks")
    seconds: dict[str, list[float]] = {"folder": [], "S3": [], "plain client": []}
    for turn in range(PAIRS + 1):
        taken = {
            "folder": _epoch(folder),
            "S3": _epoch(remote),
            "plain client": _plain(remote),
        }
        if turn:  # the first fills caches and starts clients
            for name, s in taken.items():
                seconds[name].append(s)
    for name, s in seconds.items():
        median_s = statistics.median(s)
        limits.told(
            name, f"{n_samples / median_s:,.0f} images/s, {n_bytes / 1e6 / median_s:.0f} MB/s"
        )
    ratios = [p / s for p, s in zip(seconds["plain client"], seconds["S3"], strict=True)]
    limits.line(
        "rate over the plain client's, median of pairs", statistics.median(ratios), "≥", 0.9
    )
    print(f"load {os.getloadavg()[0]:.1f}")


def _epoch(root: Location) -> float:
    stream = read_stream([root], "train")
    started_s, n = time.monotonic(), 0
    order = stream.order(0, reading="block", pieces=PIECES, piece_samples=PIECE_SAMPLES)
    with stream.reader("block", piece_samples=PIECE_SAMPLES, cache_bytes=2 << 30) as reader:
        starts = range(0, order.n, BATCH)
        rows = [order.batch(range(s, min(s + BATCH, order.n))) for s in starts]
        for batch in rows:
            reader.expect(batch)
        for batch in rows:
            for _, pair in reader.each(batch):
                assert not isinstance(pair, BadInput), pair
                n += 1
    assert n == order.n
    return time.monotonic() - started_s


def _plain(remote: RemotePath) -> float:
    """The tars in ranges of the pieces' size, by s3fs alone."""
    import s3fs

    client = s3fs.S3FileSystem(use_listings_cache=False)
    there = remote.files()
    started_s = time.monotonic()
    for name, facts in there.items():
        if name.endswith(".tar"):
            size = facts.st_size * PIECE_SAMPLES // 1000
            for start in range(0, facts.st_size, size):
                client.cat_file(f"{remote}/{name}", start=start, end=start + size)
    return time.monotonic() - started_s


def _samples(panel: Panel, donor: str, n: int, run: int) -> Iterator[Sample]:
    rng = np.random.default_rng(run)
    coarse = rng.integers(0, 256, (N_KINDS, PX // 4, PX // 4, 3), dtype=np.uint8)
    kinds = [
        simplejpeg.encode_jpeg(np.ascontiguousarray(k.repeat(4, 0).repeat(4, 1)), quality=95)
        for k in coarse
    ]
    counts = narrow_counts(np.stack([np.arange(80), np.arange(80) + 1]))
    for i in range(n):
        yield Sample(
            cell_id=f"c{i}",
            donor=donor,
            image_jpeg=kinds[i % N_KINDS],
            counts=counts,
            neighbors=None,
            row=plain_row(panel, PATCH, i, 80),
        )


def _forget_clients() -> None:
    from shards.remote import _filesystem

    _filesystem.cache_clear()


if __name__ == "__main__":
    sys.exit(main())
