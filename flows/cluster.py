"""The block map on Dask: a local cluster or any scheduler by address, started when first needed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from shards.schema import Record

if TYPE_CHECKING:
    from distributed import Client

A = TypeVar("A")
B = TypeVar("B")

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
    for one. With one worker and no scheduler blocks run in this process.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._stack = ExitStack()
        self._client: Client | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __call__(self, fn: Callable[[A], B], items: Iterable[A]) -> Iterable[B]:
        return self._map(fn, items, gpu=False)

    def on_gpu(self, fn: Callable[[A], B], items: Iterable[A]) -> Iterable[B]:
        """As a call, but only on workers that offer the resource GPU, where any does."""
        return self._map(fn, items, gpu=True)

    def _map(self, fn: Callable[[A], B], items: Iterable[A], *, gpu: bool) -> Iterator[B]:
        if self._runtime.scheduler is None and self._runtime.workers == 1:
            yield from map(fn, items)
            return
        from distributed import as_completed

        client = self._started()
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        offered = any("GPU" in w.get("resources", {}) for w in workers)
        resources = {"GPU": 1} if gpu and offered else None
        waiting = iter(items)
        limit = _IN_FLIGHT_PER_WORKER * max(1, len(workers))
        pending = as_completed(with_results=True)

        def submit() -> bool:
            for item in waiting:
                pending.add(client.submit(fn, item, pure=False, resources=resources))
                return True
            return False

        while limit > 0 and submit():
            limit -= 1
        for _, result in pending:
            submit()
            yield result

    def _started(self) -> Client:
        if self._client is None:
            # Half a second of import that `--help` and runs without block work do not need.
            from distributed import Client, LocalCluster

            # Its import sets this to INFO: ports and handshakes, between the lines that matter.
            logging.getLogger("distributed").setLevel(logging.WARNING)
            if self._runtime.scheduler is not None:
                self._client = self._stack.enter_context(Client(self._runtime.scheduler))
            else:
                cluster = self._stack.enter_context(
                    LocalCluster(
                        n_workers=self._runtime.workers,
                        threads_per_worker=1,
                        processes=True,
                        host="127.0.0.1",
                        # Any free port: two runs on one machine must not fight for 8787.
                        dashboard_address="127.0.0.1:0",
                    )
                )
                self._client = self._stack.enter_context(Client(cluster))
        return self._client
