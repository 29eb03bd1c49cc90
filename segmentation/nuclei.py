"""A field to nuclei: labelled, checked, owned and measured, the same from any block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.special import expit
from skimage.measure import label

from pairing.geometry import Box
from segmentation.dynamics import (
    MAX_FLOW_ERROR,
    MIN_LOGIT,
    Labels,
    carry_px,
    flow_errors,
    label_flows,
    reach_px,
)
from segmentation.windows import Field

# Smaller objects than a nucleus can be are dropped.
MIN_NUCLEUS_UM2: Final = 6.0
# No nucleus is so long that its end is this far from where its pixels gather.
MAX_TRAVEL_UM: Final = 20.0


def max_travel_px(mpp: float) -> int:
    return round(MAX_TRAVEL_UM / mpp)


def halo_px(mpp: float) -> int:
    """How much around a block decides on the nuclei that it owns, in pixels of `mpp`."""
    travel = max_travel_px(mpp)
    return reach_px(travel) + carry_px(travel)


@dataclass(frozen=True, slots=True)
class FoundNuclei:
    """Nuclei of one block: masks and figures, sorted by centroid, y before x.

    `piece_YX` (Y, X) numbers masks, 0 where none is; it begins at `origin_px`. `number` says which
    of them a nucleus is, `box` (n, 4) where: half-open (x0, y0, x1, y1) in `piece_YX`. Centroids
    are in pixels of the whole grid.
    """

    origin_px: tuple[int, int]
    piece_YX: Labels
    number: npt.NDArray[np.int64]
    box: npt.NDArray[np.int64]
    x_px: npt.NDArray[np.float64]
    y_px: npt.NDArray[np.float64]
    n_px: npt.NDArray[np.int64]
    eccentricity: npt.NDArray[np.float64]
    score: npt.NDArray[np.float64]
    haematoxylin: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.number)

    def masks(self) -> Iterator[npt.NDArray[np.bool_]]:
        """The mask of each nucleus over its box."""
        for number, (x0, y0, x1, y1) in zip(self.number, self.box.tolist(), strict=True):
            yield self.piece_YX[y0:y1, x0:x1] == number


def find_nuclei(
    field: Field, origin_px: tuple[int, int], core: Box, mpp: float, device: str
) -> FoundNuclei:
    """The nuclei whose centroid lies in the half-open `core`.

    `field` begins at `origin_px` (x, y) and reaches `halo_px(mpp)` beyond `core` on every side;
    both are in pixels of `mpp` on the slide's grid. A nucleus in several pieces is its largest.
    """
    travel = max_travel_px(mpp)
    labels = label_flows(
        field.flow_2YX,
        field.logit_YX > MIN_LOGIT,
        max_travel_px=travel,
        rim_px=carry_px(travel),
        device=device,
    )
    pieces = _largest_pieces(labels)
    shape = _Moments.of(pieces, origin_px)
    x0, y0, x1, y1 = core
    wanted = (shape.x_px >= x0) & (shape.x_px < x1) & (shape.y_px >= y0) & (shape.y_px < y1)
    wanted &= shape.n_px >= round(MIN_NUCLEUS_UM2 / mpp**2)
    number = np.flatnonzero(wanted) + 1
    box = _boxes(pieces, number)
    label_of_piece = labels[box[:, 1], _first_column(pieces, number, box)]
    errors = flow_errors(
        labels, _boxes(labels, label_of_piece), label_of_piece, field.flow_2YX, device
    )
    good = errors <= MAX_FLOW_ERROR
    number, box = number[good], box[good]
    order = np.lexsort((shape.n_px[number - 1], shape.x_px[number - 1], shape.y_px[number - 1]))
    number, box = number[order], box[order]
    row = number - 1
    probability = expit(field.logit_YX.astype(np.float64))
    return FoundNuclei(
        origin_px=origin_px,
        piece_YX=pieces,
        number=number,
        box=box,
        x_px=shape.x_px[row],
        y_px=shape.y_px[row],
        n_px=shape.n_px[row],
        eccentricity=shape.eccentricity[row],
        score=shape.mean(probability)[row],
        haematoxylin=shape.mean(field.haematoxylin_YX.astype(np.float64))[row],
    )


def _largest_pieces(labels: Labels) -> Labels:
    """(Y, X) the largest 4-connected piece of each label, numbered in reading order."""
    pieces, n_pieces = label(labels, background=0, return_num=True, connectivity=1)  # type: ignore[no-untyped-call]  # skimage's
    if not n_pieces:
        return labels
    flat = pieces.reshape(-1)
    size = np.bincount(flat, minlength=n_pieces + 1)[1:]
    owner = np.zeros(n_pieces + 1, np.int32)
    owner[flat] = labels.reshape(-1)
    owner = owner[1:]
    # By label, then the largest first, of equals the first in reading order.
    order = np.lexsort((np.arange(n_pieces), -size, owner))
    first = np.ones(n_pieces, bool)
    first[1:] = owner[order][1:] != owner[order][:-1]
    number = np.zeros(n_pieces + 1, np.int32)
    chosen = np.sort(order[first]) + 1
    number[chosen] = np.arange(1, len(chosen) + 1)
    largest: Labels = number[pieces]
    return largest


def _boxes(labels: Labels, numbers: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """(n, 4) half-open boxes (x0, y0, x1, y1) of numbers that all occur."""
    found = ndimage.find_objects(labels)
    boxes = [
        (found[n - 1][1].start, found[n - 1][0].start, found[n - 1][1].stop, found[n - 1][0].stop)
        for n in numbers.tolist()
    ]
    return np.array(boxes, np.int64).reshape(-1, 4)


def _first_column(
    pieces: Labels, number: npt.NDArray[np.int64], box: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """A column of each piece's first row that belongs to it."""
    return np.array(
        [
            x0 + int(np.argmax(pieces[y0, x0:x1] == n))
            for n, (x0, y0, x1, _) in zip(number.tolist(), box.tolist(), strict=True)
        ],
        np.int64,
    )


@dataclass(frozen=True, slots=True)
class _Moments:
    """Size, centroid and shape of pieces 1 … n, from sums of whole numbers: exact in any block."""

    pixels: npt.NDArray[np.int64]  # flat, those of pieces, in reading order
    piece: npt.NDArray[np.int64]  # of each of them, from 0
    n_px: npt.NDArray[np.int64]
    x_px: npt.NDArray[np.float64]
    y_px: npt.NDArray[np.float64]
    eccentricity: npt.NDArray[np.float64]

    @classmethod
    def of(cls, pieces: Labels, origin_px: tuple[int, int]) -> _Moments:
        pixels = np.flatnonzero(pieces)
        piece = pieces.reshape(-1)[pixels].astype(np.int64) - 1
        y, x = np.divmod(pixels, pieces.shape[1])
        n = np.bincount(piece)

        def total(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            # Whole numbers below 2 ** 53 are exact as floats, in which bincount adds.
            return np.bincount(piece, weights=values).astype(np.int64)

        sx, sy = total(x), total(y)
        # n^2 times the second central moments.
        xx, yy, xy = (n * total(a * b) - sa * sb for a, b, sa, sb in
                      ((x, x, sx, sx), (y, y, sy, sy), (x, y, sx, sy)))  # fmt: skip
        # A pixel is a square: 1 / 12 more along each axis.
        a, b = xx / n**2 + 1 / 12, yy / n**2 + 1 / 12
        spread = np.sqrt((a - b) ** 2 + 4 * (xy / n**2) ** 2)
        return cls(
            pixels=pixels,
            piece=piece,
            n_px=n,
            x_px=(sx + n * origin_px[0]) / n + 0.5,
            y_px=(sy + n * origin_px[1]) / n + 0.5,
            eccentricity=np.sqrt(2 * spread / (a + b + spread)),
        )

    def mean(self, image_YX: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Mean of an image over each piece, added up in reading order."""
        values = image_YX.reshape(-1)[self.pixels]
        mean: npt.NDArray[np.float64] = np.bincount(self.piece, weights=values) / self.n_px
        return mean
