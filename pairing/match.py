"""H&E nuclei to the instrument's nuclei: overlap in the H&E frame, one to one by best score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import shapely

from pairing.geometry import Transform

# Nuclei that share less than this touch as neighbours do; they are not one nucleus seen twice.
MIN_IOU = 0.1

MATCH_COLUMNS = ("he_nucleus_id", "he_area_um2", "he_iou", "he_distance_um")


def match_nuclei(
    instrument_um: Sequence[shapely.Polygon],
    he_nuclei: pa.Table,
    he_px_from_xenium_um: Transform,
    mpp: float,
) -> pd.DataFrame:
    """For each instrument nucleus the H&E nucleus that it is, or nulls.

    `instrument_um` are polygons in the Xenium frame; `he_nuclei` is the table of
    `segmentation.segment` (nucleus_id, area_um2 and polygon_px, WKB in level-0 pixels). Pairs are
    taken greedily by falling IoU (ties by row), each nucleus of either side at most once. Returns
    MATCH_COLUMNS, one row a nucleus of `instrument_um`.
    """
    polygons_px = _moved(np.asarray(instrument_um, dtype=object), he_px_from_xenium_um)
    he_px = shapely.from_wkb(he_nuclei["polygon_px"].to_pylist())
    left, right = shapely.STRtree(he_px).query(polygons_px, predicate="intersects")
    shared = shapely.area(shapely.intersection(polygons_px[left], he_px[right]))
    iou = shared / (shapely.area(polygons_px[left]) + shapely.area(he_px[right]) - shared)
    chosen_left, chosen_right, chosen_iou = one_to_one(left, right, iou)

    n = len(polygons_px)
    result = pd.DataFrame(
        {
            "he_nucleus_id": pd.array([pd.NA] * n, dtype="Int64"),
            "he_area_um2": np.full(n, np.nan),
            "he_iou": np.full(n, np.nan),
            "he_distance_um": np.full(n, np.nan),
        }
    )
    distance_px = shapely.distance(
        shapely.centroid(polygons_px[chosen_left]), shapely.centroid(he_px[chosen_right])
    )
    ids = he_nuclei["nucleus_id"].to_numpy()[chosen_right]
    result.loc[chosen_left, "he_nucleus_id"] = ids
    result.loc[chosen_left, "he_area_um2"] = he_nuclei["area_um2"].to_numpy()[chosen_right]
    result.loc[chosen_left, "he_iou"] = chosen_iou
    result.loc[chosen_left, "he_distance_um"] = distance_px * mpp
    return result


def _moved(polygons: npt.NDArray[np.object_], dst_from_src: Transform) -> npt.NDArray[np.object_]:
    # Simplified outlines of the instrument cross themselves now and then; buffer(0) would drop
    # parts of such a ring, make_valid keeps all of its area.
    moved: npt.NDArray[np.object_] = shapely.make_valid(shapely.transform(polygons, dst_from_src))
    return moved


def one_to_one(
    left: npt.NDArray[np.int64], right: npt.NDArray[np.int64], iou: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The pairs that are taken by falling IoU, each row of either side at most once.

    Pairs of one IoU by `left`, then `right`, whatever order they come in; those below MIN_IOU are
    no pairs.
    """
    order = np.lexsort((right, left, -iou))
    taken_left: set[int] = set()
    taken_right: set[int] = set()
    chosen = []
    for k in order:
        if iou[k] < MIN_IOU:
            break
        if left[k] not in taken_left and right[k] not in taken_right:
            taken_left.add(int(left[k]))
            taken_right.add(int(right[k]))
            chosen.append(k)
    index = np.array(chosen, dtype=np.int64)
    return left[index], right[index], iou[index]
