"""The block map on Dask: a local cluster or any scheduler by address, started when first needed."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from tqdm import tqdm

from flows.log import at_work
from flows.transient import pause_or_raise, persistently
from flows.workers import Crew, start_local, tell_small
from shards.artifact import Items
from shards.schema import Record

if TYPE_CHECKING:
    from distributed import Client, Future

log = logging.getLogger("cellpair")

A = TypeVar("A")
B = TypeVar("B")

_TELL_EVERY_S = 10.0
# How long a map sleeps for a block before it looks whether workers came, went or are none.
_LOOK_EVERY_S = 2.0


class Runtime(Record):
    """Where and how fast, never what: no part of any fingerprint."""

    workers: int = os.cpu_count() or 1
    scheduler: str | None = None
    device: str = "auto"
    runs_at_once: int = 1


class BlockMap:
    """`blocks(fn, items)` runs pure block functions on Dask workers, one thread each.

    The cluster starts at the first call, so that a run whose artifacts are all there never waits
    for one. With one worker and no scheduler blocks run in this process. Of local workers one a
    GPU offers it as the resource GPU, and the others see none. They share the machine's (or the
    container's) memory evenly; one that needs more is killed and its block redone. What they put
    aside lies where `tempfile` puts its own.

    Two blocks a thread of those workers that are there are under way at a time, at least 64 on a
    scheduler by address, so that a cluster that grows by demand sees some. Workers may come and go
    meanwhile, and where none is left blocks wait for one. Maps may be used by several threads.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._stack = ExitStack()
        self._starting = threading.Lock()
        self._client: Client | None = None
        self._crew: Crew | None = None
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
        client, crew = self._started()
        resources = {"GPU": 1} if gpu and self._offers_gpus(client) else None
        waiting = iter(items)
        done: SimpleQueue[Future[B]] = SimpleQueue()
        tries: dict[Future[B], tuple[A, int]] = {}

        def submit(item: A, n_tries: int) -> None:
            future = client.submit(fn, item, pure=False, resources=resources)
            tries[future] = (item, n_tries)
            future.add_done_callback(done.put)

        are_left = True
        results: list[B] = []
        while are_left or tries:
            while are_left and len(tries) < crew.limit():
                try:
                    submit(next(waiting), 0)
                except StopIteration:
                    are_left = False
            yield from results
            results = []
            ended = _ended(done, _LOOK_EVERY_S) if tries else []
            if tries and not ended:
                crew.tell_if_none()
            made = []
            for future in ended:
                item, n_tries = tries.pop(future)
                error = future.exception()
                if error is None:
                    made.append(future)
                else:
                    pause_or_raise(_lost(error), n_tries)
                    submit(item, n_tries + 1)
            # All that are there with one question: of two hundred workers many end at a time.
            results = client.gather(made) if made else []
        yield from results

    def _offers_gpus(self, client: Client) -> bool:
        # Local workers may still be starting, the one with the GPU too; others come and go.
        there = client.scheduler_info(n_workers=-1)["workers"].values()
        return bool(self._gpus) or any("GPU" in w.get("resources", {}) for w in there)

    def _started(self) -> tuple[Client, Crew]:
        with self._starting:
            if self._client is None or self._crew is None:
                # Half a second of import that `--help` and runs without block work do not need.
                from distributed import Client

                # Its import sets this to INFO: ports and handshakes, between the lines that matter.
                logging.getLogger("distributed").setLevel(logging.WARNING)
                n_local = None
                if self._runtime.scheduler is not None:
                    # Not entered: the thread that maps first need not be the one that ends.
                    self._client = Client(self._runtime.scheduler, set_as_default=False)
                    self._stack.callback(self._client.close)
                    tell_small(self._client)
                else:
                    self._client, n_local, self._gpus = start_local(
                        self._stack, self._runtime.workers, self._runtime.device
                    )
                self._crew = Crew(self._client, n_local)
            return self._client, self._crew


def _ended(done: SimpleQueue[Future[B]], timeout_s: float) -> list[Future[B]]:
    """All futures that are there, at least one; none where none comes in time."""
    ended = []
    with suppress(Empty):
        ended.append(done.get(timeout=timeout_s))
        while True:
            ended.append(done.get_nowait())
    return ended


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
