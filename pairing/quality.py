"""How good a patch is to look at: sharpness, ink, darkness, tissue; measured, judged elsewhere.

Scores are functions of a patch's pixels at fixed physical scales, so that they mean the same
whatever the slide's pixel size. What they are, where their constants are from and what they can't
tell is in docs/quality.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Rgb = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

# Sharpness compares differences over this distance with those over SPAN times it. Chromatin and
# the rims of nuclei change within a micron; out of focus nothing does.
FINE_UM: Final = 1.0
SPAN: Final = 4
_GREY_CELL_UM: Final = 0.5
# A mean square difference in grey levels of 8 bits, some twenty times what a scanner's noise
# leaves: it keeps noise on tissue without contrast from passing for detail.
_NOISE_GREY2: Final = 20.0
# Larger pixels can't show a difference over FINE_UM.
_COARSEST_UM: Final = 1.25

# Ink and darkness are told from mean colours of squares this large.
_COLOUR_CELL_UM: Final = 2.0
# A square is tissue from this sum of optical densities on: glass of any tint stays below 0.2.
_TISSUE_OD: Final = 0.25
# With less tissue than this of its squares a patch has nothing to be sharp.
_LEAST_TISSUE: Final = 0.05
# Optical densities beyond what haematoxylin and eosin can make together: see `_is_ink`.
_INK_OD: Final = 0.1
_INK_RED_TO_BLUE: Final = 0.6
# Darkness is that of the darkest tenth, of means over squares of so many colour squares a side:
# as large as a nucleus.
_DARK_SHARE: Final = 0.1
_DARK_SIDE: Final = 4
# The cell itself: about the size of a nucleus.
_CENTRE_UM: Final = 8.0


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of n patches, each (n,) float32 and NaN where it can't be told.

    `sharpness`: 0 where the picture is smooth at a micron, 1 for clean edges, 2 for noise; NaN
    without tissue, and where pixels are too large. `pen_share`: of the patch, under ink in a
    colour that no H&E has. `dark_od`: the optical density of blue that the darkest tenth of the
    patch exceeds; it tells how thick the tissue is, since nuclei hardly absorb blue.
    `centre_tissue`: of the 8 µm in the middle of the patch, the share that shows tissue.
    """

    sharpness: F32
    pen_share: F32
    dark_od: F32
    centre_tissue: F32


# The columns of the patches' index, in the order of `Scores`.
SCORES: Final = ("sharpness", "pen_share", "dark_od", "centre_tissue")


def measure(
    picture: Rgb,
    mpp: float,
    corners_px: npt.ArrayLike,
    size_px: int,
    origin_px: tuple[int, int] = (0, 0),
) -> Scores:
    """Scores of the square patches of `size_px` that lie in one picture.

    `picture` is (Y, X, 3) at `mpp` µm a pixel, `corners_px` (n, 2) whole numbers: x and y of the
    patches' upper left corners in it. `origin_px` says where the picture's own corner lies in a
    larger one: the scores of a patch are then the same whatever part of that is at hand. All is
    measured once a picture and summed over boxes, so that overlapping patches cost little.
    """
    corners = np.asarray(corners_px, np.int64).reshape(-1, 2)
    colours = _Cells.of(picture, mpp, _COLOUR_CELL_UM, origin_px)
    density = _optical_density(colours.values)
    boxes = colours.boxes(corners, size_px)
    is_tissue = density.sum(axis=2) > _TISSUE_OD
    sharpness = _sharpness(picture, mpp, corners, size_px, origin_px)
    sharpness[~(_share(is_tissue, boxes) >= _LEAST_TISSUE)] = np.nan
    centre_px = min(size_px, round(_CENTRE_UM / mpp))
    middle = colours.boxes(corners + (size_px - centre_px) // 2, centre_px)
    return Scores(
        sharpness=sharpness,
        pen_share=_share(_is_ink(density), boxes),
        dark_od=_dark_od(density[..., 2], boxes, size_px, colours.side_px),
        centre_tissue=_share(is_tissue, middle),
    )


@dataclass(frozen=True, slots=True)
class _Cells:
    """Means of squares of a picture, whole ones alone, at multiples of their side in the larger."""

    values: npt.NDArray[np.uint8]
    side_px: int
    first_px: I64  # x and y of the first square in the picture

    @classmethod
    def of(cls, picture: Rgb, mpp: float, side_um: float, origin_px: tuple[int, int]) -> _Cells:
        side = max(1, round(side_um / mpp))
        first = -np.asarray(origin_px, np.int64) % side
        x, y = first.tolist()
        rows, columns = max(0, picture.shape[0] - y) // side, max(0, picture.shape[1] - x) // side
        if not rows or not columns:
            return cls(np.zeros((rows, columns, *picture.shape[2:]), np.uint8), side, first)
        whole = picture[y : y + rows * side, x : x + columns * side]
        if side > 1:
            whole = np.asarray(
                cv2.resize(whole, (columns, rows), interpolation=cv2.INTER_AREA), np.uint8
            )
        return cls(whole, side, first)

    def boxes(self, corners_px: I64, size_px: int) -> I64:
        """(n, 4) half-open boxes, in squares, of those that lie in each patch as a whole."""
        low = -(-(corners_px - self.first_px) // self.side_px)
        high = (corners_px + size_px - self.first_px) // self.side_px
        return np.concatenate([low, np.maximum(high, low)], axis=1)


def _sharpness(
    picture: Rgb, mpp: float, corners_px: I64, size_px: int, origin_px: tuple[int, int]
) -> F32:
    """How fast differences grow with distance, of one micron and of four.

    Where a picture is smooth the mean square difference grows with the square of the distance,
    across edges with the distance itself, and in noise not at all: 2 less that exponent. A ratio
    of two of them knows neither contrast nor scale.
    """
    grey = _Cells.of(
        np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), np.uint8),
        mpp,
        _GREY_CELL_UM,
        origin_px,
    )
    cell_um = grey.side_px * mpp
    if cell_um > _COARSEST_UM:
        return np.full(len(corners_px), np.nan, np.float32)
    near = max(1, round(FINE_UM / cell_um))
    boxes = grey.boxes(corners_px, size_px)
    fine, coarse = (_mean_square_difference(grey.values, lag, boxes) for lag in (near, SPAN * near))
    exponent = np.log((coarse + _NOISE_GREY2) / (fine + _NOISE_GREY2 / SPAN**2)) / np.log(SPAN)
    return np.asarray(2 - exponent, np.float32)


def _mean_square_difference(grey: Rgb, lag: int, boxes: I64) -> npt.NDArray[np.float64]:
    """(n,) over all pairs of squares of a box that lie `lag` apart along either axis."""
    height, width = grey.shape[0] - lag, grey.shape[1] - lag
    if height <= 0 or width <= 0:
        return np.full(len(boxes), np.nan)
    squares = np.zeros((height, width), np.float32)
    here = grey[:height, :width]
    for there in (grey[:height, lag:], grey[lag:, :width]):
        cv2.accumulateSquare(cv2.absdiff(here, there), squares)
    inner = boxes - np.array([0, 0, lag, lag])
    return _sums(cv2.integral(squares, sdepth=cv2.CV_64F), inner) / 2


def _optical_density(rgb: Rgb) -> F32:
    return np.asarray(_OD_OF[rgb], np.float32)


_OD_OF: Final = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)


def _is_ink(density: F32) -> Mask:
    """Squares (Y, X) in a colour that no mixture of haematoxylin and eosin has.

    Both absorb green most, haematoxylin red nearly as much, and neither blue. Blue, cyan and green
    ink absorb more red than green; black and green ink more red and blue together than stains do.
    Of what has more blue, brown pigments lack the red.
    """
    red, green, blue = (density[..., c] for c in range(3))
    greyer = (0.5 * red + blue - green > _INK_OD) & (red > _INK_RED_TO_BLUE * blue)
    return np.asarray((red - green > _INK_OD) | greyer, bool)


def _share(mask: Mask, boxes: I64) -> F32:
    """(n,) mean of a mask over each box."""
    return np.asarray(_sums(cv2.integral(mask.astype(np.uint8)), boxes), np.float32)


def _dark_od(blue: F32, boxes: I64, size_px: int, side_px: int) -> F32:
    """(n,) density of blue that _DARK_SHARE of a box exceeds, over squares of four by four."""
    # As many as lie in a patch wherever squares begin, so that all patches are ranked alike.
    n_whole = max(0, size_px - side_px + 1) // side_px
    if n_whole < _DARK_SIDE:
        return np.full(len(boxes), np.nan, np.float32)
    # Sums of two and two: not a running sum, whose last digit would tell where it began.
    total = blue
    for step in (1, 2):
        total = total[:-step] + total[step:]
        total = total[:, :-step] + total[:, step:]
    steps = np.arange(0, n_whole - _DARK_SIDE + 1, _DARK_SIDE // 2)
    x, y = (boxes[:, k, None] + steps for k in (0, 1))
    means = (total / _DARK_SIDE**2)[y[:, :, None], x[:, None, :]].reshape(len(boxes), -1)
    rank = int((1 - _DARK_SHARE) * (means.shape[1] - 1))
    return np.asarray(np.partition(means, rank, axis=1)[:, rank], np.float32)


def _sums(integral: npt.NDArray[np.generic], boxes: I64) -> npt.NDArray[np.float64]:
    """(n,) means over half-open boxes (x0, y0, x1, y1), NaN of empty ones, by an integral."""
    x0, y0, x1, y1 = boxes.T
    area = np.maximum(x1 - x0, 0) * np.maximum(y1 - y0, 0)
    there = area > 0
    means = np.full(len(boxes), np.nan)
    x0, y0, x1, y1 = boxes[there].T
    total = integral[y1, x1] - integral[y0, x1] - integral[y1, x0] + integral[y0, x0]
    means[there] = total / area[there]
    return means
