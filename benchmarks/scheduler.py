"""Dask under 200 workers' worth of blocks that only sleep, as long as real ones were measured to.

    python -m benchmarks.scheduler overhead [--figures FULL.json]
    python -m benchmarks.scheduler corpus --figures FULL.json [--runs-at-once N …]

`overhead`: what a block that does nothing costs, with arguments as large as real ones', on one
and on two workers, and the share of that in the blocks that were measured. `corpus`: the block map
of `flows` on a scheduler process and 200 workers in a few more (each worker a thread), several runs
at once. Runs are those of `python -m benchmarks.scale full`; a block sleeps as long as it kept its
core, and between its maps a run sleeps as long as it kept the driver's, as if each run at once had
a core of the driver. Everything is `--speed` times as fast as measured, so that the scheduler has
as many times the blocks a second to place.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import psutil

from benchmarks.registration.limits import Limits
from benchmarks.scale.figures import CurationFigures, StageFigures, TaskFigures
from flows.cluster import BlockMap, Runtime
from segmentation.maps import Tasks

MIN_OF_IDEAL = 0.9
MAX_OVERHEAD = 0.03
N_NOTHINGS = 500
HOSTS = 4  # processes that the workers share

# Each would sample its thread a hundred times a second, and look at the same process twice.
_FIFTY_WORKERS_A_PROCESS = {
    "DASK_LOGGING__DISTRIBUTED": "error",
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL": "10s",
}


@dataclass(frozen=True, slots=True)
class Fake:
    """A block that sleeps, and what it carries to the worker and back."""

    seconds: float
    carried: bytes
    n_returned: int


def slept(fake: Fake) -> bytes:
    time.sleep(fake.seconds)
    return bytes(fake.n_returned)


def measure_overhead(limits: Limits, runs: Sequence[CurationFigures]) -> None:
    """Milliseconds of a block that does nothing, and the share of them in real blocks."""
    kinds = {task.name: task for run in runs for stage in run.stages for task in stage.tasks}
    sizes = {name: task.argument_bytes for name, task in kinds.items()} or {"nothing": 100}
    print(f"{N_NOTHINGS} blocks that do nothing; load {os.getloadavg()[0]:.1f}")
    print("\n| blocks | workers | argument, kB | ms a block | real, median s | share |")
    print("|---|---|---|---|---|---|")
    worst = 0.0
    for n_workers in (1, 2):
        # One worker by its address, since one local worker needs no Dask.
        with _cluster(n_workers, hosts=n_workers) as (address, _), _map(address) as blocks:
            list(blocks(slept, [Fake(0.0, b"", 0)] * 200))
            for name, n_bytes in sizes.items():
                fakes = Tasks([Fake(0.0, random.randbytes(n_bytes), 100)] * N_NOTHINGS, "fakes")
                start_s = time.perf_counter()
                for _ in blocks(slept, fakes):
                    pass
                each_s = (time.perf_counter() - start_s) / N_NOTHINGS
                told = ["–", "–"]
                if name in kinds and kinds[name].n > 1:
                    real_s = median(kinds[name].cpu_s)
                    # While all workers are busy one of them waits for each block that is placed.
                    share = each_s * n_workers / real_s
                    worst = max(worst, share)
                    told = [f"{real_s:.2f}", f"{share:.4f}"]
                row = (name, n_workers, f"{n_bytes / 1e3:.1f}", f"{each_s * 1e3:.2f}", *told)
                print(f"| {' | '.join(map(str, row))} |", flush=True)
    if kinds:
        limits.head("overhead")
        limits.line("largest share of a block's time", worst, "≤", MAX_OVERHEAD)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Runs as measured, `speed` times as fast."""

    run: CurationFigures
    n_runs: int
    speed: float
    driver_share: float  # of the driver's measured time

    @property
    def block_s(self) -> float:
        """Seconds of sleep in all blocks."""
        return self.n_runs * sum(map(self._seconds, self.run.stages))

    def ideal_s(self, n_workers: int) -> float:
        """Seconds at best, as all registrations come first, one block a run."""
        first = [stage for stage in self.run.stages if stage.stage == "registration"]
        rounds = -(-self.n_runs // n_workers)
        rest_s = self.block_s - self.n_runs * sum(map(self._seconds, first))
        return rounds * sum(map(self._seconds, first)) + rest_s / n_workers

    def _seconds(self, stage: StageFigures) -> float:
        return sum(sum(task.cpu_s) for task in stage.tasks) / self.speed

    @property
    def n_blocks(self) -> int:
        return self.n_runs * sum(t.n for stage in self.run.stages for t in stage.tasks)

    @property
    def driver_s(self) -> float:
        """Seconds of the driver for all runs."""
        of_run = sum(stage.driver_cpu_s for stage in self.run.stages)
        return of_run * self.n_runs / self.speed * self.driver_share

    def drive(self, blocks: BlockMap, registering: bool, number: int) -> None:
        """One run, as far as its registration or from there on: stages in order.

        Of each the driver's part and then its maps.
        """
        for stage in self.run.stages:
            if (stage.stage == "registration") != registering:
                continue
            time.sleep(stage.driver_cpu_s / self.speed * self.driver_share)
            # Windows and the blocks that wait for them are under way together, as one map.
            fakes = [fake for task in stage.tasks for fake in self._fakes(task)]
            random.Random(number).shuffle(fakes)
            for _ in blocks(slept, Tasks(fakes, f"fakes of run {number}")):
                pass

    def _fakes(self, task: TaskFigures) -> Iterator[Fake]:
        carried = random.Random(0).randbytes(task.argument_bytes)
        for seconds in task.cpu_s:
            yield Fake(seconds / self.speed, carried, task.result_bytes)


def drive_corpus(limits: Limits, corpus: Corpus, n_workers: int, at_once: Sequence[int]) -> None:
    heads = ("runs at once", "s", "ideal s", "of the ideal", "utilisation", "blocks/s",
             "scheduler, cores", "scheduler, GB", "driver, cores", "driver, GB",
             "workers, cores")  # fmt: skip
    ideal_s = corpus.ideal_s(n_workers)
    print(
        f"{corpus.n_runs} runs of {corpus.run.n_cells:,} cells, {corpus.n_blocks:,} blocks, "
        f"{corpus.block_s / corpus.n_blocks:.3f} s each, {n_workers} workers, "
        f"{corpus.speed:g} times as fast as measured; driver {corpus.driver_s:.0f} s; "
        f"load {os.getloadavg()[0]:.1f}"
    )
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    best = 0.0
    with _cluster(n_workers, HOSTS) as (address, processes):
        for n in at_once:
            with _map(address) as blocks:
                list(blocks(slept, [Fake(0.0, b"", 0)] * n_workers))
                before, start_s = [_cpu_s(p) for p in processes], time.perf_counter()
                # As `flows.pipeline` does: all registrations first, and more of them at once.
                for registering, at_a_time in ((True, 1 if n == 1 else 16 * n), (False, n)):
                    with ThreadPoolExecutor(at_a_time) as threads:
                        drive = partial(corpus.drive, blocks, registering)
                        list(threads.map(drive, range(corpus.n_runs)))
                wall_s = time.perf_counter() - start_s
            spent = [(_cpu_s(p) - b) / wall_s for p, b in zip(processes, before, strict=True)]
            scheduler, driver, *workers = spent
            best = max(best, ideal_s / wall_s)
            row = (
                str(n), f"{wall_s:.1f}", f"{ideal_s:.1f}", f"{ideal_s / wall_s:.3f}",
                f"{corpus.block_s / n_workers / wall_s:.3f}",
                f"{corpus.n_blocks / wall_s:.0f}", f"{scheduler:.2f}", _gb(processes[0]),
                f"{driver:.2f}", _gb(processes[1]), f"{sum(workers):.2f}",
            )  # fmt: skip
            print(f"| {' | '.join(row)} |", flush=True)
    limits.head(f"{n_workers} workers")
    limits.line("of the ideal, at best", best, "≥", MIN_OF_IDEAL)


def _cpu_s(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))


def _gb(process: psutil.Process) -> str:
    return f"{process.memory_info().rss / 1e9:.2f}"


@contextmanager
def _map(address: str) -> Iterator[BlockMap]:
    with BlockMap(Runtime(scheduler=address)) as blocks:
        yield blocks


@contextmanager
def _cluster(n_workers: int, hosts: int) -> Iterator[tuple[str, list[psutil.Process]]]:
    """Address of a scheduler with its workers; its process, this one, and those of the workers."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        file = Path(folder, "scheduler.json")
        started = []

        def start(*argv: str) -> None:
            environ = {**os.environ, **_FIFTY_WORKERS_A_PROCESS}
            root = Path(__file__).parents[1]
            process = subprocess.Popen([sys.executable, *argv], cwd=root, env=environ)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            started.append(psutil.Process(process.pid))

        start("-m", "dask", "scheduler", "--scheduler-file", str(file), "--host", "127.0.0.1",
              "--port", "0", "--no-dashboard")  # fmt: skip
        while not file.exists():
            time.sleep(0.1)
        address = json.loads(file.read_text())["address"]
        for i in range(hosts):
            n = n_workers // hosts + (i < n_workers % hosts)
            start("-m", "benchmarks.scheduler", "host", address, str(n), folder)
        from distributed import Client

        with Client(address) as client:
            client.wait_for_workers(n_workers, timeout=300)
        yield address, [started[0], psutil.Process(), *started[1:]]


async def _host(address: str, n_workers: int, folder: str) -> None:
    """So many workers of one thread, without nannies, until this process is ended."""
    from distributed import Worker

    workers = [
        Worker(address, nthreads=1, memory_limit=0, local_directory=folder, dashboard=False)
        for _ in range(n_workers)
    ]
    await asyncio.gather(*workers)
    await asyncio.gather(*(worker.finished() for worker in workers))


def main() -> int:
    if sys.argv[1:2] == ["host"]:
        address, n, folder = sys.argv[2:]
        asyncio.run(_host(address, int(n), folder))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("overhead", "corpus"))
    parser.add_argument("--figures", type=Path, help="as `benchmarks.scale full` leaves them")
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--runs-at-once", type=int, nargs="+", default=(1, 4, 16))
    parser.add_argument("--driver-share", type=float, default=1.0, help="0: the scheduler alone")
    parser.add_argument("--speed", type=float, default=1.0)
    args = parser.parse_args()
    runs = []
    if args.figures is not None:
        runs = [CurationFigures.model_validate(f) for f in json.loads(args.figures.read_text())]
    limits = Limits()
    if args.what == "overhead":
        measure_overhead(limits, runs)
    else:
        largest = max(runs, key=lambda run: run.n_cells)
        corpus = Corpus(largest, args.runs, args.speed, args.driver_share)
        drive_corpus(limits, corpus, args.workers, args.runs_at_once)
    print("ok" if limits.met else "NOT MET")
    return 0 if limits.met else 1


if __name__ == "__main__":
    raise SystemExit(main())
