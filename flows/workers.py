"""The workers of a cluster: local ones, started here, and how many there are at any time."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING

import dask

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

log = logging.getLogger("cellpair")

# What a worker is to have: blocks of every stage are cut so that one at work, and the libraries
# that it needs, take less (docs/scale.md has the measured peaks).
WORKER_BYTES = 2 << 30

_START_S, _CLOSE_S = 120, 10
_ASK_EVERY_S = 1.0

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


# Blocks under way for each thread of a worker: one at work, one waiting, so that nobody idles and
# the scheduler never holds a whole slide.
_IN_FLIGHT_PER_THREAD = 2
# On a cluster that grows with what waits: where only two blocks a worker were to be seen, it would
# never ask for more workers than it has, and with none, for none.
_IN_FLIGHT_AT_LEAST = 64


class Crew:
    """How many blocks may be under way on the workers that are there; any thread may ask.

    Workers are counted at most once a second, since whoever maps asks at every block.
    """

    def __init__(self, client: Client, n_expected: int | None) -> None:
        """`n_expected` local workers, or None where a cluster of others comes and goes."""
        self._client = client
        self._at_least = (
            _IN_FLIGHT_AT_LEAST if n_expected is None else _IN_FLIGHT_PER_THREAD * n_expected
        )
        self._lock = threading.Lock()
        self._asked_s = -_ASK_EVERY_S
        self._n_threads = 0
        self._told_none = False

    def limit(self) -> int:
        return max(self._at_least, _IN_FLIGHT_PER_THREAD * self._counted())

    def tell_if_none(self) -> None:
        """One line where no worker is there, and one when some are again."""
        n_threads = self._counted()
        with self._lock:
            if not n_threads and not self._told_none:
                log.warning("no worker is there: waiting until one is")
            elif n_threads and self._told_none:
                log.info("workers are there: %d threads", n_threads)
            self._told_none = not n_threads

    def _counted(self) -> int:
        with self._lock:
            now_s = time.monotonic()
            if now_s - self._asked_s >= _ASK_EVERY_S:
                self._asked_s = now_s
                # Their threads alone: all that a scheduler knows of workers takes it long to say.
                self._n_threads = sum(self._client.nthreads().values())
            return self._n_threads


def start_local(stack: ExitStack, n_workers: int, device: str) -> tuple[Client, int, list[str]]:
    """A client of `n_workers` processes of one thread, their number, and the GPUs they offer.

    There are fewer of them, told, where the machine's (or the container's) memory does not hold
    WORKER_BYTES for each. Unless `device` is cpu, one worker a GPU offers it as the resource GPU,
    and the others see none.
    """
    # Ctrl-C is for this process, which tells its workers: they and Dask's threads inherit what is
    # blocked while they are started. Before it, Python's tracker of resources, whose start would
    # unblock it.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return _started(stack, n_workers, device)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _started(stack: ExitStack, n_workers: int, device: str) -> tuple[Client, int, list[str]]:
    from distributed import Client, LocalCluster
    from distributed.system import MEMORY_LIMIT

    n = _that_fit(n_workers, MEMORY_LIMIT)
    with _as_workers_start():
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
        stack.callback(_close, cluster)
        gpus = _gpus()[:n] if device != "cpu" else []
        if gpus:
            _give_gpus(cluster, gpus)
        cluster.scale(n)
        # Not entered: the thread that maps first need not be the one that ends.
        client = Client(cluster.scheduler_address, set_as_default=False)
        stack.callback(client.close)
        client.wait_for_workers(1, timeout=_START_S)
    return client, n, gpus


def _that_fit(n_workers: int, memory_bytes: int) -> int:
    n = max(1, min(n_workers, memory_bytes // WORKER_BYTES))
    if n < n_workers:
        log.warning(
            "%d workers, not %d: each is to have %.0f GiB of %.0f",
            n, n_workers, WORKER_BYTES / 2**30, memory_bytes / 2**30,
        )  # fmt: skip
    return n


def tell_small(client: Client) -> None:
    """Warn where workers that others started have less memory than a block may need."""
    there = client.scheduler_info(n_workers=-1)["workers"].values()
    limits = [w["memory_limit"] for w in there if w["memory_limit"]]
    small = [n for n in limits if n < WORKER_BYTES]
    if small:
        log.warning(
            "%d workers have less than %.0f GiB, the smallest %.1f: a block may kill them",
            len(small), WORKER_BYTES / 2**30, min(small) / 2**30,
        )  # fmt: skip


@contextmanager
def _as_workers_start() -> Iterator[None]:
    # What a block raises is told here, with its run and stage; a worker's own lines double it.
    name = "distributed.nanny.pre-spawn-environ"
    environ = {
        **dask.config.get(name), **_KEEP_FREED, "DASK_LOGGING__DISTRIBUTED": "critical",
    }  # fmt: skip
    with dask.config.set({**_SELDOM_LOOKED, name: environ}):
        yield


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
