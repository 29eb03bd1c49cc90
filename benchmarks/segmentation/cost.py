"""Each part of the work alone, and all of it together, on the same slide in the same run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from functools import reduce
from operator import add
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.registration.limits import Limits
from benchmarks.segmentation.apart import run_apart
from benchmarks.segmentation.slides import SLIDE_MPP, SQUARE_PX, write_slide
from flows.cluster import BlockMap, Runtime
from segmentation.blocks import plan_blocks
from segmentation.collect import publish_block
from segmentation.config import BLOCK_PX, SegmentationConfig
from segmentation.maps import InTurn, Maps
from segmentation.network import load_model
from segmentation.nuclei import find_nuclei, halo_px
from segmentation.segment import plan_slide, run_windows, segment
from segmentation.windows import decode_group, read_field

MAX_TOTAL = 1.15  # times the sum of the parts over the cores in use
MIN_DYNAMICS_MPX_S = 0.9
MAX_GROWTH = 1.25  # of memory, from 1 to 16 times the area
N_SQUARES, N_ROUNDS = 4, 3


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of one process for each part of a slide, and its pixels at the network's size."""

    decode_s: float
    network_s: float
    dynamics_s: float
    outlines_s: float
    n_mpx: float

    def __add__(self, other: Parts) -> Parts:
        return Parts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def sum_s(self) -> float:
        return self.decode_s + self.network_s + self.dynamics_s + self.outlines_s


def measure(limits: Limits, out: Path) -> None:
    """The parts on one process, and all of it on one and on two, in turn: machines are shared."""
    slide = write_slide(out / f"slide-{N_SQUARES}.ome.tif", N_SQUARES)
    total_s = {1: 0.0, 2: 0.0}
    with ExitStack() as stack:
        maps = {n: stack.enter_context(BlockMap(Runtime(workers=n, device="cpu"))) for n in total_s}
        # Once before: the start of workers is no part of a long run.
        for n_workers in total_s:
            _total(slide, maps[n_workers])
        rounds = []
        for _ in range(N_ROUNDS):
            rounds.append(_parts(slide, out))
            for n_workers in total_s:
                total_s[n_workers] += _total(slide, maps[n_workers])[0]
    parts = reduce(add, rounds)
    limits.head(f"{N_ROUNDS} times {rounds[0].n_mpx:.1f} Mpx of tissue at the network's pixels")
    for name, seconds in (
        ("decoding and resampling", parts.decode_s),
        ("network", parts.network_s),
        ("dynamics with quality check", parts.dynamics_s),
        ("outlines and publishing", parts.outlines_s),
    ):
        limits.told(name, f"{seconds:.1f} s, {parts.n_mpx / seconds:.2f} Mpx/s")
    speed = parts.n_mpx / parts.dynamics_s
    limits.line("dynamics with quality check, Mpx/s", speed, "≥", MIN_DYNAMICS_MPX_S)
    for n_workers, seconds in total_s.items():
        limits.told(f"all of it, processes: {n_workers}", f"{seconds:.1f} s")
        over = seconds / (parts.sum_s / n_workers)
        limits.line(f"over the sum of the parts / {n_workers}", over, "≤", MAX_TOTAL)


def _timed(work: Callable[[], Any]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def _parts(slide: Path, out: Path) -> Parts:
    network = load_model("compact", "cpu")
    with TemporaryDirectory(dir=out) as folder:
        kept = Path(folder)
        plan = plan_slide(kept, slide, SegmentationConfig(), None, "cpu")
        groups = plan.grid.groups()
        decode_s = _timed(lambda: [decode_group(g, plan.source, plan.grid) for g in groups])
        n_windows = int(plan.grid.shown.sum())
        window = plan.grid.window_px
        rgb = np.random.default_rng(0).integers(90, 255, (1, window, window, 3), dtype=np.uint8)
        network.predict(rgb, plan.normalisation)
        network_s = _timed(
            lambda: [network.predict(rgb, plan.normalisation) for _ in range(n_windows)]
        )
        run_windows(plan, tuple(groups))
        dynamics_s = outlines_s = 0.0
        for block in plan_blocks(plan.grid, BLOCK_PX):
            started_s = time.perf_counter()
            box = block.read_box(halo_px(plan.grid.mpp))
            field = read_field(kept, plan.grid, box)
            found = find_nuclei(field, box[:2], block.core, plan.grid.mpp, "cpu")
            half_s = time.perf_counter()
            publish_block(kept, block, found, plan.grid.mpp, plan.slide_mpp)
            dynamics_s += half_s - started_s
            outlines_s += time.perf_counter() - half_s
        width, height = plan.grid.size_px
    return Parts(decode_s, network_s, dynamics_s, outlines_s, width * height / 1e6)


def _total(slide: Path, maps: Maps) -> tuple[float, int]:
    """Wall time of `segment`, and how many nuclei it found."""
    with TemporaryDirectory(dir=slide.parent) as folder:
        kept, config = Path(folder), SegmentationConfig()
        started_s = time.perf_counter()
        done = segment(kept / "n.parquet", kept, slide, config, device="cpu", maps=maps)
        return time.perf_counter() - started_s, done.facts.n_nuclei


def measure_memory(limits: Limits, out: Path) -> None:
    """Peak memory of one process over 1, 4 and 16 times the area, each in a process of its own."""
    limits.head("peak memory of one process")
    peaks = {}
    for n_squares in (2, 4, 8):
        slide = write_slide(out / f"slide-{n_squares}.ome.tif", n_squares)
        printed, peaks[n_squares] = run_apart(__name__, str(slide))
        seconds, n_nuclei = map(float, printed.split())
        mm2 = (n_squares * SQUARE_PX * SLIDE_MPP / 1000) ** 2
        limits.told(
            f"{mm2:.0f} mm², {n_nuclei:,.0f} nuclei", f"{peaks[n_squares]:.2f} GiB, {seconds:.0f} s"
        )
    limits.line("16 times the area over 1, memory", peaks[8] / peaks[2], "≤", MAX_GROWTH)


def main() -> None:
    """One run in this process: its seconds and how many nuclei."""
    print(*_total(Path(sys.argv[1]), InTurn()))


if __name__ == "__main__":
    main()
