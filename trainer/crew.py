"""The processes that fill the ring, seen from the run: asked, heard, replaced."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Final, Protocol

from shards.errors import BadInput
from trainer.ring import Filler, Ring, RowFault, faults_from_json
from trainer.worker import FAILED, FILLED, SLOT, Job

log = logging.getLogger("cellpair")

_MAX_LOST: Final = 4  # times that a worker may end while it reads one chunk
_ROOT: Final = Path(__file__).resolve().parents[1]


class Hands(Protocol):
    """Who fills slots: `begin` says which, `finish` waits for one and tells its faults."""

    def begin(self, slot: int, lane: int) -> None: ...

    def finish(self, slot: int) -> list[RowFault]: ...


class OwnHands:
    """This process, when it wants a slot."""

    def __init__(self, ring: Ring, filler: Filler) -> None:
        self._ring, self._filler = ring, filler

    def begin(self, slot: int, lane: int) -> None:
        self._filler.expect(self._ring.slots[slot])

    def finish(self, slot: int) -> list[RowFault]:
        return self._filler.fill(self._ring.slots[slot])


@dataclass(slots=True)
class _Worker:
    """A process, its side of the line, and the slots that it was asked for, in that order."""

    process: subprocess.Popen[bytes]
    line: Connection
    asked: deque[int] = field(default_factory=deque)

    # A process that has ended cannot be told anything: it is noticed where it is next heard.

    def hand_over(self, job: Job) -> None:
        with suppress(OSError):
            self.line.send(job)

    def ask(self, slot: int) -> None:
        self.asked.append(slot)
        with suppress(OSError):
            self.line.send_bytes(SLOT.pack(slot))


class Crew:
    """Worker processes that fill slots of `ring`, until `close`.

    A worker that dies is replaced and asked again for what it had left. `finish` raises BadInput
    where a worker could not read the dataset, and RuntimeError where one chunk ends worker after
    worker.
    """

    def __init__(self, ring: Ring, job: Job, n_workers: int) -> None:
        self._ring, self._job = ring, job
        self._done: dict[int, list[RowFault] | BadInput] = {}
        self._lost: Counter[int] = Counter()
        self._workers: list[_Worker] = []
        try:
            for _ in range(n_workers):
                self._workers.append(self._started())
            for worker in self._workers:
                worker.hand_over(job)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers at once: they hold nothing that is not read again."""
        for worker in self._workers:
            worker.line.close()
            worker.process.kill()
            worker.process.wait()

    def begin(self, slot: int, lane: int) -> None:
        """Ask for `slot`. Slots of a lane go to one worker as long as there are enough lanes."""
        self._workers[lane % len(self._workers)].ask(slot)

    def finish(self, slot: int) -> list[RowFault]:
        while slot not in self._done:
            lines = {w.line: i for i, w in enumerate(self._workers) if w.asked}
            for line in wait(list(lines)):
                self._hear(lines[line])  # type: ignore[index]  # lines are what was waited for
        outcome = self._done.pop(slot)
        if isinstance(outcome, BadInput):
            raise outcome
        return outcome

    def _hear(self, i: int) -> None:
        worker = self._workers[i]
        try:
            message = worker.line.recv_bytes()
        except (EOFError, OSError):
            self._workers[i] = self._replaced(worker)
            return
        kind, rest = message[: len(FILLED)], message[len(FILLED) :]
        slot = SLOT.unpack_from(rest)[0]
        faults = faults_from_json(json.loads(rest[SLOT.size :]))
        worker.asked.popleft()
        del self._lost[slot]
        self._done[slot] = faults[0][1] if kind == FAILED else faults

    def _started(self) -> _Worker:
        here, there = Pipe()
        with there:
            fds = there.fileno(), self._ring.file
            # -P, and our own folder first: what lies in the working folder is none of ours.
            command = [sys.executable, "-P", "-m", "trainer.worker", *map(str, fds)]
            path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            process = subprocess.Popen(
                command,
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                # glibc else gives memory back between samples, and takes it again page by page.
                env={**os.environ, "PYTHONPATH": path, "MALLOC_TRIM_THRESHOLD_": str(64 << 20)},
            )
        return _Worker(process, here)

    def _replaced(self, worker: _Worker) -> _Worker:
        worker.line.close()
        worker.process.kill()
        code = worker.process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        suspect = worker.asked[0]
        self._lost[suspect] += 1
        if self._lost[suspect] == _MAX_LOST:
            raise RuntimeError(
                f"workers that read a batch ended {_MAX_LOST} times on the same chunk, the last "
                f"by {how}; if they are out of memory, give more of it or lower "
                "data_loading.workers"
            )
        log.warning(
            "worker %d, which reads batches, ended by %s: started again, %d chunks are read again",
            worker.process.pid,
            how,
            len(worker.asked),
        )
        started = self._started()
        started.hand_over(self._job)
        for slot in worker.asked:
            started.ask(slot)
        return started
