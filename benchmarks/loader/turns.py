"""Contenders measured in turns, each in a process of its own that waits for its turn.

python -m benchmarks.loader.turns NAME DATASET reads numbers of samples, one a line, and prints for
each what so many took. Machines are shared: what is compared is measured a fraction of a second
apart, in the processor time of a process and all that it started.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

import psutil

from benchmarks.loader.contenders import CONTENDERS, LIMIT

_QUIET_S: Final = 0.15


class Turn(NamedTuple):
    """Seconds for `n` samples; read-ahead for those that were taken is part of it."""

    n: int
    wall_s: float
    cpu_s: float


class Contender:
    """One of `CONTENDERS` under `python`; None in place of a turn where its library is missing."""

    def __init__(self, name: str, dataset: Path, python: str) -> None:
        self._process = subprocess.Popen(
            [python, "-m", __name__, name, str(dataset)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._process:
            self._process.kill()

    def turn(self, n: int) -> Turn | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{n}\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        return told and Turn(*told)


def in_pairs(dataset: Path, python: str, n: int, rounds: int) -> dict[str, list[tuple[Turn, Turn]]]:
    """`rounds` pairs of turns of `n` samples for each contender whose library is there.

    A pair is the limit's turn and, right after it, the contender's: what else the machine does
    hardly changes in between.
    """
    with ExitStack() as stack:
        contenders = {}
        for name in CONTENDERS:
            contender = stack.enter_context(Contender(name, dataset, python))
            if contender.turn(4 * n) is not None:  # once before: starting is no part of a long run
                contenders[name] = contender
        limit = contenders.pop(LIMIT)
        pairs: dict[str, list[tuple[Turn, Turn]]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, contender in contenders.items():
                pair = limit.turn(n), contender.turn(n)
                assert pair[0] is not None
                assert pair[1] is not None
                pairs[name].append(pair)
    return pairs


def _cpu_s(pids: list[int]) -> float:
    """Processor time of processes, their ended threads included."""
    # The clock of another process, to the nanosecond: MAKE_PROCESS_CPUCLOCK of Linux.
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def _settled(pids: list[int]) -> tuple[float, float]:
    """When the last of the work was done, and the processor time then."""
    done_s, cpu_s = time.monotonic(), _cpu_s(pids)
    while True:
        time.sleep(_QUIET_S)
        now_s = _cpu_s(pids)
        if now_s - cpu_s < _QUIET_S / 100:
            return done_s, cpu_s
        done_s, cpu_s = time.monotonic(), now_s


def _children() -> list[int]:
    return [child.pid for child in psutil.Process().children(recursive=True)]


def main() -> None:
    # What libraries print is no answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    batches = CONTENDERS[sys.argv[1]](Path(sys.argv[2]))
    pids, cpu_s = [os.getpid()], 0.0
    for line in sys.stdin:
        started_s, n = time.monotonic(), 0
        try:
            while n < int(line):
                n += next(batches)
        except ModuleNotFoundError as error:
            print(error, file=sys.stderr)
            print("null", file=answers)
            continue
        # What was read ahead late, between two turns, counts for the second.
        done_s, cpu_done_s = _settled(pids)
        print(json.dumps([n, done_s - started_s, cpu_done_s - cpu_s]), file=answers)
        # Looked up once, since that takes time: the first turn starts all and is not counted.
        pids = pids if cpu_s else [os.getpid(), *_children()]
        cpu_s = _cpu_s(pids)


if __name__ == "__main__":
    main()
