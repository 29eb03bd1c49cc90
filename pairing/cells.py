"""The cells of a run: centre, H&E nucleus, counts and neighbours, one row a cell."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from scipy import sparse
from scipy.spatial import cKDTree

from pairing.annotations import donors_of_cells
from pairing.counts import COUNTS_FILES, MapTasks, save_array, write_counts
from pairing.geometry import Transform
from pairing.he_cells import count_by_place, he_cells_table
from pairing.match import MATCH_COLUMNS, match_nuclei
from pairing.match_rate import MatchRate, PlacedNuclei, match_rates
from pairing.match_tiles import mapped_pairs
from pairing.outlines import Outlines
from pairing.warp import Warp
from pairing.xenium import XeniumRun
from shards.artifact import write_atomically
from shards.errors import BadInput
from shards.schema import Panel, Record

CELLS_FILE = "cells.parquet"
PANEL_FILE = "panel.json"
# (cells, k) int32 rows of cells.parquet, nearest first; -1 is none, or one that was left out.
NEIGHBORS_FILE = "neighbors.npy"
# How many nuclei match from place to place (match_rate.REGION_COLUMNS); of runs with H&E nuclei.
REGIONS_FILE = "match_regions.parquet"

STAGE_VERSION = 3


class CellsOptions(Record):
    """`[cells]` of the config."""

    unit: Literal["xenium", "he_nuclei"] = "xenium"
    counts: Literal["auto"] = "auto"
    # Of H&E nuclei into cells, which XOA too grew nuclei by; no larger than tiles have room for.
    expansion_um: float = Field(default=5.0, ge=0, le=20)
    qv_min: float = Field(default=20, ge=0, le=40)
    neighbors_k: int = Field(default=8, ge=0, le=64)
    neighbors_radius_um: float = Field(default=50.0, gt=0)


class CellsConfig(CellsOptions):
    """All that decides the bytes of the stage: `[cells]`, and `patch.center`."""

    center: Literal["nucleus", "cell"] = "nucleus"


@dataclass(frozen=True, slots=True)
class HeSide:
    """The nuclei found on a run's H&E, in the table of `segmentation`, and how the run lies on it.

    `error_um` is the registration's estimate by cell_id, NaN where it was not assessed. `outlines`
    are those of the nuclei, None where the table has them; cells that are these nuclei
    (`unit = "he_nuclei"`) want them there.
    """

    nuclei: pa.Table
    px_from_xenium_um: Warp
    mpp: float
    error_um: pd.Series[float]
    outlines: Outlines | None = None


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """Donors of a run who must go: `names`, as the file `donors` names them among others.

    `n_he_nuclei` are those of all others; None where none were looked for.
    """

    donors: Path
    names: tuple[str, ...]
    image_px_from_xenium_um: Transform  # to the pixels in which the file's polygons are
    n_he_nuclei: int | None


def write_cells(
    out: Path,
    kept: Path,
    run: XeniumRun,
    config: CellsConfig,
    species: str,
    he: HeSide | None,
    withdrawal: Withdrawal | None = None,
    map_tasks: MapTasks = map,
) -> dict[str, Any]:
    """Write the cells of `run` into `out`; returns the figures of the stage.

    Tallies of transcripts and pairs of nuclei are found by `map_tasks`, anywhere, and published in
    `kept` one by one, see `pairing.counts` and `pairing.match_tiles`.

    `he` is None where the run has no H&E segmentation; then no cell has an H&E nucleus. Cells of
    withdrawn donors are matched and neighboured like all, so that those of others are what they
    would be without a withdrawal, and then left out: they have no row, are in no figure, and later
    stages have not seen them.
    """
    if config.unit == "he_nuclei":
        assert he is not None
        table = he_cells_table(he.nuclei, he.px_from_xenium_um)
        stays = _staying(table, withdrawal)
        areas_um2, n_counts, counts_qc = count_by_place(
            out, kept, run, config.qv_min, he.nuclei, he.px_from_xenium_um, he.mpp,
            table, config.expansion_um, stays, map_tasks,
        )  # fmt: skip
        table["cell_area_um2"] = areas_um2
        found = _Found(n_instrument_nuclei=None, rate=None)
    else:
        cells, nuclei = run.read_cells(), run.read_nuclei()
        table = cells[["cell_id", "cell_area_um2", "nucleus_area_um2", "n_nuclei"]].copy()
        table = table.join(_centres(cells, nuclei, config.center))
        stays = _staying(table, withdrawal)
        n_counts, counts_qc = write_counts(out, kept, run, config.qv_min, stays, map_tasks)
        table, found = _with_he_nuclei(out, kept, table, nuclei, he, stays, map_tasks)
    table["n_counts"] = 0
    table.loc[stays, "n_counts"] = n_counts
    neighbors = find_neighbors(
        table[["x_um", "y_um"]].to_numpy(), config.neighbors_k, config.neighbors_radius_um
    )
    table = table[stays]
    n_he_nuclei = he.nuclei.num_rows if he is not None else None
    if withdrawal is not None:
        n_he_nuclei = withdrawal.n_he_nuclei
    panel = Panel.of(species, run.genes())
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), out / CELLS_FILE)
    write_atomically(out / PANEL_FILE, panel.model_dump_json(indent=1).encode())
    save_array(out / NEIGHBORS_FILE, _among(neighbors, stays))
    return {
        "unit": config.unit,
        "n_cells": len(table),
        "n_genes": len(panel.genes),
        "panel_id": panel.panel_id,
        "n_instrument_nuclei": found.n_instrument_nuclei,
        "n_he_nuclei": n_he_nuclei,
        "n_matched": int(table["he_nucleus_id"].notna().sum()),
        "match": found.rate.model_dump() if found.rate is not None else None,
        "counts": counts_qc.model_dump(),
        "notes": list(run.notes),
    }


@dataclass(frozen=True, slots=True)
class _Found:
    """Nuclei of the instrument, and how many of them match; None where that is not asked."""

    n_instrument_nuclei: int | None
    rate: MatchRate | None


def _with_he_nuclei(
    out: Path,
    kept: Path,
    table: pd.DataFrame,
    nuclei: pd.DataFrame,
    he: HeSide | None,
    stays: npt.NDArray[np.bool_],
    map_tasks: MapTasks,
) -> tuple[pd.DataFrame, _Found]:
    """The instrument's cells with the H&E nucleus of each, or nulls; match rates go into a file."""
    cell_of_nucleus = nuclei["cell_index"].to_numpy()
    n_nuclei = int(np.append(stays, True)[cell_of_nucleus].sum())
    if he is None:
        table = table.assign(he_nucleus_id=pd.array([pd.NA] * len(table), dtype="Int64"))
        table = table.assign(**{name: np.nan for name in MATCH_COLUMNS[1:]})
        return table, _Found(n_nuclei, None)
    matched = match_nuclei(
        nuclei["polygon"].tolist(),
        he.nuclei,
        he.px_from_xenium_um,
        he.mpp,
        he.outlines,
        partial(mapped_pairs, kept, map_tasks, he.px_from_xenium_um),
    )
    has_match = matched["he_nucleus_id"].notna().to_numpy()
    rate = _write_rates(out, he, table["cell_id"], nuclei, has_match, stays)
    return table.join(_best_of_each_cell(matched, cell_of_nucleus, len(table))), _Found(
        n_nuclei, rate
    )


def read_cells(folder: Path) -> pd.DataFrame:
    cells: pd.DataFrame = pq.read_table(folder / CELLS_FILE).to_pandas()
    return cells


def open_counts(folder: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """indptr, indices and data of the counts of a cells artifact, memory-mapped."""
    indptr, indices, data = (
        np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in COUNTS_FILES
    )
    return indptr, indices, data


def read_counts(folder: Path, n_genes: int) -> sparse.csr_matrix:
    """(cells, genes) CSR of the counts of a cells artifact; arrays stay memory-mapped."""
    indptr, indices, data = open_counts(folder)
    return sparse.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, n_genes))


def find_neighbors(
    positions_um: npt.NDArray[np.float64], k: int, radius_um: float
) -> npt.NDArray[np.int32]:
    """The `k` nearest other points within `radius_um` of each: (n, k) row numbers, -1 = none.

    Nearest first; of points at the same distance the lower row comes first.
    """
    n = len(positions_um)
    if n == 0 or k == 0:
        return np.full((n, k), -1, dtype=np.int32)
    # More than k are asked for, so that ties at the k-th distance are settled by row, not by tree.
    wanted = min(n, k + 9)
    distance, index = cKDTree(positions_um).query(
        positions_um,
        k=np.arange(1, wanted + 1),
        distance_upper_bound=np.nextafter(radius_um, np.inf),
    )
    distance[index == np.arange(n)[:, None]] = np.inf
    order = np.lexsort((index, distance), axis=1)[:, :k]
    index = np.take_along_axis(index, order, axis=1)
    index[~np.isfinite(np.take_along_axis(distance, order, axis=1))] = -1
    result = np.full((n, k), -1, dtype=np.int32)
    result[:, : index.shape[1]] = index
    return result


def _staying(table: pd.DataFrame, withdrawal: Withdrawal | None) -> npt.NDArray[np.bool_]:
    """The cells of which no withdrawn donor is told."""
    if withdrawal is None:
        return np.ones(len(table), dtype=bool)
    centres_px = withdrawal.image_px_from_xenium_um(table[["x_um", "y_um"]].to_numpy())
    donor, _ = donors_of_cells(withdrawal.donors, table["cell_id"].tolist(), centres_px)
    return ~pd.Series(donor).isin(withdrawal.names).to_numpy(dtype=bool)


def _among(neighbors: npt.NDArray[np.int32], stays: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """The lists of those that stay, by their new rows; -1 in the place of one that does not."""
    row = np.where(stays, np.cumsum(stays) - 1, -1).astype(np.int32)
    return np.where(neighbors >= 0, row[neighbors], -1).astype(np.int32)[stays]


def _centres(
    cells: pd.DataFrame, nuclei: pd.DataFrame, center: Literal["nucleus", "cell"]
) -> pd.DataFrame:
    """x_um, y_um and center: the nucleus where the cell has exactly one, else the cell."""
    result = cells[["x_um", "y_um"]].assign(center="cell")
    if center == "nucleus":
        owned = nuclei[nuclei["cell_index"] >= 0]
        single = owned.drop_duplicates("cell_index", keep=False).set_index("cell_index")
        result.loc[single.index, ["x_um", "y_um"]] = single[["x_um", "y_um"]].to_numpy()
        result.loc[single.index, "center"] = "nucleus"
    placed = np.isfinite(result[["x_um", "y_um"]].to_numpy()).all(axis=1)
    if not placed.all():
        bad = cells.loc[~placed, "cell_id"]
        raise BadInput(
            "cells of the bundle",
            expected="a finite position for every cell",
            found=f"none for {len(bad)} cells, the first is {bad.iloc[0]}",
            remedy="export the bundle again",
        )
    return result


def _write_rates(
    out: Path,
    he: HeSide,
    cell_id: pd.Series[str],
    nuclei: pd.DataFrame,
    has_match: npt.NDArray[np.bool_],
    stays: npt.NDArray[np.bool_],
) -> MatchRate | None:
    """Match rates of the nuclei of cells that stay; those of squares go into a file."""
    cell = nuclei["cell_index"].to_numpy()
    error_um = np.append(he.error_um.reindex(cell_id).to_numpy(np.float64), np.nan)
    rates = match_rates(
        PlacedNuclei.of_instrument(nuclei, he.px_from_xenium_um, he.mpp),
        PlacedNuclei.of_he(he.nuclei, he.mpp),
        has_match,
        error_um[cell],
        np.append(stays, False)[cell],
    )
    if rates is None:
        return None
    rate, regions = rates
    pq.write_table(pa.Table.from_pandas(regions, preserve_index=False), out / REGIONS_FILE)
    return rate


def _best_of_each_cell(
    matched: pd.DataFrame, cell_index: npt.NDArray[np.int64], n_cells: int
) -> pd.DataFrame:
    """Of a cell's nuclei the one that overlaps its H&E nucleus best; nulls where none does."""
    owned = matched.assign(cell_index=cell_index)
    owned = owned[(owned["cell_index"] >= 0) & owned["he_nucleus_id"].notna()]
    best = owned.sort_values("he_iou", ascending=False, kind="stable").drop_duplicates("cell_index")
    return best.set_index("cell_index").reindex(range(n_cells))
