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

# Windows that are merged at a time: of 1,000 genes a cell, some 400 MB while it goes on.
_WINDOWS = 4


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
    """All cells, some windows at a time."""
    n_blocks = -(-tallying.n_cells // (_WINDOWS * WINDOW_CELLS))
    parts: list[list[tuple[Span, tuple[int, ...]]]] = [[] for _ in range(n_blocks)]
    for span, of_span in zip(spans, figures, strict=True):
        places: dict[int, list[int]] = {}
        for place, window in enumerate(of_span.windows):
            places.setdefault(window // _WINDOWS, []).append(place)
        for number, batches in places.items():
            parts[number].append((span, tuple(batches)))
    blocks = []
    for number, of_block in enumerate(parts):
        first = number * _WINDOWS * WINDOW_CELLS
        end = min(first + _WINDOWS * WINDOW_CELLS, tallying.n_cells)
        blocks.append(CellBlock(first, end, tuple(of_block)))
    return blocks


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
