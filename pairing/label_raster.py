"""Polygons to label pixels, and labels grown without overlap."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import shapely

I32 = npt.NDArray[np.int32]

# So that a label and the absence of one fit into 16 bits.
MOST_LABELS = np.iinfo(np.uint16).max
_STRIP_ROWS = 32
_NONE = np.int32(1 << 30)


def filled(outlines_px: npt.NDArray[np.object_], side: int) -> I32:
    """(side, side) number of the polygon that the centre of each pixel is in; -1 for none.

    By the even-odd rule, borders half-open. Of several polygons the first.
    """
    labels = np.full((side, side), -1, np.int32)
    rings, owner = shapely.get_rings(outlines_px, return_index=True)
    points, ring = shapely.get_coordinates(rings, return_index=True)
    if not len(points):
        return labels
    same = ring[1:] == ring[:-1]
    begin, end, owner = points[:-1][same], points[1:][same], owner[ring[:-1][same]]
    # A side crosses the middle of the rows first to last - 1.
    first = np.ceil(np.minimum(begin[:, 1], end[:, 1]) - 0.5).clip(0, side).astype(np.int64)
    last = np.ceil(np.maximum(begin[:, 1], end[:, 1]) - 0.5).clip(0, side).astype(np.int64)
    n = last - first
    which = np.repeat(np.arange(len(n)), n)
    row = np.arange(len(which)) - np.repeat(np.cumsum(n) - n, n) + first[which]
    slope = (end[which, 0] - begin[which, 0]) / (end[which, 1] - begin[which, 1])
    x = begin[which, 0] + (row + 0.5 - begin[which, 1]) * slope
    # Sides come in pairs: in at one, out at the next. The first polygon is drawn last.
    order = np.lexsort((x, row, -owner[which]))
    column = np.ceil(x[order] - 0.5).clip(0, side).astype(np.int64)
    left, length = column[0::2], column[1::2] - column[0::2]
    row, label = row[order][0::2], owner[which][order][0::2]
    at = np.repeat(row * side + left - np.cumsum(length) + length, length) + np.arange(length.sum())
    labels.ravel()[at] = np.repeat(label, length)
    return labels


def expanded(masks: I32, radius_px: float) -> I32:
    """The masks grown by up to `radius_px` between pixel centres, without the margin of that width.

    Exact, and of equally near masks the lower number: squared distance and number are one integer,
    of which the least over a column, and then over a row of such, is that of the nearest.
    """
    reach = int(radius_px)
    bits = 30 - (2 * reach * reach).bit_length()
    if masks.max(initial=-1) >= min(1 << bits, MOST_LABELS):
        raise ValueError(f"more nuclei in one tile than {min(1 << bits, MOST_LABELS):,}")
    down = _nearest_above(masks, reach, bits)
    up = _nearest_above(masks[::-1], reach, bits)[::-1]
    height, width = (n - 2 * reach for n in masks.shape)
    in_column = np.minimum(down, up)[reach : reach + height]
    found = np.empty((height, width), np.int32)
    for first in range(0, height, _STRIP_ROWS):  # of a size that stays in a processor's cache
        strip = in_column[first : first + _STRIP_ROWS]
        best = strip[:, reach : reach + width].copy()
        other = np.empty_like(best)
        for dx in range(1, reach + 1):
            for side in (reach - dx, reach + dx):
                np.add(strip[:, side : side + width], np.int32(dx * dx << bits), out=other)
                np.minimum(best, other, out=best)
        near = (best >> bits) <= radius_px * radius_px
        found[first : first + _STRIP_ROWS] = np.where(
            near & (best < _NONE), best & ((1 << bits) - 1), -1
        )
    return found


def _nearest_above(masks: I32, reach: int, bits: int) -> I32:
    """Squared distance to the nearest mask at or above each pixel in its column, and its number."""
    found = np.full(masks.shape, _NONE, np.int32)
    distance = np.full(masks.shape[1], reach + 1, np.int32)
    number = np.zeros(masks.shape[1], np.int32)
    for row, here in enumerate(masks):
        inside = here >= 0
        distance = np.where(inside, 0, np.minimum(distance + 1, reach + 1))
        number = np.where(inside, here, number)
        found[row] = np.where(distance <= reach, distance * distance << bits | number, _NONE)
    return found
