"""How blocks of work are mapped: one after the other, or on several threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

Job = TypeVar("Job")
Done = TypeVar("Done")


class MapBlocks(Protocol):
    """Results of `work` over `jobs`, in the order of the jobs."""

    def __call__(self, work: Callable[[Job], Done], jobs: Iterable[Job]) -> Iterable[Done]: ...


def mapper(workers: int) -> MapBlocks:
    """Threads, since the work is in libraries that let others run; nothing has to be copied."""

    def run(work: Callable[[Job], Done], jobs: Iterable[Job]) -> Iterator[Done]:
        if workers == 1:
            yield from map(work, jobs)
            return
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(work, jobs)

    return run
