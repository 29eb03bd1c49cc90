"""Tallies of all spans to the counts of some cells, published as a file of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from scipy import sparse

from pairing.tally import WINDOW_CELLS, SpanFigures, Tallying, tally_file
from pairing.xenium.transcripts import Span
from shards.artifact import written_aside

# Entries that are merged at a time: a tenth of a second, and 200 MB while it goes on.
_ENTRIES = 4_000_000


@dataclass(frozen=True, slots=True)
class CellBlock:
    """Cells `first` to `end`, whose counts lie in these record batches of the spans' tallies."""

    first: int
    end: int
    parts: tuple[tuple[Span, tuple[int, ...]], ...]

    @property
    def name(self) -> str:
        return f"cells-{self.first:09d}"


def cell_blocks(
    tallying: Tallying, spans: Sequence[Span], figures: Sequence[SpanFigures]
) -> list[CellBlock]:
    """All cells, as many whole windows at a time as have some _ENTRIES, or one."""
    n_windows = -(-tallying.n_cells // WINDOW_CELLS)
    n_entries = np.zeros(n_windows, np.int64)
    for of_span in figures:
        np.add.at(n_entries, list(of_span.windows), of_span.n_entries)
    number, total = np.zeros(n_windows, np.int64), 0
    for window in range(1, n_windows):
        total += int(n_entries[window - 1])
        is_full = total + int(n_entries[window]) > _ENTRIES
        number[window] = number[window - 1] + is_full
        total = 0 if is_full else total
    begins = np.flatnonzero(np.diff(number, prepend=-1)).tolist()
    parts: list[list[tuple[Span, tuple[int, ...]]]] = [[] for _ in begins]
    for span, of_span in zip(spans, figures, strict=True):
        places: dict[int, list[int]] = {}
        for place, window in enumerate(of_span.windows):
            places.setdefault(int(number[window]), []).append(place)
        for of_block, batches in places.items():
            parts[of_block].append((span, tuple(batches)))
    ends = [*begins, n_windows][1:]
    return [
        CellBlock(first * WINDOW_CELLS, min(end * WINDOW_CELLS, tallying.n_cells), tuple(of_block))
        for first, end, of_block in zip(begins, ends, parts, strict=True)
    ]


def merge_block(tallying: Tallying, block: CellBlock) -> str:
    """Publish the counts of those cells of a block that are not left out; returns its name."""
    columns: list[list[pa.Array]] = [[], [], []]
    for span, batches in block.parts:
        # Not mapped into memory, where it would count as this process's.
        with (
            pa.OSFile(str(tally_file(tallying.kept, span))) as source,
            pa.ipc.open_file(source) as reader,
        ):
            for place in batches:
                for column, values in zip(columns, reader.get_batch(place).columns, strict=True):
                    column.append(values.to_numpy())
    shape = (block.end - block.first, len(tallying.symbols))
    counts = sparse.csr_matrix(shape, dtype=np.uint32)
    if columns[0]:
        cell, gene, count = map(np.concatenate, columns)
        counts = sparse.coo_matrix((count, (cell - block.first, gene)), shape).tocsr()
    if tallying.left_out is not None:
        counts = counts[~tallying.left_out[block.first : block.end]]
    with written_aside(_file(tallying.kept, block)) as path, path.open("wb") as file:
        # A file of its own: numpy would give the path a suffix.
        np.savez(file, indptr=counts.indptr, indices=counts.indices, data=counts.data)
    return block.name


def is_merged(kept: Path, block: CellBlock) -> bool:
    return _file(kept, block).exists()


def read_merged(kept: Path, block: CellBlock, n_genes: int) -> sparse.csr_matrix:
    """(cells that are not left out, genes) uint32 counts with sorted indices."""
    with np.load(_file(kept, block), allow_pickle=False) as file:
        parts = file["data"], file["indices"], file["indptr"]
    return sparse.csr_matrix(parts, (len(parts[2]) - 1, n_genes))


def _file(kept: Path, block: CellBlock) -> Path:
    return kept / f"{block.name}.npz"
