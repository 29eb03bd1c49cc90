"""Cells of two runs that lie on each other, on one slide."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

# Cells of one section that were carried over twice meet again within the error that a registration
# may have (5 µm by default). Regions that only touch have few such pairs: of random cells at ρ per
# µm², ρ² · 2/3 r³ a µm of border, so with 8,000 cells per mm² and four borders 0.24 / √n of n cells
# (4 % of 36, 1 % of 576), and fewer of real cells, which keep apart. The floor is for tiny runs.
MEETING_UM: Final = 5.0
OVERLAP_FRACTION: Final = 0.05
OVERLAP_CELLS: Final = 5

Centres = npt.NDArray[np.float64]


def n_meeting(few_px: Centres, many_px: Centres, mpp: float) -> int:
    """How many of (n, 2) centres lie within MEETING_UM of one of the others, on the same slide."""
    reach_px = MEETING_UM / mpp
    if not len(few_px) or not len(many_px):
        return 0
    low, high = many_px.min(axis=0) - reach_px, many_px.max(axis=0) + reach_px
    near = few_px[((few_px >= low) & (few_px <= high)).all(axis=1)]
    if not len(near):
        return 0
    away_px, _ = cKDTree(many_px).query(near)
    return int((away_px <= reach_px).sum())


def overlap(few_px: Centres, many_px: Centres, mpp: float) -> int | None:
    """How many of the few meet one of the many, where that is more than touching; else None."""
    n_meet = n_meeting(few_px, many_px, mpp)
    return n_meet if n_meet >= max(OVERLAP_CELLS, OVERLAP_FRACTION * len(few_px)) else None
