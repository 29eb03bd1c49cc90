"""One curation, measured: a process of its own, whose figures are written as JSON.

`python -m benchmarks.scale.measure CONFIG.toml RESULT.json --workers N [--nuclei TABLE]`
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from distributed.protocol.pickle import dumps

from benchmarks.scale.figures import CurationFigures, StageFigures, TaskFigures
from flows.built import Built, direct
from flows.cluster import BlockMap, Runtime
from flows.config import read_curate_config
from flows.outfolder import claim_out
from flows.pipeline import curate, plan_runs
from flows.scratch import scratch
from flows.stages import RunStages
from pairing.slide import open_slide
from segmentation.config import FACTS_FILE, NUCLEI_FILE, SegmentationFacts
from shards.artifact import build_artifact
from shards.dataset import read_record
from shards.store import Store

_SAMPLE_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Done:
    """What a block returned, and what it took in its worker."""

    result: Any
    seconds: float
    cpu_s: float


def timed(fn: Callable[[Any], Any], item: Any) -> Done:
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    result = fn(item)
    return Done(result, time.perf_counter() - start_s, time.process_time() - start_cpu_s)


@dataclass(slots=True)
class _Kind:
    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    argument_bytes: int = 0
    result_bytes: int = 0


class TimedMap:
    """A map that notes what every block takes, and how large are arguments and results."""

    def __init__(self, blocks: BlockMap) -> None:
        self._blocks = blocks
        self._kinds: dict[str, _Kind] = defaultdict(_Kind)

    def __call__(self, fn: Callable[[Any], Any], items: Any) -> Iterator[Any]:
        return self._noted(self._blocks, fn, items)

    def on_gpu(self, fn: Callable[[Any], Any], items: Any) -> Iterator[Any]:
        return self._noted(self._blocks.on_gpu, fn, items)

    def taken(self) -> tuple[TaskFigures, ...]:
        """What was noted since the last call."""
        kinds, self._kinds = self._kinds, defaultdict(_Kind)
        return tuple(
            TaskFigures(
                name=name,
                n=len(kind.seconds),
                seconds=tuple(kind.seconds),
                cpu_s=tuple(kind.cpu_s),
                argument_bytes=kind.argument_bytes,
                result_bytes=kind.result_bytes,
            )
            for name, kind in kinds.items()
            if kind.seconds
        )

    def _noted(
        self, blocks: Callable[[Any, Any], Iterable[Any]], fn: Callable[[Any], Any], items: Any
    ) -> Iterator[Any]:
        kind = self._kinds[getattr(fn, "func", fn).__name__]
        n_bound = len(dumps(fn))

        def note(item: Any) -> None:
            n_bytes = n_bound + len(dumps(item))
            kind.argument_bytes = max(kind.argument_bytes, n_bytes)

        for done in blocks(partial(timed, fn), _Noted(items, note)):
            kind.seconds.append(done.seconds)
            kind.cpu_s.append(done.cpu_s)
            kind.result_bytes = max(kind.result_bytes, len(dumps(done.result)))
            yield done.result


class _Noted:
    """Items as they were, each noted when it is handed out."""

    def __init__(self, items: Any, note: Callable[[Any], None]) -> None:
        self._items, self._note = items, note
        if hasattr(items, "what"):
            self.what = items.what

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._note(item)
            yield item


class Peaks:
    """Resident memory of this process and of its largest child, watched by a thread."""

    def __init__(self) -> None:
        self._here = psutil.Process()
        self._peak = [0, 0]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def taken(self) -> tuple[int, int]:
        """The peaks since the last call."""
        here, child = self._peak
        self._peak = [0, 0]
        return here, child

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._done.set()
            self._thread.join()

    def _watch(self) -> None:
        n = 0
        workers: list[psutil.Process] = []
        while not self._done.wait(_SAMPLE_EVERY_S):
            if n % 10 == 0:  # which processes there are is told by reading all of the machine's
                workers = self._here.children(recursive=True)
            n += 1
            sizes = [_resident_bytes(worker) for worker in workers]
            self._peak = [
                max(self._peak[0], _resident_bytes(self._here)),
                max([self._peak[1], *sizes]),
            ]


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _cpu_s() -> tuple[float, float]:
    """Processor time of this process and of its workers."""
    here = psutil.Process()
    of_workers = 0.0
    for child in here.children(recursive=True):
        try:
            of_workers += sum(child.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return sum(here.cpu_times()[:2]), of_workers


class Stages:
    """Calls stages one after the other, and notes what each of them took."""

    def __init__(self, blocks: TimedMap, peaks: Peaks) -> None:
        self.figures: list[StageFigures] = []
        self._blocks, self._peaks = blocks, peaks

    def __call__(self, name: str, make: Callable[[], Built]) -> Built:
        self._blocks.taken()
        self._peaks.taken()
        cpu, start_s = _cpu_s(), time.perf_counter()
        built = direct(name, make)
        seconds = time.perf_counter() - start_s
        if built.reused:
            return built
        driver_s, workers_s = (b - a for a, b in zip(cpu, _cpu_s(), strict=True))
        driver_peak, worker_peak = self._peaks.taken()
        sizes = [p.stat().st_size for p in built.folder.rglob("*") if p.is_file()]
        self.figures.append(
            StageFigures(
                stage=built.stage,
                seconds=seconds,
                driver_cpu_s=driver_s,
                workers_cpu_s=workers_s,
                driver_peak_bytes=driver_peak,
                worker_peak_bytes=worker_peak,
                n_files=len(sizes),
                n_bytes=sum(sizes),
                tasks=self._blocks.taken(),
            )
        )
        print(f"{name}: {seconds:.1f} s", flush=True)
        return built


def _with_libraries(item: int) -> int:
    """Import what every stage needs: the start of processes is no part of a long run."""
    import segmentation.segment  # noqa: F401  # for what importing it loads

    time.sleep(0.5)  # so that every worker gets some
    return item


def _place_nuclei(stages: RunStages, table: Path) -> None:
    """An artifact of nuclei that were not looked for."""

    def make(out: Path, kept: Path) -> dict[str, Any]:
        shutil.copyfile(table, out / NUCLEI_FILE)
        return {"from": "truth"}

    parent = stages.folder_of("nuclei").parent
    identity = stages.identities["nuclei"]
    build_artifact(parent, identity, make, provenance={}, check_inputs=lambda: None)


def measure(
    what: str, config_path: Path, n_workers: int, device: str, nuclei: Path | None
) -> CurationFigures:
    """Curate the one run of a config into its folder, of which nothing is there yet."""
    config = read_curate_config(config_path)
    (run,) = config.runs
    assert run.slide is not None
    peaks = Peaks()
    runtime = Runtime(workers=n_workers, device=device)
    claim_out(config.out, config.name, config.split.withdrawn_names)
    with scratch(config.out), BlockMap(runtime) as cluster, peaks.watching():
        _with_libraries(0)
        list(cluster(_with_libraries, range(4 * n_workers)))
        blocks = TimedMap(cluster)
        calls = Stages(blocks, peaks)
        start_s = time.perf_counter()
        (planned,), _ = plan_runs(config, blocks, Store(config.out), device=device)
        hashing_s = time.perf_counter() - start_s
        if nuclei is not None:
            _place_nuclei(planned, nuclei)
        curated = curate(config, blocks, device=device, call=calls)
    for error in curated.failures.values():
        raise error
    assert curated.dataset is not None
    built = {b.stage: b.summary for b in curated.built}
    inputs = [p for p in run.xenium.rglob("*") if p.is_file()] + [run.slide]
    with open_slide(run.slide) as slide:
        slide_mpx = slide.size_px[0] * slide.size_px[1] / 1e6
    return CurationFigures(
        what=what,
        n_cells=built["cells"]["n_cells"],
        n_pairs=curated.dataset.totals.kept,
        n_transcripts=built["cells"]["counts"]["n_transcripts"],
        slide_mpx=slide_mpx,
        tissue_mm2=_tissue_mm2(planned),
        n_workers=n_workers,
        hashing_s=hashing_s,
        input_bytes=sum(p.stat().st_size for p in inputs),
        load=os.getloadavg()[0],
        stages=tuple(calls.figures),
    )


def _tissue_mm2(stages: RunStages) -> float | None:
    """What was looked at for nuclei; None where they were placed or not wanted."""
    if "nuclei" not in stages.identities:
        return None
    path = stages.folder_of("nuclei") / FACTS_FILE
    return read_record(path, SegmentationFacts).looked_at_mm2 if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--what", required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--nuclei", type=Path)
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    figures = measure(args.what, args.config, args.workers, args.device, args.nuclei)
    args.result.write_text(figures.model_dump_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
