"""Transcripts to sparse counts per cell: tallied by spans and merged by cells, both anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from pairing.merge import cell_blocks, is_merged, merge_block, read_merged
from pairing.tally import Assignment, ByInstrument, Tallying, is_tallied, read_figures, tally_span
from pairing.xenium import XeniumRun
from pairing.xenium.id_index import IdIndex
from shards.artifact import make_left, written_aside
from shards.errors import BadInput
from shards.schema import Record

COUNTS_FILES = ("counts_indptr.npy", "counts_indices.npy", "counts_data.npy")
_IDS_FILE = "cell_ids.npz"

# Runs a function that can be pickled over items with a length, anywhere, in any order.
MapTasks = Callable[[Callable[[Any], str], Any], Iterable[str]]


class CountsQc(Record):
    """What the transcripts of a run say of its quality, and how the counts were made.

    `source` is `transcripts` (the instrument's assignment), `lookup` (where they lie) or `matrix`.
    `by_category` counts transcripts at `qv >= qv_min` inside cells, by the instrument's codeword
    category. `matrix_mismatches` is the number of (cell, gene) entries in which the counts and the
    bundle's own matrix differ (null where it has none, or where the counts are the matrix, or of
    other cells).
    """

    source: str
    n_transcripts: int
    n_low_quality: int
    n_unassigned: int
    by_category: dict[str, int]
    n_entries: int
    n_counts: int
    matrix_mismatches: int | None


def write_counts(
    out: Path,
    kept: Path,
    run: XeniumRun,
    qv_min: float,
    stays: npt.NDArray[np.bool_],
    map_tasks: MapTasks,
) -> tuple[npt.NDArray[np.int64], CountsQc]:
    """Gene counts of the instrument's cells at `qv >= qv_min`: by its assignment, else its matrix.

    Writes COUNTS_FILES into `out`, CSR over the cells that `stays` marks: others are as if the
    instrument had not seen them, and what it found inside them is part of no figure. Returns the
    sum of each of those cells. Spans of the transcripts are tallied and then cells merged by
    `map_tasks`, anywhere and in any order, and published in `kept`; what lies there already is not
    made again.

    Memory is one batch of transcripts, one block of cells and some bytes a cell, never the table.
    Raises BadInput where the bundle has neither or a table without a single transcript, and where
    counts are only in the matrix (made at qv >= 20) and another `qv_min` is asked for.
    """
    if run.has_transcripts:
        ids = kept / _IDS_FILE
        with written_aside(ids) as path:
            IdIndex.of(run.read_cells()["cell_id"].tolist()).save(path)
        return count_transcripts(out, kept, run, qv_min, ByInstrument(ids), stays, map_tasks)
    matrix = run.read_matrix()
    if matrix is None:
        raise BadInput(
            run.path,
            expected="transcripts or a cell-feature matrix",
            found="neither",
            remedy="copy the run's transcripts or its cell-feature matrix into it",
        )
    if qv_min != 20:
        raise BadInput(
            run.path,
            expected="qv_min = 20, at which the instrument made its matrix",
            found=f"qv_min = {qv_min} and a bundle without transcripts",
            remedy="set qv_min = 20, or give the bundle with its transcripts",
        )
    written = _write(out, [matrix[stays]])
    return written.n_of_cell, CountsQc(
        source="matrix",
        n_transcripts=0,
        n_low_quality=0,
        n_unassigned=0,
        by_category={},
        n_entries=written.n_entries,
        n_counts=int(written.n_of_cell.sum()),
        matrix_mismatches=None,
    )


def count_transcripts(
    out: Path,
    kept: Path,
    run: XeniumRun,
    qv_min: float,
    assignment: Assignment,
    stays: npt.NDArray[np.bool_],
    map_tasks: MapTasks,
) -> tuple[npt.NDArray[np.int64], CountsQc]:
    """As `write_counts`, of transcripts that are given to cells by `assignment`."""
    by_instrument = isinstance(assignment, ByInstrument)
    tallying = Tallying(
        kept=kept,
        table=run.transcripts,
        symbols=tuple(gene.symbol for gene in run.genes()),
        n_cells=len(stays),
        assignment=assignment,
        qv_min=qv_min,
        left_out=None if stays.all() else ~stays,
    )
    spans = run.transcripts.spans()
    left = [span for span in spans if not is_tallied(kept, span)]
    make_left(map_tasks, partial(tally_span, tallying), left, len(spans))
    figures = [read_figures(kept, span) for span in spans]
    n_transcripts = sum(f.n_transcripts for f in figures)
    if n_transcripts == 0:
        raise BadInput(
            run.path,
            expected="at least one transcript",
            found="a table of transcripts without a row",
            remedy="copy the table again; without transcripts there is nothing to pair",
        )
    blocks = cell_blocks(tallying, spans, figures)
    unmerged = [block for block in blocks if not is_merged(kept, block)]
    make_left(map_tasks, partial(merge_block, tallying), unmerged, len(blocks))
    n_mismatches: int | None = None

    def staying() -> Iterator[sparse.csr_matrix]:
        nonlocal n_mismatches
        for block in blocks:
            counts = read_merged(kept, block, len(tallying.symbols))
            cells = slice(block.first, block.end)
            own = run.read_matrix(cells) if by_instrument and qv_min == 20 else None
            if own is not None:
                n_mismatches = (n_mismatches or 0) + (counts != own[stays[cells]]).nnz
            yield counts

    written = _write(out, staying())
    by_category: Counter[str] = Counter()
    for of_span in figures:
        by_category.update(of_span.by_category)
    return written.n_of_cell, CountsQc(
        source="transcripts" if by_instrument else "lookup",
        n_transcripts=n_transcripts,
        n_low_quality=sum(f.n_low_quality for f in figures),
        n_unassigned=sum(f.n_unassigned for f in figures),
        by_category={k: v for k, v in sorted(by_category.items()) if v},
        n_entries=written.n_entries,
        n_counts=int(written.n_of_cell.sum()),
        matrix_mismatches=n_mismatches,
    )


@dataclass(frozen=True, slots=True)
class _Written:
    n_of_cell: npt.NDArray[np.int64]
    n_entries: int


def _write(out: Path, windows: Iterable[sparse.csr_matrix]) -> _Written:
    """Write the rows of all windows, one after the other, as COUNTS_FILES."""
    n_entries_of_cell, n_of_cell = [np.zeros(1, np.int64)], [np.zeros(0, np.int64)]
    with ExitStack() as stack:
        indices = stack.enter_context(_GrowingArray(out / COUNTS_FILES[1], np.int32))
        data = stack.enter_context(_GrowingArray(out / COUNTS_FILES[2], np.uint32))
        for window in windows:
            n_entries_of_cell.append(np.diff(window.indptr).astype(np.int64))
            n_of_cell.append(np.asarray(window.sum(axis=1), dtype=np.int64).ravel())
            indices.append(window.indices)
            data.append(window.data)
    indptr = np.cumsum(np.concatenate(n_entries_of_cell))
    save_array(out / COUNTS_FILES[0], indptr)
    return _Written(np.concatenate(n_of_cell), int(indptr[-1]))


class _GrowingArray:
    """A .npy file of one axis whose length is known at the end."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._file = path.open("wb")
        self._dtype = np.dtype(dtype)
        self._n = 0
        self._write_header()

    def __enter__(self) -> _GrowingArray:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:  # closed on a full disk too, which is told when what is left is written
            # numpy leaves room in a header for an axis that grows, so that its size stays.
            self._file.seek(0)
            self._write_header()

    def _write_header(self) -> None:
        header = np.lib.format.header_data_from_array_1_0(np.zeros(0, self._dtype))
        header["shape"] = (self._n,)
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: npt.NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._n += len(values)


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """As `numpy.save`, which writes past Python's file and tells a full disk without its number."""
    array = np.ascontiguousarray(array)
    with path.open("wb") as f:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(f, header)
        f.write(array.data)
