"""The grid of a slide that patches are cut from: resampled once, in small tiles of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt

from pairing.geometry import Box, Points
from pairing.slide import Slide
from pairing.slide_damage import HOLE_REACH_PX
from pairing.slide_image import FILTER_REACH, resampled
from pairing.slide_sources import Pixels
from pairing.slide_tiles import TilesOnce
from shards.schema import PatchSpec

# Side of a tile of the grid. Larger ones cost less each, smaller ones waste less where patches
# are few; a patch has 224 px.
GRID_TILE_PX = 128
# So many rows of tiles are made before the patches that end in them are cut and measured: what is
# measured of the rows above them, which are held for their sake, is measured twice.
_BAND_TILES = 4

# Tiles as one number: of up to so many in a row, some of which lie left of the slide.
_KEY_ROW, _KEY_ZERO = 2**32, 2**31

Corners = npt.NDArray[np.int64]
Rgb = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """Pixels of a patch's size, anchored at the slide's origin, of which patches are whole ones.

    Pixel (i, j) of the grid covers [i, i + 1) x [j, j + 1) times `step` level-0 pixels of the
    slide. A patch is `size_px` of them squared, and known by its upper left one, its corner.
    """

    step: float
    size_px: int

    @classmethod
    def of(cls, slide: Slide, spec: PatchSpec) -> PatchGrid:
        step = spec.mpp / slide.mpp
        return cls(1.0 if abs(step - 1) < 1e-9 else step, spec.size_px)

    def corners(self, centres_px: Points) -> Corners:
        """(n, 2) corners of the patches whose middles lie nearest to points of the slide.

        In x and in y they are at most half a pixel of the grid away.
        """
        return np.floor(centres_px / self.step - self.size_px / 2 + 0.5).astype(np.int64)

    @property
    def reach_px(self) -> float:
        """How many pixels of the slide the filter sees beyond a pixel of the grid."""
        return 0.0 if self.step == 1 else FILTER_REACH * max(1.0, self.step)

    def fields(self, corners: Corners) -> npt.NDArray[np.float64]:
        """(n, 4) boxes of the patches, in pixels of the slide."""
        return np.concatenate([corners, corners + self.size_px], axis=1) * self.step

    def seen(self, corners: Corners) -> npt.NDArray[np.int64]:
        """(n, 4) boxes of the slide's pixels that enter the patches."""
        fields = self.fields(corners)
        low = np.floor(fields[:, :2] - self.reach_px)
        high = np.ceil(fields[:, 2:] + self.reach_px)
        return np.concatenate([low, high], axis=1).astype(np.int64)

    def footprints(self, slide: Slide, corners: Corners) -> npt.NDArray[np.int64]:
        """(n, 4) first column and row, last column and row of the tiles that patches need.

        Those that they see, and those that tell whether what they see is a hole.
        """
        # A pixel more than the filter's reach: its ends are of 32 bits.
        around = HOLE_REACH_PX + 1 if slide.is_rgb else 1
        seen = self.seen(corners).reshape(-1, 2, 2) + np.array([[-around], [around - 1]])
        tiles = seen.clip(0, np.array(slide.size_px) - 1) // slide.tile_px
        ranges: npt.NDArray[np.int64] = tiles.reshape(-1, 4)
        return ranges

    def source_box(self, box: Box) -> Box:
        """The slide's pixels that enter a box of the grid."""
        low = (math.floor(v * self.step - self.reach_px) for v in box[:2])
        high = (math.ceil(v * self.step + self.reach_px) for v in box[2:])
        return (*low, *high)  # type: ignore[return-value]  # two and two

    def rows_held(self) -> int:
        """About how many rows of the slide one row of the grid's tiles is made of."""
        return math.ceil(GRID_TILE_PX * self.step + 2 * (self.reach_px + HOLE_REACH_PX))


@dataclass(frozen=True, slots=True, eq=False)
class GridRows:
    """Rows of the grid in which the patches of these `numbers` lie as a whole.

    `picture` is (Y, X, 3), to be read before the next rows are asked for; `corners_px` (n, 2) are
    the patches' corners in it, `origin_px` is its own in the grid.
    """

    numbers: list[int]
    picture: Rgb
    corners_px: Corners
    origin_px: tuple[int, int]

    def patches(self, size_px: int) -> Iterator[Rgb]:
        """(size_px, size_px, 3) pixels of each, in the order of `numbers`."""
        for x, y in self.corners_px.tolist():
            yield np.ascontiguousarray(self.picture[y : y + size_px, x : x + size_px])


def rows_of_grid(
    slide: Slide,
    tiles: TilesOnce,
    grid: PatchGrid,
    corners: Corners,
    grey_scale: tuple[float, float] | None,
) -> Iterator[GridRows]:
    """All patches, from the top of the slide down.

    The grid is made tile by tile, each from a box of the slide that follows from the tile's place
    alone: the pixels of a patch do not depend on what else is cut. Rows of the grid are held as
    long as a patch below needs them, and `tiles` of the slide as long as the grid does.
    """
    first = corners // GRID_TILE_PX
    last = (corners + grid.size_px - 1) // GRID_TILE_PX
    left = int(first[:, 0].min())
    n_rows = grid.size_px + _BAND_TILES * GRID_TILE_PX
    held = np.zeros((n_rows, (int(last[:, 0].max()) + 1 - left) * GRID_TILE_PX, 3), np.uint8)
    # From left to right: what patches share is then still in the processor's cache.
    order = np.lexsort((corners[:, 1], corners[:, 0], last[:, 1]))
    whole_at = last[order, 1]
    rows = columns_by_row(np.concatenate([first, last], axis=1))
    above = None
    for band, in_band in groupby(sorted(rows), key=lambda row: row // _BAND_TILES):
        bottom = (band + 1) * _BAND_TILES * GRID_TILE_PX
        origin = (left * GRID_TILE_PX, bottom - n_rows)
        moved = n_rows if above is None else min(bottom - above, n_rows)
        held[: n_rows - moved] = held[moved:]
        above = bottom
        for row in in_band:
            top = row * GRID_TILE_PX
            seen_from = math.floor(top * grid.step - grid.reach_px)
            tiles.drop_above(seen_from - HOLE_REACH_PX)
            for start, stop in runs_of(rows[row]):
                run = (start * GRID_TILE_PX, top, stop * GRID_TILE_PX, top + GRID_TILE_PX)
                x, y = run[0] - origin[0], top - origin[1]
                held[y : y + GRID_TILE_PX, x : x + run[2] - run[0]] = _resampled_run(
                    slide, grid, run, grey_scale
                )
        whole = np.searchsorted(whole_at, (band * _BAND_TILES, (band + 1) * _BAND_TILES))
        numbers = order[slice(*whole)]
        if len(numbers):
            yield GridRows(numbers.tolist(), held, corners[numbers] - np.array(origin), origin)


def _resampled_run(
    slide: Slide, grid: PatchGrid, run: Box, grey_scale: tuple[float, float] | None
) -> Rgb:
    """Tiles of the grid that lie side by side: read as one, resampled one by one."""
    source = grid.source_box(run)
    pixels = as_rgb(slide.read(source), grey_scale)
    if grid.step == 1:
        return pixels
    out = np.empty((run[3] - run[1], run[2] - run[0], 3), np.uint8)
    size = (GRID_TILE_PX, GRID_TILE_PX)
    for x in range(0, run[2] - run[0], GRID_TILE_PX):
        tile = (run[0] + x, run[1], run[0] + x + GRID_TILE_PX, run[3])
        own = grid.source_box(tile)
        left, top, right, bottom = (v * grid.step - own[i % 2] for i, v in enumerate(tile))
        near = pixels[:, own[0] - source[0] : own[2] - source[0]]
        out[:, x : x + GRID_TILE_PX] = resampled(near, size, (left, top, right, bottom))
    return out


def columns_by_row(ranges: npt.NDArray[np.int64]) -> dict[int, npt.NDArray[np.int64]]:
    """Of (n, 4) first and last tiles: the columns that any of them holds, ascending, by row."""
    row, column = np.divmod(np.unique(tile_keys(ranges)), _KEY_ROW)
    starts = np.flatnonzero(np.diff(row, prepend=row[0] - 1)).tolist()
    return {int(row[a]): column[a:b] - _KEY_ZERO for a, b in pairwise([*starts, len(row)])}


def tile_keys(ranges: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Of (n, 4) first and last tiles: a number for every tile of every range, by row and column."""
    _, column, row = expanded(ranges)
    return row * _KEY_ROW + column + _KEY_ZERO


def expanded(
    ranges: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Every tile of every range: number of the range, column and row of the tile."""
    n_across, n_down = (ranges[:, 2:] - ranges[:, :2] + 1).T
    n = n_across * n_down
    number = np.repeat(np.arange(len(ranges)), n)
    place = np.arange(len(number)) - np.repeat(np.cumsum(n) - n, n)
    down, across = np.divmod(place, n_across[number])
    return number, ranges[number, 0] + across, ranges[number, 1] + down


def runs_of(columns: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Half-open runs of whole numbers that follow each other."""
    breaks = np.flatnonzero(np.diff(columns) > 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(columns, breaks)]


def as_rgb(pixels: Pixels, grey_scale: tuple[float, float] | None) -> npt.NDArray[np.uint8]:
    """(Y, X, 3) for the eye: RGB as it is, DAPI (Y, X, 1) with `grey_scale` from 0 to 255."""
    if grey_scale is None:
        return np.ascontiguousarray(pixels, dtype=np.uint8)
    low, high = grey_scale
    scaled = ((pixels[..., :1].astype(np.float32) - low) / (high - low) * 255).round()
    return np.repeat(scaled.clip(0, 255).astype(np.uint8), 3, axis=2)
