"""Transcripts of one span to gene counts of its cells, published as a file of their own.

The sum over spans (`pairing.merge`) does not depend on how the table is cut into them, nor on who
tallied which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import sparse

from pairing.xenium.features import CATEGORY_NAMES, GENE
from pairing.xenium.id_index import IdIndex
from pairing.xenium.transcripts import FEATURE_COLUMNS, Rows, Span, TranscriptTable
from shards.artifact import write_atomically, written_aside
from shards.dataset import read_record
from shards.schema import Record

# Cells that a record batch of a tally is of.
WINDOW_CELLS = 4096

_SCHEMA = pa.schema(
    [
        pa.field("cell", pa.int32(), nullable=False),  # ascending
        pa.field("gene", pa.int32(), nullable=False),  # ascending in a cell
        pa.field("count", pa.uint32(), nullable=False),
    ]
)

# The row of the cell of each transcript, -1 for none.
OfCells = Callable[[Rows], npt.NDArray[np.int32]]


class Assignment(Protocol):
    """How transcripts are given to cells; it can be pickled."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the table that it looks at."""

    def open(self) -> OfCells: ...


@dataclass(frozen=True, slots=True)
class ByInstrument:
    """The cell that the instrument itself gave a transcript to; `ids` is a file of an IdIndex."""

    ids: Path

    @property
    def columns(self) -> tuple[str, ...]:
        return ("cell_id",)

    def open(self) -> OfCells:
        index = IdIndex.load(self.ids)
        return lambda rows: rows.cell_index(index)


@dataclass(frozen=True, slots=True)
class Tallying:
    """What every task on a table needs to know.

    `symbols` are the genes, in the order of the counts. Cells that `left_out` marks are as if the
    instrument had not seen them, nor what it found inside them; None leaves out none.
    """

    kept: Path
    table: TranscriptTable
    symbols: tuple[str, ...]
    n_cells: int
    assignment: Assignment
    qv_min: float
    left_out: npt.NDArray[np.bool_] | None


class SpanFigures(Record):
    """Of the transcripts of a span, by category those at `qv >= qv_min` inside cells.

    `windows` are those of WINDOW_CELLS cells of which there are counts, a record batch each of
    `n_entries` rows; one may come again, with counts to be added.
    """

    schema_version: Literal[1] = 1
    n_transcripts: int
    n_low_quality: int
    n_unassigned: int
    by_category: dict[str, int]
    windows: tuple[int, ...]
    n_entries: tuple[int, ...]


def tally_span(tallying: Tallying, span: Span) -> str:
    """Publish the gene counts of the span's cells as `<name>.arrow`, and after it `<name>.json`.

    In the folder `kept`; where the second is, the tally is whole. Returns the name. Memory is one
    batch of transcripts, of which there is a record batch for each window of cells.
    """
    with (
        written_aside(tally_file(tallying.kept, span)) as path,
        pa.ipc.new_file(str(path), _SCHEMA) as file,
    ):
        figures = _tally(tallying, span, file)
    write_atomically(_facts(tallying.kept, span), figures.model_dump_json().encode())
    return span.name


def _tally(tallying: Tallying, span: Span, file: pa.ipc.RecordBatchFileWriter) -> SpanFigures:
    symbols = pa.array(tallying.symbols, pa.string())
    shape = (tallying.n_cells, len(tallying.symbols))
    of_cells = tallying.assignment.open()
    windows: list[int] = []
    n_entries: list[int] = []
    n_transcripts = n_low_quality = n_unassigned = 0
    tally = np.zeros(len(CATEGORY_NAMES), np.int64)
    wanted = (*tallying.assignment.columns, *FEATURE_COLUMNS, "qv")
    for rows in tallying.table.read(span, wanted):
        cell = of_cells(rows)
        gene, category = rows.genes(symbols)
        good = rows.numbers("qv") >= tallying.qv_min
        n_seen = len(rows)
        if tallying.left_out is not None:
            seen = ~np.append(tallying.left_out, False)[cell]  # the last is that of cell -1
            good &= seen
            n_seen = int(np.count_nonzero(seen))
        called = np.flatnonzero(good & (cell >= 0))
        n_good = int(np.count_nonzero(good))
        n_transcripts += n_seen
        n_low_quality += n_seen - n_good
        n_unassigned += n_good - len(called)
        is_gene = gene[called] >= 0
        tally += np.bincount(category[called[~is_gene]], minlength=len(tally))
        called = called[is_gene]
        tally[GENE] += len(called)
        ones = np.ones(len(called), np.int32)
        counts = sparse.csr_matrix((ones, (cell[called], gene[called])), shape=shape)
        for window, batch in _windows(counts):
            windows.append(window)
            n_entries.append(batch.num_rows)
            file.write_batch(batch)
    return SpanFigures(
        n_transcripts=n_transcripts,
        n_low_quality=n_low_quality,
        n_unassigned=n_unassigned,
        by_category=dict(zip(CATEGORY_NAMES, tally.tolist(), strict=True)),
        windows=tuple(windows),
        n_entries=tuple(n_entries),
    )


def is_tallied(kept: Path, span: Span) -> bool:
    return _facts(kept, span).exists()


def tally_file(kept: Path, span: Span) -> Path:
    return kept / f"{span.name}.arrow"


def read_figures(kept: Path, span: Span) -> SpanFigures:
    return read_record(_facts(kept, span), SpanFigures)


def _facts(kept: Path, span: Span) -> Path:
    return kept / f"{span.name}.json"


def _windows(counts: sparse.csr_matrix) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The non-empty windows of the cells, each as a record batch."""
    n_of_cell = np.diff(counts.indptr)
    for first in range(0, counts.shape[0], WINDOW_CELLS):
        last = min(first + WINDOW_CELLS, counts.shape[0])
        entries = slice(counts.indptr[first], counts.indptr[last])
        if entries.start == entries.stop:
            continue
        cell = np.repeat(np.arange(first, last, dtype=np.int32), n_of_cell[first:last])
        gene = counts.indices[entries].astype(np.int32)
        count = counts.data[entries].astype(np.uint32)
        columns = [pa.array(c) for c in (cell, gene, count)]
        yield first // WINDOW_CELLS, pa.record_batch(columns, schema=_SCHEMA)
