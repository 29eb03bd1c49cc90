"""A process that reads and decodes samples into the ring: python -m trainer.worker SOCKET MEMORY.

Started by `trainer.crew`, which talks to it over the socket and hands it the memory. It ends when
the socket does, so when whoever started it ends, in whatever way.
"""

from __future__ import annotations

import json
import signal
import struct
import sys
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final

from shards.errors import BadInput
from shards.reader import Reader
from shards.stream import CACHE_BYTES, PIECE_SAMPLES, Reading, Stream
from trainer.ring import Filler, Layout, Ring, faults_to_json

SLOT: Final = struct.Struct("<I")
FILLED: Final = b"filled"  # then the slot, and the faults as JSON
FAILED: Final = b"failed"  # then the slot, and a BadInput as JSON that stops the run


@dataclass(frozen=True, slots=True)
class Job:
    """The first message to a worker, and the only one that is pickled."""

    stream: Stream
    layout: Layout
    n_slots: int
    reading: Reading = "global"
    piece_samples: int = PIECE_SAMPLES
    cache_bytes: int = CACHE_BYTES

    def reader(self) -> Reader:
        return self.stream.reader(
            self.reading, piece_samples=self.piece_samples, cache_bytes=self.cache_bytes
        )


def serve(connection: Connection, memory: int) -> None:
    """Fill the slots that are asked for, in turn, until the other side hangs up."""
    job: Job = connection.recv()
    ring = Ring(job.layout, job.n_slots, memory)
    asked = deque([SLOT.unpack(connection.recv_bytes())[0]])
    try:
        with job.reader() as reader:
            filler = Filler(job.stream, reader, job.layout)
            filler.expect(ring.slots[asked[0]])
            while True:
                faults = filler.fill(ring.slots[asked[0]])
                told = json.dumps(faults_to_json(faults)).encode()
                connection.send_bytes(FILLED + SLOT.pack(asked.popleft()) + told)
                while not asked or connection.poll():
                    asked.append(SLOT.unpack(connection.recv_bytes())[0])
                    filler.expect(ring.slots[asked[-1]])
    except BadInput as error:
        told = json.dumps(faults_to_json([(0, error)])).encode()
        connection.send_bytes(FAILED + SLOT.pack(asked[0]) + told)


def main() -> int:
    # The run's own process decides when to stop; it still wants its last chunks then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # The run has ended, or wants no more.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
