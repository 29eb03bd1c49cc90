"""The block map on Dask: a local cluster or any scheduler by address, started when first needed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from multiprocessing import resource_tracker
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

import dask
from tqdm import tqdm

from flows.log import at_work
from flows.transient import pause_or_raise, persistently
from segmentation.maps import Items
from shards.schema import Record

if TYPE_CHECKING:
    from distributed import Client, Future, LocalCluster

log = logging.getLogger("cellpair")

A = TypeVar("A")
B = TypeVar("B")

_TELL_EVERY_S = 10.0
_START_S, _CLOSE_S = 120, 10

# Networks and steps free and take tens of megabytes all the time, and Dask has what is freed given
# back to the system at once: networks took twice as long then. glibc's (mallopt(3)): one heap for
# all threads, from which large pieces come too, and which keeps up to a gigabyte.
_KEEP_FREED = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
# Dask looks at a worker's stack 100 times a second, and at its memory and its own loop hardly less
# often: on two cores 3 % of a run.
_SELDOM_LOOKED = {
    "distributed.worker.profile.enabled": False,
    "distributed.worker.memory.monitor-interval": "500ms",
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "2s",
}

# Blocks under way for each worker: one at work, one waiting, so that nobody idles and the
# scheduler never holds the results of a whole slide.
_IN_FLIGHT_PER_WORKER = 2


class Runtime(Record):
    """Where and how fast, never what: no part of any fingerprint."""

    workers: int = os.cpu_count() or 1
    scheduler: str | None = None
    device: str = "auto"


class BlockMap:
    """`blocks(fn, items)` runs pure block functions on Dask workers, one thread each.

    The cluster starts at the first call, so that a run whose artifacts are all there never waits
    for one. With one worker and no scheduler blocks run in this process. Of local workers one a
    GPU offers it as the resource GPU, and the others see none. They share the machine's (or the
    container's) memory evenly; one that needs more is killed and its block redone. What they put
    aside lies where `tempfile` puts its own.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._stack = ExitStack()
        self._client: Client | None = None
        self._gpus: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # That a worker which has torch to take down takes its seconds is nobody's concern now.
        logging.getLogger("distributed.nanny").setLevel(logging.ERROR)
        self._stack.close()

    def __call__(self, fn: Callable[[A], B], items: Items[A]) -> Iterable[B]:
        return _with_progress(self._map(fn, items, gpu=False), items)

    def on_gpu(self, fn: Callable[[A], B], items: Items[A]) -> Iterable[B]:
        """As a call, but only on workers that offer the resource GPU, where any does."""
        return _with_progress(self._map(fn, items, gpu=True), items)

    def _map(self, fn: Callable[[A], B], items: Iterable[A], *, gpu: bool) -> Iterator[B]:
        if self._runtime.scheduler is None and self._runtime.workers == 1:
            for item in items:
                yield persistently(partial(fn, item))
            return
        from distributed import as_completed

        client = self._started()
        there = client.scheduler_info(n_workers=-1)["workers"].values()
        # Local workers may still be starting, the one with the GPU too; others come and go.
        offered = bool(self._gpus) or any("GPU" in w.get("resources", {}) for w in there)
        resources = {"GPU": 1} if gpu and offered else None
        n_workers = self._runtime.workers if self._runtime.scheduler is None else len(there)
        waiting = iter(items)
        limit = _IN_FLIGHT_PER_WORKER * max(1, n_workers)
        pending = as_completed()
        tries: dict[Future[B], tuple[A, int]] = {}

        def submit(item: A, n_tries: int) -> None:
            future = client.submit(fn, item, pure=False, resources=resources)
            tries[future] = (item, n_tries)
            pending.add(future)

        for _, item in zip(range(limit), waiting, strict=False):
            submit(item, 0)
        for future in pending:
            item, n_tries = tries.pop(future)
            error = future.exception()
            if error is not None:
                pause_or_raise(_lost(error), n_tries)
                submit(item, n_tries + 1)
                continue
            result = future.result()
            for item in waiting:
                submit(item, 0)
                break
            yield result

    def _started(self) -> Client:
        if self._client is None:
            # Half a second of import that `--help` and runs without block work do not need.
            from distributed import Client

            # Its import sets this to INFO: ports and handshakes, between the lines that matter.
            logging.getLogger("distributed").setLevel(logging.WARNING)
            if self._runtime.scheduler is not None:
                self._client = self._stack.enter_context(Client(self._runtime.scheduler))
            else:
                # Ctrl-C is for this process, which tells its workers: they and Dask's threads
                # inherit what is blocked while they are started. Before it, Python's tracker of
                # resources, whose start would unblock it.
                resource_tracker.ensure_running()
                before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    self._client = self._local_client()
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self._client

    def _local_client(self) -> Client:
        from distributed import Client, LocalCluster
        from distributed.system import MEMORY_LIMIT

        n = self._runtime.workers
        # What a block raises is told here, with its run and stage; a worker's own lines double it.
        name = "distributed.nanny.pre-spawn-environ"
        environ = {
            **dask.config.get(name), **_KEEP_FREED, "DASK_LOGGING__DISTRIBUTED": "critical",
        }  # fmt: skip
        with dask.config.set({**_SELDOM_LOOKED, name: environ}):
            cluster = LocalCluster(
                # None at first, and a client of the scheduler rather than of the cluster: should a
                # worker die while it starts, both would wait for it for ever.
                n_workers=0,
                threads_per_worker=1,
                memory_limit=MEMORY_LIMIT // n,
                processes=True,
                host="127.0.0.1",
                # Any free port: two runs on one machine must not fight for 8787.
                dashboard_address="127.0.0.1:0",
            )
            self._stack.callback(_close, cluster)
            if self._runtime.device != "cpu":
                self._gpus = _gpus()[:n]
            if self._gpus:
                _give_gpus(cluster, self._gpus)
            cluster.scale(n)
            client: Client = self._stack.enter_context(Client(cluster.scheduler_address))
            client.wait_for_workers(1, timeout=_START_S)
        return client


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here: what it does name, else every GPU."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return [str(i) for i, _ in enumerate(line for line in lines if line.startswith("GPU "))]


def _give_gpus(cluster: LocalCluster, gpus: list[str]) -> None:
    """One worker a GPU, which offers it; the others, yet to be started, see none."""
    options = cluster.new_spec["options"]
    for gpu in gpus:
        own = {"resources": {"GPU": 1}, "env": {"CUDA_VISIBLE_DEVICES": gpu}}
        spec = {**cluster.new_spec, "options": {**options, **own}}
        cluster.worker_spec[f"gpu-{gpu}"] = spec
    options["env"] = {"CUDA_VISIBLE_DEVICES": ""}


def _close(cluster: LocalCluster) -> None:
    """Close a local cluster; what does not end by itself in time is killed: its work is done."""
    try:
        cluster.close(timeout=_CLOSE_S)
    except TimeoutError:
        log.debug("the local cluster did not close in %s s", _CLOSE_S)
    for child in multiprocessing.active_children():
        child.kill()


def _lost(error: BaseException) -> BaseException:
    """In words, where Dask has given up a block that lost worker after worker."""
    from distributed import KilledWorker

    if not isinstance(error, KilledWorker):
        return error
    # Without its cause, which is transient: another try of the whole stage would help as little.
    return RuntimeError(
        f"a block lost its worker {error.allowed_failures + 1} times: it may need more memory "
        "than one has; give fewer --workers, or run the same command again to go on"
    )


def _with_progress(results: Iterator[B], items: Items[A]) -> Iterator[B]:
    """The results, with a bar on a terminal and now and then a line elsewhere.

    Items that bear a name, `what`, are called by it.
    """
    what, n_items = getattr(items, "what", "blocks"), len(items)
    told_s, n_told, n_done = time.monotonic(), 0, 0
    on_terminal = sys.stderr.isatty()
    desc = f"{at_work()} {what}"
    with tqdm(total=n_items, desc=desc, unit="", leave=False, disable=not on_terminal) as bar:
        for n_done, result in enumerate(results, start=1):
            bar.update()
            if not on_terminal and time.monotonic() - told_s >= _TELL_EVERY_S:
                told_s, n_told = time.monotonic(), n_done
                log.info("%s: %d of %d %s", at_work(), n_done, n_items, what)
            yield result
    if 0 < n_told < n_done:
        log.info("%s: %d of %d %s", at_work(), n_done, n_items, what)
