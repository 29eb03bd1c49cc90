"""Cells, genes and their identifiers, as every layout of a run has to hand them out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from pairing.xenium.columns import NO_CELL, refuse_not_finite
from shards.errors import BadInput
from shards.schema import Gene

CELL_COLUMNS = ("cell_id", "x_um", "y_um", "cell_area_um2", "nucleus_area_um2", "n_nuclei")
# Without the version behind the dot, which moves from release to release.
_ENSEMBL = re.compile(r"(ENS[A-Z]*G\d{11})(\.\d+)?")


def check_cells(path: Path, cells: pd.DataFrame) -> None:
    """Raises BadInput on a table (cell_id, x_um, y_um, …) without cells, on identifiers that are
    not distinct text and on cells without a position.
    """
    if not len(cells):
        raise BadInput(
            path,
            expected="at least one cell",
            found="a table of cells without a row",
            remedy="leave the run out: without cells there is nothing to pair",
        )
    ids = cells["cell_id"]
    if pd.api.types.infer_dtype(ids, skipna=False) != "string":
        raise BadInput(
            f"{path}, cell_id",
            expected="identifiers that are text",
            found=f"{ids.dtype} values",
            remedy="export the run with a current Xenium Ranger",
        )
    twice = ids[ids.duplicated()]
    if len(twice):
        raise BadInput(
            f"{path}, cell_id",
            expected="an identifier of its own for every cell",
            found=f"{twice.iloc[0]!r} more than once, and {len(twice) - 1} more such rows",
            remedy="copy the table again, or export the run again",
        )
    for column in ("x_um", "y_um"):
        refuse_not_finite(path, column, cells[column].to_numpy(np.float64), 0)


def cells_table(cells: pd.DataFrame) -> pd.DataFrame:
    """CELL_COLUMNS, one row a cell; no nucleus is 0 and NaN, never an area."""
    n_nuclei = cells["n_nuclei"].fillna(0).astype(np.int64)
    area = cells["nucleus_area_um2"].astype(np.float64).where(n_nuclei > 0)
    ids = cells["cell_id"].astype(object)
    result = cells.assign(n_nuclei=n_nuclei, nucleus_area_um2=area, cell_id=ids)
    return result[list(CELL_COLUMNS)].reset_index(drop=True)


def row_of_cell(
    path: Path, cell_ids: pd.Series, wanted: npt.NDArray[np.object_]
) -> npt.NDArray[np.int64]:
    """Row of each wanted identifier, -1 where it is no cell's; BadInput on one that is unknown."""
    row: npt.NDArray[np.int64] = pd.Index(cell_ids).get_indexer(wanted).astype(np.int64)
    unknown = [w for w in wanted[row < 0] if not pd.isna(w) and w not in NO_CELL]
    if unknown:
        raise BadInput(
            path,
            expected="identifiers of the run's cells",
            found=f"{unknown[0]!r} and {len(unknown) - 1} more that are not",
            remedy="take all files of the run from one run of the analysis software",
        )
    return row


def genes_of(path: Path, symbols: Iterable[str], ids: Iterable[str]) -> tuple[Gene, ...]:
    """Genes by symbol, with the identifier, less its version, where it is an Ensembl one.

    Raises BadInput where two genes share a symbol: transcripts name their gene by symbol alone.
    """
    genes = tuple(
        Gene(symbol=symbol, ensembl=told[1] if (told := _ENSEMBL.fullmatch(id_)) else None)
        for symbol, id_ in zip(symbols, ids, strict=True)
    )
    twice = pd.Series([gene.symbol for gene in genes], dtype=object)
    twice = twice[twice.duplicated()]
    if len(twice):
        raise BadInput(
            path,
            expected="one symbol a gene",
            found=f"{twice.iloc[0]!r} more than once",
            remedy="give the duplicated genes distinct names in the panel",
        )
    return genes


def cell_id_text(pairs: npt.NDArray[np.uint32]) -> npt.NDArray[np.object_]:
    """(n, 2) prefix and suffix to text: eight nibbles as letters a to p, a dash, the suffix.

    The code of 10x's cells.zarr.zip: (1, 1) is aaaaaaab-1.
    """
    shifts = np.arange(28, -4, -4, dtype=np.uint32)
    letters = ((pairs[:, :1] >> shifts) & 15).astype(np.uint8) + ord("a")
    prefix = np.ascontiguousarray(letters).view("S8").ravel().astype(str)
    return np.array(
        [f"{p}-{s}" for p, s in zip(prefix, pairs[:, 1].tolist(), strict=True)], dtype=object
    )
