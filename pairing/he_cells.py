"""Cells that are nuclei found on the H&E, expanded in the Xenium frame; transcripts by lookup."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from scipy.spatial import cKDTree

from pairing.counts import CountsQc, MapTasks, count_transcripts
from pairing.geometry import Points
from pairing.label_tiles import (
    ByPlace,
    Tiles,
    cell_areas_um2,
    make_tile,
    reach_um,
    xenium_um_of,
)
from pairing.match import MATCH_COLUMNS
from pairing.warp import Warp, write_warp
from pairing.xenium import XeniumRun
from shards.artifact import make_left
from shards.errors import BadInput

_WARP_FILE = "he_px_from_xenium_um.npz"


def he_cell_ids(nucleus_ids: Sequence[int] | npt.NDArray[np.int64]) -> list[str]:
    """The cell_id of each H&E nucleus: `he-` and the nucleus_id that the segmentation gave it."""
    return [f"he-{nucleus_id}" for nucleus_id in nucleus_ids]


def he_cells_table(he_nuclei: pa.Table, he_px_from_xenium_um: Warp) -> pd.DataFrame:
    """The cells, one a nucleus, in its order; all but what the expansion and transcripts tell.

    Centred on the nucleus; the attached H&E nucleus is the cell's own, at IoU 1 and distance 0.
    Raises BadInput where there is no nucleus, or the transform has no inverse where they lie.
    """
    if not he_nuclei.num_rows:
        raise BadInput(
            "H&E nuclei",
            expected='at least one, to count for with unit = "he_nuclei"',
            found="none",
            remedy='look at the slide and its pixel size, or set unit = "xenium"',
        )
    centres_um = xenium_um_of(_centres_px(he_nuclei), he_px_from_xenium_um)
    ids, areas = he_nuclei["nucleus_id"].to_numpy(), he_nuclei["area_um2"].to_numpy()
    table = pd.DataFrame(
        {
            "cell_id": he_cell_ids(ids),
            "cell_area_um2": np.nan,
            "nucleus_area_um2": areas,
            "n_nuclei": 1,
            "x_um": centres_um[:, 0],
            "y_um": centres_um[:, 1],
            "center": "nucleus",
        }
    )
    own = (pd.array(ids, dtype="Int64"), areas, 1.0, 0.0)
    return table.assign(**dict(zip(MATCH_COLUMNS, own, strict=True)))


def count_by_place(
    out: Path,
    kept: Path,
    run: XeniumRun,
    qv_min: float,
    he_nuclei: pa.Table,
    he_px_from_xenium_um: Warp,
    mpp: float,
    table: pd.DataFrame,
    expansion_um: float,
    stays: npt.NDArray[np.bool_],
    map_tasks: MapTasks,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], CountsQc]:
    """Area of the cell of each nucleus in µm², and counts as `pairing.counts.write_counts`.

    Cells are the nuclei of `table`, each expanded by `expansion_um` as far as no other is nearer;
    a transcript is of the cell in which it lies. Tiles of cells, and then tallies of spans of
    transcripts, are made by `map_tasks` and published in `kept`.
    """
    write_warp(kept / _WARP_FILE, he_px_from_xenium_um)
    outlines_px = he_nuclei["polygon_px"]
    tiles = Tiles(
        table[["x_um", "y_um"]].to_numpy(),
        reach_um(_centres_px(he_nuclei), outlines_px, mpp, expansion_um),
        outlines_px,
    )
    left = tiles.left(kept)
    make = partial(make_tile, kept, kept / _WARP_FILE, expansion_um)
    make_left(map_tasks, make, left, len(tiles))
    areas_um2 = cell_areas_um2(kept, tiles.names, len(table))
    assignment = ByPlace(kept, run.transcripts.x, run.transcripts.y)
    n_counts, qc = count_transcripts(out, kept, run, qv_min, assignment, stays, map_tasks)
    return areas_um2, n_counts, qc


def he_cell_errors(he_nuclei: pa.Table, places: pd.DataFrame) -> pd.Series[float]:
    """Estimated registration error in µm by cell_id: that of the nearest cell of the instrument.

    `places` is the registration's table of the instrument's cells; NaN where it was not assessed.
    Errors change over tens of µm, and nuclei far from any cell have no counts.
    """
    index = pd.Index(he_cell_ids(he_nuclei["nucleus_id"].to_numpy()), name="cell_id")
    placed = places[np.isfinite(places[["x_px", "y_px"]]).all(axis=1)]
    if not len(placed):
        return pd.Series(np.nan, index=index)
    _, nearest = cKDTree(placed[["x_px", "y_px"]].to_numpy()).query(_centres_px(he_nuclei))
    return pd.Series(placed["error_um"].to_numpy(np.float64)[nearest], index=index)


def _centres_px(he_nuclei: pa.Table) -> Points:
    return np.stack([he_nuclei["x_px"], he_nuclei["y_px"]], axis=1)
