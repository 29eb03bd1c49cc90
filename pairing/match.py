"""H&E nuclei to the instrument's nuclei: overlap in the H&E frame, one to one by best score."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import shapely

from pairing.geometry import Transform
from pairing.match_tiles import MIN_IOU, PAIRS, MatchTiles, pairs_in_turn
from pairing.outlines import Outlines, TableOutlines

MATCH_COLUMNS = ("he_nucleus_id", "he_area_um2", "he_iou", "he_distance_um")


def match_nuclei(
    instrument_um: Sequence[shapely.Polygon],
    he_nuclei: pa.Table,
    he_px_from_xenium_um: Transform,
    mpp: float,
    outlines: Outlines | None = None,
    find: Callable[[MatchTiles], Iterable[pa.Table]] | None = None,
) -> pd.DataFrame:
    """For each instrument nucleus the H&E nucleus that it is, or nulls.

    `instrument_um` are polygons in the Xenium frame; `he_nuclei` is the table of
    `segmentation.segment` (nucleus_id, area_um2 and polygon_px, WKB in level-0 pixels). Pairs are
    taken greedily by falling IoU (ties by row), each nucleus of either side at most once.
    `outlines` are those of `he_nuclei` if it has none itself; `find` finds the pairs that overlap,
    here if None. Returns MATCH_COLUMNS, one row a nucleus of `instrument_um`.
    """
    polygons_um = np.asarray(instrument_um, dtype=object)
    outlines_px = TableOutlines(he_nuclei) if outlines is None else outlines
    tiles = MatchTiles(polygons_um, outlines_px, he_px_from_xenium_um, mpp)
    found = (find or partial(pairs_in_turn, he_px_from_xenium_um))(tiles)
    pairs = pa.concat_tables([PAIRS.empty_table(), *found])
    # A pair at the border of tiles is found in each of them.
    left, right = (pairs[name].to_numpy() for name in ("left", "right"))
    first = np.unique(left * max(he_nuclei.num_rows, 1) + right, return_index=True)[1]
    left, right = left[first], right[first]
    iou, distance_px = (pairs[name].to_numpy()[first] for name in ("iou", "distance_px"))
    chosen = one_to_one(left, right, iou)

    n = len(polygons_um)
    result = pd.DataFrame(
        {
            "he_nucleus_id": pd.array([pd.NA] * n, dtype="Int64"),
            "he_area_um2": np.full(n, np.nan),
            "he_iou": np.full(n, np.nan),
            "he_distance_um": np.full(n, np.nan),
        }
    )
    own, other = left[chosen], right[chosen]
    result.loc[own, "he_nucleus_id"] = he_nuclei["nucleus_id"].to_numpy()[other]
    result.loc[own, "he_area_um2"] = he_nuclei["area_um2"].to_numpy()[other]
    result.loc[own, "he_iou"] = iou[chosen]
    result.loc[own, "he_distance_um"] = distance_px[chosen] * mpp
    return result


def one_to_one(
    left: npt.NDArray[np.int64], right: npt.NDArray[np.int64], iou: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Which pairs are taken, by falling IoU, each row of either side at most once.

    Pairs of one IoU by `left`, then `right`, whatever order they come in; those below MIN_IOU are
    no pairs.
    """
    order = np.lexsort((right, left, -iou))
    is_taken_left = np.zeros(left.max(initial=-1) + 1, bool)
    is_taken_right = np.zeros(right.max(initial=-1) + 1, bool)
    chosen = []
    for k in order:
        if iou[k] < MIN_IOU:
            break
        if not is_taken_left[left[k]] and not is_taken_right[right[k]]:
            is_taken_left[left[k]] = is_taken_right[right[k]] = True
            chosen.append(k)
    return np.array(chosen, dtype=np.int64)
