"""Masks to outlines, and nuclei to a table."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely
from skimage.measure import find_contours

from segmentation.nuclei import FoundNuclei

# Positions and outlines are level-0 pixels of the slide, x before y, pixel i covering [i, i + 1).
NUCLEI_SCHEMA = pa.schema(
    [
        pa.field("nucleus_id", pa.int64(), nullable=False),  # 1 … n by centroid, y before x
        pa.field("x_px", pa.float64(), nullable=False),  # centroid of the mask
        pa.field("y_px", pa.float64(), nullable=False),
        pa.field("area_um2", pa.float64(), nullable=False),  # of the polygon
        pa.field("eccentricity", pa.float64(), nullable=False),  # of the ellipse of same moments
        pa.field("haematoxylin", pa.float64(), nullable=False),  # mean amount, 0 on glass
        pa.field("score", pa.float64(), nullable=False),  # mean probability of being nucleus
        pa.field("flags", pa.list_(pa.string()), nullable=False),  # damaged_tile, edge
        pa.field("polygon_px", pa.binary(), nullable=False),  # WKB
    ]
)


def outlines_of(
    masks: Iterable[npt.NDArray[np.bool_]], corners_px: npt.NDArray[np.int64]
) -> npt.NDArray[np.object_]:
    """The outer border of each mask as a polygon; `corners_px` (n, 2) is where its pixel (0, 0) is.

    A mask is one 4-connected piece. The border runs through the middles of the sides between
    pixels inside and outside: no point of it is further than 0.25 px from the pixels' own sides.
    Holes are filled.
    """
    rings, offsets = [], [0]
    for mask, corner in zip(masks, corners_px, strict=True):
        # A centre is half a pixel from its pixel's corner, and the frame of one pixel around the
        # mask takes one away.
        ring = _outer_ring(np.pad(mask, 1))[:, ::-1] - 0.5 + corner
        rings.append(ring)
        offsets.append(offsets[-1] + len(ring))
    if not rings:
        return np.zeros(0, object)
    ring_of_point = np.repeat(np.arange(len(rings)), np.diff(offsets))
    lines = shapely.linearrings(np.concatenate(rings), indices=ring_of_point)
    return np.asarray(shapely.polygons(lines), object)


def _outer_ring(framed: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """(n, 2) closed ring of (row, column), points on a straight line left out."""
    contours = find_contours(framed.astype(np.float64), 0.5)  # type: ignore[no-untyped-call]  # skimage's
    # The outer one encloses the others.
    ring: npt.NDArray[np.float64] = max(contours, key=lambda c: np.ptp(c, axis=0).sum())
    points = ring[:-1]
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    bends = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    corners = points[bends]
    return np.concatenate([corners, corners[:1]])


def nuclei_table(found: FoundNuclei, mpp: float, slide_mpp: float) -> pa.Table:
    """The nuclei of a block in NUCLEI_SCHEMA, numbered from 1, without flags; outlines at `mpp`."""
    level0_per_px = mpp / slide_mpp
    outlines = outlines_of(found.masks(), found.box[:, :2] + np.array(found.origin_px))
    polygons = shapely.transform(outlines, lambda xy: xy * level0_per_px)
    n = len(found)
    return pa.table(
        {
            "nucleus_id": np.arange(1, n + 1, dtype=np.int64),
            "x_px": found.x_px * level0_per_px,
            "y_px": found.y_px * level0_per_px,
            "area_um2": shapely.area(outlines) * mpp**2,
            "eccentricity": found.eccentricity,
            "haematoxylin": found.haematoxylin,
            "score": found.score,
            "flags": pa.array([[]] * n, pa.list_(pa.string())),
            "polygon_px": pa.array(shapely.to_wkb(polygons).tolist(), pa.binary()),
        },
        schema=NUCLEI_SCHEMA,
    )
