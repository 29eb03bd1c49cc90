"""Transcripts to sparse counts per cell, streamed, by the instrument's own assignment."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt
from scipy import sparse

from pairing.xenium import XeniumRun
from shards.errors import BadInput
from shards.schema import Record

_Tally = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]  # keys and counts


class CountsQc(Record):
    """What the transcripts of a run say of its quality, and how the counts were made.

    `by_category` counts transcripts at `qv >= qv_min` inside cells, by the instrument's codeword
    category. `matrix_mismatches` is the number of (cell, gene) entries in which the counts and the
    bundle's own matrix differ (null where it has none, or where the counts are the matrix).
    """

    source: str  # transcripts | matrix
    n_transcripts: int
    n_low_quality: int
    n_unassigned: int
    by_category: dict[str, int]
    n_entries: int
    n_counts: int
    matrix_mismatches: int | None


@dataclass(frozen=True, slots=True)
class Counts:
    """`matrix` is (cells, genes) CSR of int64 raw counts with sorted indices and no zeros."""

    matrix: sparse.csr_matrix
    qc: CountsQc


def count_by_cell(
    run: XeniumRun, qv_min: float, only: npt.NDArray[np.bool_] | None = None
) -> Counts:
    """Gene counts of every cell at `qv >= qv_min`: from the transcripts, else from the matrix.

    `only` marks the cells to count, others are as if the instrument had not seen them: they have no
    row of the matrix, and what it found inside them is part of no figure.

    Memory is one batch of transcripts and the non-zero entries, never the table. Raises BadInput
    where the bundle has neither or a table without a single transcript, and where counts are only
    in the matrix (made at qv >= 20) and another `qv_min` is asked for.
    """
    if only is None:
        only = np.ones(run.n_cells, dtype=bool)
    if run.has_transcripts:
        return _from_transcripts(run, qv_min, only)
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
    matrix = matrix[only]
    return Counts(matrix, _qc("matrix", matrix, 0, 0, 0, {}, None))


def _from_transcripts(run: XeniumRun, qv_min: float, only: npt.NDArray[np.bool_]) -> Counts:
    n_genes = len(run.genes())
    seen_in_cell = np.append(only, True)  # the last is that of cell -1, outside of all
    # (key, count) of what was read, in parts that shrink: merging each batch into all that came
    # before it would take time with the square of the transcripts.
    parts: list[_Tally] = []
    n_transcripts = n_low = n_unassigned = 0
    by_category: dict[str, int] = {}
    for batch in run.iter_transcripts():
        seen = seen_in_cell[batch.cell_index]
        good = seen & (batch.qv >= qv_min)
        inside = good & (batch.cell_index >= 0)
        n_transcripts += int(seen.sum())
        n_low += int((seen & ~good).sum())
        n_unassigned += int((good & ~inside).sum())
        tally = np.bincount(batch.category[inside], minlength=len(batch.category_names))
        for name, n in zip(batch.category_names, tally.tolist(), strict=True):
            by_category[name] = by_category.get(name, 0) + n
        genes = inside & (batch.gene_index >= 0)
        key = batch.cell_index[genes].astype(np.int64) * n_genes + batch.gene_index[genes]
        part = np.unique(key, return_counts=True)
        while parts and len(parts[-1][0]) <= 2 * len(part[0]):
            part = _merge(parts.pop(), part)
        parts.append(part)
    if n_transcripts == 0:
        raise BadInput(
            run.path,
            expected="at least one transcript",
            found="a table of transcripts without a row",
            remedy="copy the table again; without transcripts there is nothing to pair",
        )
    keys, values = reduce(_merge, reversed(parts))
    matrix = sparse.csr_matrix(
        (values, (keys // n_genes, keys % n_genes)), shape=(run.n_cells, n_genes), dtype=np.int64
    )[only]
    own = run.read_matrix() if qv_min == 20 else None
    mismatches = None if own is None else int((matrix != own[only]).nnz)
    return Counts(
        matrix,
        _qc("transcripts", matrix, n_transcripts, n_low, n_unassigned, by_category, mismatches),
    )


def _merge(a: _Tally, b: _Tally) -> _Tally:
    """Sum of two sparse vectors, keys ascending."""
    keys, values = (np.concatenate(pair) for pair in zip(a, b, strict=True))
    order = np.argsort(keys, kind="stable")  # which makes use of what is sorted already
    keys = keys[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[first], np.add.reduceat(values[order], first)


def _qc(
    source: str,
    matrix: sparse.csr_matrix,
    n_transcripts: int,
    n_low: int,
    n_unassigned: int,
    by_category: dict[str, int],
    mismatches: int | None,
) -> CountsQc:
    return CountsQc(
        source=source,
        n_transcripts=n_transcripts,
        n_low_quality=n_low,
        n_unassigned=n_unassigned,
        by_category={k: v for k, v in sorted(by_category.items()) if v},
        n_entries=int(matrix.nnz),
        n_counts=int(matrix.sum()),
        matrix_mismatches=mismatches,
    )
