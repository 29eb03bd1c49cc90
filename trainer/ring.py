"""Slots of shared memory without a name, and what fills one: read, decode, pack.

A slot holds a chunk of a batch. Processes that share the memory pass each other slot numbers; who
asks writes the samples' indices into the slot, who reads leaves images and counts there. Nothing
of torch is imported here: reading processes start fast and stay small.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import simplejpeg

from shards.errors import BadInput
from shards.order import Indices
from shards.reader import Reader
from shards.stream import Stream

Unsigned = npt.NDArray[np.unsignedinteger[Any]]
Parts = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]
RowFault = tuple[int, BadInput]  # row of the chunk, and what is wrong with its sample

GENES_EXPECTED: Final = "counts of genes of the panel, each once"
_ALIGNED: Final = 64  # bytes: a cache line
# Samples are read, then decoded, some at a time: what either does is still in the processor's cache
# at the next, and so is what was read.
_AT_A_TIME: Final = 32
_NOTHING: Final = {n: np.zeros((n, 0), dtype=np.uint16) for n in (2, 3)}


@dataclass(frozen=True, slots=True)
class Layout:
    """Room in a slot: rows, pixels along an edge, genes of the largest panel, neighbours."""

    rows: int
    size_px: int
    genes: int
    neighbors: int

    def full(self) -> Parts:
        """What is written whole."""
        int64, byte = np.dtype(np.int64), np.dtype(np.uint8)
        return {
            "header": (int64, (8,)),
            "index": (int64, (self.rows,)),
            "panel": (int64, (self.rows,)),
            "weight": (np.dtype(np.float32), (self.rows,)),
            "image": (byte, (self.rows, self.size_px, self.size_px, 3)),
        }

    def sparse(self) -> Parts:
        """Room for the worst case, of which little is written."""
        n_counts = self.rows * self.genes
        n_neighbors = n_counts * self.neighbors
        int32, byte = np.dtype(np.int32), np.dtype(np.uint8)
        return {
            "counts_row": (int32, (n_counts,)),
            "counts": (byte, (2 * 4 * n_counts,)),
            "neighbors_row": (int32, (n_neighbors,)),
            "neighbors": (byte, (3 * 4 * n_neighbors,)),
        }


@dataclass(frozen=True, slots=True)
class Sparse:
    """Non-zero counts: `row` of the chunk, and (2, n) or (3, m) `values` as a tar holds them."""

    row: npt.NDArray[np.int32]
    values: Unsigned


class Slot:
    """Views on the memory of one slot.

    `header` is: rows asked for; entries of the counts and bytes of a value; the same of the
    neighbours. An index of -1 is padding: weight 0 and a black image, as for a sample at fault.
    """

    def __init__(self, layout: Layout, memory: Any, full_start: int, sparse_start: int) -> None:
        views = {}
        for parts, start in ((layout.full(), full_start), (layout.sparse(), sparse_start)):
            for name, (dtype, shape) in parts.items():
                n = int(np.prod(shape))
                views[name] = np.frombuffer(memory, dtype, n, start).reshape(shape)
                start = _aligned(start + n * dtype.itemsize)
        self.layout = layout
        self.header, self.index = views["header"], views["index"]
        self.panel, self.weight, self.image = views["panel"], views["weight"], views["image"]
        self.pictures = list(self.image)  # made once: what is done for every sample counts
        self._counts = views["counts_row"], views["counts"]
        self._neighbors = views["neighbors_row"], views["neighbors"]

    def ask(self, indices: Indices) -> None:
        """Write down which samples the slot is to hold, at most `layout.rows`."""
        self.header[0] = len(indices)
        self.index[: len(indices)] = indices

    @property
    def n_rows(self) -> int:
        return int(self.header[0])

    @property
    def counts(self) -> Sparse:
        return _held(self._counts, 2, int(self.header[1]), int(self.header[2]))

    @property
    def neighbors(self) -> Sparse:
        return _held(self._neighbors, 3, int(self.header[3]), int(self.header[4]))

    def put(self, counts: Sparse, neighbors: Sparse) -> None:
        """Copy what was read to where `counts` and `neighbors` find it."""
        self.header[1:5] = (
            *(counts.values.shape[1], counts.values.itemsize),
            *(neighbors.values.shape[1], neighbors.values.itemsize),
        )
        for here, given in ((self.counts, counts), (self.neighbors, neighbors)):
            here.row[:] = given.row
            here.values[:] = given.values


def _held(room: tuple[Any, Any], n_lines: int, n: int, itemsize: int) -> Sparse:
    row, values = room
    dtype = np.dtype(np.uint16 if itemsize == 2 else np.uint32)
    return Sparse(row[:n], values[: n_lines * n * itemsize].view(dtype).reshape(n_lines, n))


class Ring:
    """`n_slots` slots in memory that ends with the last process that holds it, however it ends.

    `file` is the descriptor that another process was given; without it the memory is made. What is
    written whole lies first, `full_bytes` of all slots. Other pages cost nothing until they are
    written, so that slots have room for the worst case.
    """

    def __init__(self, layout: Layout, n_slots: int, file: int | None = None) -> None:
        full, sparse = _bytes_of(layout.full()), _bytes_of(layout.sparse())
        self.layout = layout
        self.full_bytes = n_slots * full
        n_bytes = n_slots * (full + sparse)
        self.file = _anonymous_file(n_bytes) if file is None else file
        try:
            self.memory = mmap.mmap(self.file, n_bytes)
        except OSError:
            os.close(self.file)
            raise
        self.slots = [
            Slot(layout, self.memory, i * full, self.full_bytes + i * sparse)
            for i in range(n_slots)
        ]

    def close_file(self) -> None:
        """No further process can be given the memory; views on it stay valid."""
        os.close(self.file)


def _anonymous_file(n_bytes: int) -> int:
    # What nothing names nobody has to remove, not even after SIGKILL.
    if sys.platform == "linux":
        file = os.memfd_create("cellpair-ring")
    else:
        with tempfile.TemporaryFile() as unlinked:
            file = os.dup(unlinked.fileno())
    os.ftruncate(file, n_bytes)
    return file


def _bytes_of(parts: Parts) -> int:
    return sum(_aligned(int(np.prod(shape)) * dtype.itemsize) for dtype, shape in parts.values())


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNED) * _ALIGNED


class Filler:
    """Fills slots with what a reader reads."""

    def __init__(self, stream: Stream, reader: Reader, layout: Layout) -> None:
        self._stream, self._reader, self._layout = stream, reader, layout
        self._genes_P = np.array([len(panel.genes) for panel in stream.panels], dtype=np.int64)

    def expect(self, slot: Slot) -> None:
        """Tell the reader what `fill` is going to want, in the order of the calls to come."""
        index = slot.index[: slot.n_rows]
        self._reader.expect(index[index >= 0])

    def fill(self, slot: Slot) -> list[RowFault]:
        """Read what the slot asks for; samples at fault are told, their rows weigh nothing.

        Raises BadInput where the dataset as a whole cannot be read.
        """
        n = slot.n_rows
        asked = np.flatnonzero(slot.index[:n] >= 0)
        row_of = asked.tolist()
        faults: dict[int, BadInput] = {}
        counts: list[Unsigned] = [_NOTHING[2]] * n
        neighbors: list[Unsigned] = [_NOTHING[3]] * n
        panel = [0] * n
        pictures = slot.pictures
        reading = self._reader.each(slot.index[asked])
        while some := list(islice(reading, _AT_A_TIME)):
            for place, pair in some:
                row = row_of[place]
                if isinstance(pair, BadInput):
                    faults[row] = pair
                elif pair.counts is None:
                    faults[row] = self._fault(slot, row, "counts", "a sample without them")
                elif (found := _decoded(pair.jpeg, pictures[row])) is not None:
                    expected = f"a JPEG of {self._layout.size_px} px"
                    faults[row] = self._fault(slot, row, expected, found)
                else:
                    counts[row], panel[row] = pair.counts, pair.panel
                    if pair.neighbors is not None:
                        neighbors[row] = pair.neighbors
        slot.panel[:n] = panel
        packed = _packed(counts), self._nearest(neighbors)
        if strange := self._strange(slot, *packed):
            faults |= strange
            for row in strange:
                counts[row], neighbors[row] = _NOTHING[2], _NOTHING[3]
            packed = _packed(counts), self._nearest(neighbors)
        slot.put(*packed)
        slot.weight[:n] = slot.index[:n] >= 0
        for row in faults:
            slot.panel[row] = slot.weight[row] = 0
        for row in np.flatnonzero(slot.weight[:n] == 0).tolist():
            pictures[row][:] = 0
        return sorted(faults.items())

    def _nearest(self, parts: list[Unsigned]) -> Sparse:
        if self._layout.neighbors == 0:
            return _packed([_NOTHING[3]])
        read = _packed(parts)
        near = read.values[0] < self._layout.neighbors
        return Sparse(read.row[near], read.values[:, near])

    def _strange(self, slot: Slot, counts: Sparse, neighbors: Sparse) -> dict[int, BadInput]:
        # A gene beyond the panel would stop a GPU without a word, and too many entries would run
        # into the next slot: no writer of ours makes them.
        n = slot.n_rows
        genes_B = self._genes_P[slot.panel[:n]]
        bad_B = np.zeros(n, dtype=bool)
        for sparse, gene, times in ((counts, 0, 1), (neighbors, 1, self._layout.neighbors)):
            bad_B |= np.bincount(sparse.row, minlength=n) > genes_B * times
            bad_B[sparse.row[sparse.values[gene] >= genes_B[sparse.row]]] = True
        rows = np.flatnonzero(bad_B).tolist()
        return {row: self._fault(slot, row, GENES_EXPECTED, "others") for row in rows}

    def _fault(self, slot: Slot, row: int, expected: str, found: str) -> BadInput:
        return self._stream.fault(int(slot.index[row]), expected=expected, found=found)


def _decoded(jpeg: memoryview, picture: npt.NDArray[np.uint8]) -> str | None:
    """The patch into `picture`; or what is there in place of one."""
    try:
        decoded = simplejpeg.decode_jpeg(jpeg, "RGB", buffer=picture)
    except ValueError as error:
        return str(error)
    if decoded.shape == picture.shape:
        return None
    return f"one of {decoded.shape[1]} × {decoded.shape[0]} px"


def _packed(parts: Sequence[Unsigned]) -> Sparse:
    sizes = [part.shape[1] for part in parts]
    return Sparse(
        np.repeat(np.arange(len(parts), dtype=np.int32), sizes), np.concatenate(parts, axis=1)
    )


def faults_to_json(faults: Iterable[RowFault]) -> list[list[Any]]:
    return [[row, e.where, e.expected, e.found, e.remedy] for row, e in faults]


def faults_from_json(faults: Iterable[list[Any]]) -> list[RowFault]:
    return [
        (row, BadInput(where, expected=expected, found=found, remedy=remedy))
        for row, where, expected, found, remedy in faults
    ]
