"""Counts, genes and matches of a run's cells, as figures, a table and charts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from flows.report import charts
from flows.report.embed import chart_uri
from pairing.xenium.features import CATEGORY_NAMES
from shards.schema import Panel

N_TOP_GENES = 20
_COUNTS_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class GeneRow:
    """One gene of the panel: its counts in cells, their share of all, the cells that have any."""

    symbol: str
    ensembl: str | None
    n_counts: int
    share_of_counts: float
    share_of_cells: float


@dataclass(frozen=True, slots=True)
class CellFigures:
    """Counts and matches over all cells of the run; of matches None where there are none."""

    median_counts: float
    median_genes: float
    n_silent_genes: int
    n_matched: int | None
    median_iou: float | None
    median_distance_um: float | None


@dataclass(frozen=True, slots=True)
class CategoryRow:
    """Good transcripts in cells of one category, by cell and as a share of all such transcripts."""

    name: str
    n: int
    per_cell: float
    share: float


def category_rows(by_category: Mapping[str, int], n_cells: int) -> list[CategoryRow]:
    """Every category, genes first, those without a transcript too; none where none is told.

    `by_category` is of the counts' figures; it is empty where the counts are the bundle's matrix.
    """
    total = sum(by_category.values())
    if not total:
        return []
    counted = {**dict.fromkeys(CATEGORY_NAMES, 0), **by_category}
    return [CategoryRow(name, n, n / n_cells, n / total) for name, n in counted.items()]


def by_gene(
    counts: sparse.csr_matrix,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Counts of each gene, and cells that have any, in one pass of bounded memory."""
    n_genes = counts.shape[1]
    n_counts, n_cells = np.zeros(n_genes, np.int64), np.zeros(n_genes, np.int64)
    for start in range(0, counts.nnz, _COUNTS_AT_ONCE):
        span = slice(start, start + _COUNTS_AT_ONCE)
        gene = counts.indices[span]
        # Sums of whole numbers below 2^53: exact in the float64 that bincount adds up in.
        n_counts += np.bincount(gene, counts.data[span], n_genes).astype(np.int64)
        n_cells += np.bincount(gene, minlength=n_genes)
    return n_counts, n_cells


def top_genes(
    panel: Panel,
    n_by_gene: npt.NDArray[np.int64],
    n_cells_by_gene: npt.NDArray[np.int64],
    n_cells: int,
) -> list[GeneRow]:
    """The genes with most counts, ties in the panel's order; genes without a count are left out."""
    order = np.argsort(-n_by_gene, kind="stable")[:N_TOP_GENES]
    total = int(n_by_gene.sum())
    return [
        GeneRow(
            symbol=panel.genes[g].symbol,
            ensembl=panel.genes[g].ensembl,
            n_counts=int(n_by_gene[g]),
            share_of_counts=n_by_gene[g] / total,
            share_of_cells=n_cells_by_gene[g] / n_cells,
        )
        for g in order.tolist()
        if n_by_gene[g]
    ]


def cell_figures(
    table: pd.DataFrame,
    counts: sparse.csr_matrix,
    n_by_gene: npt.NDArray[np.int64],
    *,
    has_nuclei: bool,
) -> CellFigures:
    """Medians over all cells; `has_nuclei` says whether nuclei were looked for on an H&E."""
    matched = table[table["he_nucleus_id"].notna()]
    return CellFigures(
        median_counts=float(table["n_counts"].median()),
        median_genes=float(np.median(np.diff(counts.indptr))),
        n_silent_genes=int((n_by_gene == 0).sum()),
        n_matched=len(matched) if has_nuclei else None,
        median_iou=float(matched["he_iou"].median()) if len(matched) else None,
        median_distance_um=float(matched["he_distance_um"].median()) if len(matched) else None,
    )


def cell_charts(
    table: pd.DataFrame,
    counts: sparse.csr_matrix,
    n_by_gene: npt.NDArray[np.int64],
    min_counts: int,
) -> dict[str, str]:
    """Charts by name, as data URIs; `iou` and `distance` only where a cell has an H&E nucleus."""
    n_counts = table["n_counts"].to_numpy(np.float64)
    figures = {
        "counts_per_cell": charts.histogram(
            n_counts, "counts of a cell", mark=(min_counts, f"min_counts = {min_counts}")
        ),
        "genes_per_cell": charts.histogram(
            np.diff(counts.indptr).astype(np.float64), "genes of a cell"
        ),
        "counts_per_gene": charts.ranked(
            n_by_gene.astype(np.float64), "genes, most counted first", "counts"
        ),
    }
    matched = table[table["he_nucleus_id"].notna()]
    if len(matched):
        figures["iou"] = charts.histogram(
            matched["he_iou"].to_numpy(np.float64),
            "IoU of H&E nucleus and instrument's nucleus",
            limits=(0.0, 1.0),
        )
        figures["distance"] = charts.histogram(
            matched["he_distance_um"].to_numpy(np.float64), "distance of their centroids, µm"
        )
    return {name: chart_uri(figure) for name, figure in figures.items()}
