"""Technology means: what each gene's expression is divided by before genes are ranked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from shards.errors import BadInput


class NamedGene(Protocol):
    """A gene of the vocabulary, as far as a file of means can name it."""

    @property
    def symbol(self) -> str: ...
    @property
    def ensembl(self) -> str | None: ...


def read_means(genes: Sequence[NamedGene], path: Path) -> tuple[npt.NDArray[np.float64], int]:
    """The mean of each gene, 1 where the file lacks it or says 0; and how many it lacks.

    A .csv or .parquet with the columns `mean` and `ensembl` or `symbol` or both. A row is a gene's
    if their Ensembl ids are the same, or, where one has none, their symbols. Raises BadInput for
    another file, a mean that is negative or no number, a gene named twice, or no gene found.
    """
    table = _read_table(path)
    mean = _means(path, table)
    n = len(mean)
    ensembl, symbol = (
        table[name].to_pylist() if name in table.column_names else [None] * n
        for name in ("ensembl", "symbol")
    )
    by_ensembl, by_symbol = _rows(ensembl), _rows(symbol)
    found = np.ones(len(genes))
    n_lacking = 0
    for place, gene in enumerate(genes):
        rows = by_ensembl.get(gene.ensembl or "", []) or [
            row for row in by_symbol.get(gene.symbol, []) if not (gene.ensembl and ensembl[row])
        ]
        if len(rows) > 1:
            raise BadInput(
                path,
                expected="one row a gene",
                found=f"{len(rows)} of {gene.symbol}",
                remedy="keep one, or tell them apart by their Ensembl ids",
            )
        if rows and mean[rows[0]] > 0:
            found[place] = mean[rows[0]]
        n_lacking += not rows
    if n_lacking == len(genes):
        raise BadInput(
            path,
            expected=f"genes of the data, such as {genes[0].symbol} ({genes[0].ensembl})",
            found=f"none of them among {n} rows",
            remedy="give the means of this species, by symbol or by Ensembl id",
        )
    return found, n_lacking


def _read_table(path: Path) -> Any:
    readers = {".csv": pa.csv.read_csv, ".parquet": pa.parquet.read_table}
    remedy = "give a table with a mean for each gene, or leave model.rank.means out"
    if path.suffix not in readers:
        raise BadInput(path, expected="a .csv or .parquet", found=path.name, remedy=remedy)
    try:
        table = readers[path.suffix](path)
    except (OSError, pa.ArrowException) as error:
        raise BadInput(
            path, expected=f"a {path.suffix} file", found=str(error), remedy=remedy
        ) from error
    columns = set(table.column_names)
    if "mean" not in columns or not columns & {"ensembl", "symbol"}:
        raise BadInput(
            path,
            expected="the columns mean and ensembl or symbol",
            found=", ".join(table.column_names),
            remedy="name them so",
        )
    return table


def _means(path: Path, table: Any) -> npt.NDArray[np.float64]:
    try:
        mean = table["mean"].cast(pa.float64()).to_numpy()
    except pa.ArrowException as error:
        raise BadInput(
            f"{path}: mean", expected="numbers", found=str(error), remedy="correct them"
        ) from error
    bad = np.flatnonzero(~(np.isfinite(mean) & (mean >= 0)))
    if len(bad):
        raise BadInput(
            f"{path}: mean",
            expected="numbers of 0 or more",
            found=f"{mean[bad[0]]} in row {bad[0]}",
            remedy="correct it, or leave the gene out",
        )
    return np.asarray(mean, dtype=np.float64)


def _rows(names: Sequence[str | None]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(names):
        if name:
            rows[name].append(row)
    return rows
