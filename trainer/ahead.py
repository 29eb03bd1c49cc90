"""Chunks in the order in which they are wanted, read ahead as far as the ring has room."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shards.order import Indices
from trainer.batch import Batch, batch_of
from trainer.crew import Hands
from trainer.ring import Ring

Wanted = tuple[Indices, int]  # the samples of a chunk, and the lane that reads it


class ReadAhead:
    """Batches on the slots of a ring: `take` the next, `give_back` all that were taken."""

    def __init__(self, ring: Ring, hands: Hands, wanted: Iterator[Wanted]) -> None:
        self._ring, self._hands, self._wanted = ring, hands, wanted
        self._free = deque(range(len(ring.slots)))
        self._asked: deque[int] = deque()
        self._taken: list[tuple[int, Batch]] = []
        self._copying: deque[tuple[int, Batch]] = deque()
        self._ask()

    def take(self) -> Batch:
        """The next chunk, once it is read."""
        if not self._asked:
            self._reclaim(wait=True)
        slot = self._asked.popleft()
        batch = batch_of(self._ring.slots[slot], self._hands.finish(slot))
        self._taken.append((slot, batch))
        return batch

    def give_back(self) -> None:
        """What was taken so far is done with: its memory is written again, after its copies."""
        self._copying += self._taken
        self._taken.clear()
        self._reclaim(wait=False)

    def _reclaim(self, *, wait: bool) -> None:
        while self._copying:
            slot, batch = self._copying[0]
            if wait and not self._free:
                for event in batch.copied:
                    event.synchronize()
            if not all(event.query() for event in batch.copied):  # type: ignore[no-untyped-call]  # torch's
                break
            self._copying.popleft()
            self._free.append(slot)
        self._ask()

    def _ask(self) -> None:
        while self._free:
            wanted = next(self._wanted, None)
            if wanted is None:
                return
            slot = self._free.popleft()
            self._ring.slots[slot].ask(wanted[0])
            self._hands.begin(slot, wanted[1])
            self._asked.append(slot)


@contextmanager
def pinned(ring: Ring) -> Iterator[None]:
    """Makes the ring known to CUDA, where this process uses it: copies then need no detour.

    Its images alone, for what CUDA knows takes memory whether it is written or not.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's
        yield
        return
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's
    start = ring.slots[0].header.ctypes.data
    torch.cuda.check_error(int(cudart.cudaHostRegister(start, ring.full_bytes, 0)))
    try:
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.check_error(int(cudart.cudaHostUnregister(start)))
