"""Flags of cells, told from measured scores by thresholds: other thresholds cut no patch again."""

from __future__ import annotations

from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field
from scipy.spatial import cKDTree

from pairing.geometry import Points
from pairing.quality import SCORES
from shards.schema import Record

Flag = Literal["edge", "damaged_tile", "blurred", "pen", "fold", "torn"]
FLAGS: tuple[Flag, ...] = get_args(Flag)

# The columns of the shards' index tables that tell a cell's quality.
QUALITY_COLUMNS: Final = ("sharpness", "pen_share", "dark_ratio", "glass_share")

# A cell is on glass where less than half of its middle shows tissue; a tear is told by how many of
# the cells around do so, the cell itself among them, at most so many and so far away.
_ON_GLASS: Final = 0.5
_AROUND, _AROUND_UM = 9, 25.0
# Cells at a time, for memory.
_AT_A_TIME: Final = 100_000


class Thresholds(Record):
    """From where on a score is a flag; units and sources are in docs/quality.md."""

    blurred_below: float = 0.35
    pen_above: float = Field(default=0.05, ge=0, le=1)
    fold_above: float = Field(default=2.0, gt=0)
    torn_above: float = Field(default=0.2, ge=0, le=1)


def with_flags(
    patches: pd.DataFrame,
    cells_um: Points,
    thresholds: Thresholds,
    donor: npt.NDArray[np.int32] | None = None,
) -> pd.DataFrame:
    """The index of the patches with QUALITY_COLUMNS and a column for every flag.

    `cells_um` (n, 2) are the places of the patches' cells in the Xenium frame, `donor` (n,) the
    numbers of their donors in a run of several. `dark_ratio` is `dark_od` relative to the median of
    the donor's patches in the run, `glass_share` the share of the donor's cells around, in the
    Xenium frame, that lie on glass on the slide: what is told of a cell is the same whoever else is
    withdrawn. A score that can't be told, NaN, flags nothing.
    """
    scores = patches[list(SCORES)].astype(np.float64)
    donor = np.zeros(len(patches), np.int32) if donor is None else donor
    dark_ratio = scores["dark_od"] / scores["dark_od"].groupby(donor).transform("median")
    glass_share = np.full(len(patches), np.nan)
    for number in np.unique(donor).tolist():
        of = np.flatnonzero(donor == number)
        glass_share[of] = _glass_share(cells_um[of], scores["centre_tissue"].to_numpy()[of])
    return patches.assign(
        dark_ratio=dark_ratio,
        glass_share=glass_share,
        blurred=scores["sharpness"] < thresholds.blurred_below,
        pen=scores["pen_share"] > thresholds.pen_above,
        fold=dark_ratio > thresholds.fold_above,
        torn=glass_share > thresholds.torn_above,
    )


def _glass_share(
    cells_um: Points, centre_tissue: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """(n,) NaN where the cell's own patch doesn't tell; the instrument saw tissue around all."""
    told = np.flatnonzero(~np.isnan(centre_tissue))
    share = np.full(len(centre_tissue), np.nan)
    if not len(told):
        return share
    # The last is for those who are not there.
    on_glass = np.append((centre_tissue[told] < _ON_GLASS).astype(np.float64), np.nan)
    tree = cKDTree(cells_um[told])
    for start in range(0, len(told), _AT_A_TIME):
        rows = told[start : start + _AT_A_TIME]
        _, around = tree.query(
            cells_um[rows], k=np.arange(1, _AROUND + 1), distance_upper_bound=_AROUND_UM
        )
        share[rows] = np.nanmean(on_glass[around], axis=1)
    return share
