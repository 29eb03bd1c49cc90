"""Label images to a table of nuclei: one outline, position, size and score each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely
from skimage.measure import find_contours, regionprops

from segmentation.blocks import Block

# Positions and outlines are level-0 pixels of the slide, x before y, pixel i covering [i, i + 1).
NUCLEI_SCHEMA = pa.schema(
    [
        pa.field("nucleus_id", pa.int64(), nullable=False),  # 1 … n by block, then position
        pa.field("x_px", pa.float64(), nullable=False),  # centroid
        pa.field("y_px", pa.float64(), nullable=False),
        pa.field("area_um2", pa.float64(), nullable=False),  # of the polygon
        pa.field("eccentricity", pa.float64(), nullable=False),  # of the ellipse of same moments
        pa.field("score", pa.float64(), nullable=False),  # mean probability of being nucleus
        pa.field("polygon_px", pa.binary(), nullable=False),  # WKB
    ]
)

# An outline keeps every vertex that it would miss by more than this, in network pixels.
_SIMPLIFY_PX = 0.2


def nuclei_table(
    labels: npt.NDArray[np.int32],
    logit: npt.NDArray[np.float32],
    block: Block,
    mpp: float,
    slide_mpp: float,
) -> pa.Table:
    """The nuclei that `block` owns, in NUCLEI_SCHEMA, numbered from 1 by (y, x).

    `labels` and `logit` are (Y, X) over `block.read`, at `mpp`. A nucleus in several pieces is its
    largest piece.
    """
    level0_per_px = mpp / slide_mpp
    probability = 1.0 / (1.0 + np.exp(-logit.astype(np.float64)))
    rows = []
    regions = regionprops(labels, intensity_image=probability)  # type: ignore[no-untyped-call]  # skimage's
    for region in regions:
        y, x = (
            c + start + 0.5 for c, start in zip(region.centroid, block.read[1::-1], strict=True)
        )
        if not block.owns(x, y):
            continue
        top, left = region.bbox[:2]
        outline = _outline(region.image, left + block.read[0], top + block.read[1])
        polygon = shapely.transform(outline, lambda xy: xy * level0_per_px)
        rows.append(
            {
                "x_px": x * level0_per_px,
                "y_px": y * level0_per_px,
                "area_um2": outline.area * mpp**2,
                "eccentricity": float(region.eccentricity),
                "score": float(region.intensity_mean),
                "polygon_px": shapely.to_wkb(polygon),
            }
        )
    rows.sort(key=lambda row: (row["y_px"], row["x_px"]))
    return pa.Table.from_pylist(
        [{"nucleus_id": i, **row} for i, row in enumerate(rows, start=1)], schema=NUCLEI_SCHEMA
    )


def _outline(mask: npt.NDArray[np.bool_], left_px: int, top_px: int) -> shapely.Polygon:
    """The outer border of the largest piece of a mask whose first pixel lies at (left, top)."""
    # Half-way between inside and outside centres; a centre is half a pixel from its pixel's corner,
    # and the frame of one pixel around the mask takes one away.
    framed = np.pad(mask, 1).astype(np.float64)
    contours = find_contours(framed, 0.5)  # type: ignore[no-untyped-call]  # skimage's
    rings = [shapely.Polygon(contour[:, ::-1] - 0.5) for contour in contours]
    largest = max(rings, key=lambda ring: ring.area)
    corners = shapely.get_coordinates(largest.simplify(_SIMPLIFY_PX))
    return shapely.Polygon(corners + np.array([left_px, top_px]))
