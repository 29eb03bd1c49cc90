"""An open slide: regions of it by level or by mpp, its glass, and reading on over damage."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pairing.geometry import Box, Points
from pairing.slide_damage import Damage, read_over_damage
from pairing.slide_levels import Level, regular_levels
from pairing.slide_sources import Pixels, Source
from pairing.slide_tiles import TilesOnce
from shards.errors import BadInput

# Pillow's cubic (a = -0.5) reaches two pixels of the coarser of the two grids to each side.
_FILTER, FILTER_REACH = Image.Resampling.BICUBIC, 2
# `read_at` holds no more source pixels than this at once (50 MB of RGB).
_MAX_SOURCE_PX = 4096 * 4096
# Glass: no channel absorbs more than this optical density (about 203 of 255).
_GLASS_OD = 0.1
_GLASS_MIN_SHARE = 0.01
_GLASS_SAMPLE_PX = 2048


class Slide:
    """Pixels of an open slide.

    `mpp` µm per level-0 pixel; `size_px` (width, height) of level 0; `tile_px` native tile of
    level 0; `levels` finest first; `notes` what a person should know of the file, such as levels
    of its pyramid that are none and were left out. `fill` may be set; else it is the `background`
    for RGB and 0 for anything else.
    """

    def __init__(
        self,
        path: Path,
        mpp: float,
        sources: Sequence[Source],
        *,
        fill: int | None = None,
        find_foreign: Callable[[], dict[int, str]] = dict,
    ) -> None:
        self.path = path
        self.mpp = mpp
        self._level_0: Source = sources[0]
        self._others = tuple(sources[1:])
        self._find_foreign = find_foreign
        self._fill = fill
        self._damage: list[Damage] | None = None
        self._is_hidden: Callable[[Points], npt.NDArray[np.bool_]] | None = None
        self.size_px = sources[0].size_px
        self.tile_px = sources[0].tile_px
        self.dtype = sources[0].dtype
        self.n_channels = sources[0].n_channels

    @cached_property
    def _pyramid(self) -> tuple[tuple[Source, ...], tuple[Level, ...], tuple[str, ...]]:
        """Sources of the levels below 0, all levels, and notes on those that were left out.

        Looked at when they are first asked for: telling whether levels show the same decodes tiles
        of all of them, which nobody waits for who reads level 0 alone.
        """
        kept, levels, notes = regular_levels([s.size_px for s in (self._level_0, *self._others)])
        foreign = self._find_foreign() if self._others else {}
        own = [(i, level) for i, level in zip(kept, levels, strict=True) if i not in foreign]
        return (
            tuple(self._others[i - 1] for i, _ in own[1:]),
            tuple(level for _, level in own),
            (*notes, *foreign.values()),
        )

    @property
    def levels(self) -> tuple[Level, ...]:
        return self._pyramid[1]

    @property
    def notes(self) -> tuple[str, ...]:
        return self._pyramid[2]

    def _source(self, level: int) -> Source:
        return self._level_0 if level == 0 else self._pyramid[0][level - 1]

    @property
    def is_rgb(self) -> bool:
        return self.n_channels == 3 and self.dtype == np.uint8

    def require_rgb(self) -> None:
        """Raises BadInput where the slide can be no H&E."""
        if not self.is_rgb:
            raise BadInput(
                self.path,
                expected="a H&E: a slide of three channels, red, green and blue",
                found=f"{self.n_channels} channel{'s' if self.n_channels > 1 else ''} of "
                f"{self.dtype}",
                remedy="give the H&E of the section; of the bundle's own DAPI image patches are "
                'made by image = "morphology" instead of slide',
            )

    @cached_property
    def fill(self) -> npt.NDArray[Any]:
        """(C,) value of what lies outside the slide."""
        if self._fill is not None or not self.is_rgb:
            return np.full(self.n_channels, self._fill or 0, self.dtype)
        return self.background

    @cached_property
    def background(self) -> npt.NDArray[np.uint8]:
        """(3,) median RGB of the glass of an H&E slide; white where it shows none.

        Glass is where every channel's optical density, -log10((v + 1) / 256), is below 0.1, and
        at least 1 % of what is looked at: the whole lowest level, or an 8 x 8 grid of windows
        where that level is larger than 2048 px.
        """
        source = self._source(len(self.levels) - 1)
        width, height = source.size_px
        if max(width, height) <= _GLASS_SAMPLE_PX:
            windows = [(0, 0, width, height)]
        else:
            side = _GLASS_SAMPLE_PX // 8
            windows = [
                (x, y, min(x + side, width), min(y + side, height))
                for y in np.linspace(0, max(height - side, 0), 8).astype(int).tolist()
                for x in np.linspace(0, max(width - side, 0), 8).astype(int).tolist()
            ]
        # Damaged tiles come out black, which is no glass.
        sample = np.concatenate([source.read_inside(w, []).reshape(-1, 3) for w in windows])
        glass = sample[sample.min(axis=1) + 1.0 > 256 * 10**-_GLASS_OD]
        if len(glass) < _GLASS_MIN_SHARE * len(sample):
            return np.full(3, 255, np.uint8)
        background: npt.NDArray[np.uint8] = np.median(glass, axis=0).astype(np.uint8)
        return background

    def read(self, box: Box, level: int = 0) -> Pixels:
        """(Y, X, C) of a half-open box in the pixels of `level`, `fill` where it reaches outside.

        Raises DamagedTile where a tile that the box touches does not decode, but see `tolerant`.
        """
        x0, y0, x1, y1 = box
        if x1 <= x0 or y1 <= y0:
            raise ValueError(f"an empty box: {box}")
        width, height = self._source(level).size_px
        inside = (max(x0, 0), max(y0, 0), min(x1, width), min(y1, height))
        if inside == box:
            return self._read_inside(box, level)
        out = np.empty((y1 - y0, x1 - x0, self.n_channels), self.dtype)
        a0, b0, a1, b1 = inside
        if a0 >= a1 or b0 >= b1:
            out[:] = self.fill
            return out
        down, across = slice(b0 - y0, b1 - y0), slice(a0 - x0, a1 - x0)
        out[: down.start] = out[down.stop :] = self.fill
        out[down, : across.start] = out[down, across.stop :] = self.fill
        out[down, across] = self._read_inside(inside, level)
        return out

    def _read_inside(self, box: Box, level: int) -> Pixels:
        source = self._source(level)
        if self._damage is None:
            return source.read_inside(box)
        pixels, damaged, found = read_over_damage(source, box, holes=self.is_rgb)
        if found:
            pixels[damaged] = self.fill
            downsample = 1.0 if level == 0 else self.levels[level].downsample
            self._damage += [d.scaled(downsample) for d in found]
        return pixels

    def tolerant(self) -> tuple[Slide, list[Damage]]:
        """The same slide for those who must go on over damage, and a list of what they met.

        What does not decode, and black holes of a H&E, are read as `fill`; each is added to the
        list, in level-0 pixels, every time that it is met.
        """
        slide = copy(self)
        slide._damage = []
        return slide, slide._damage

    def decoding_once(
        self, tiles: Collection[tuple[int, int]], fill: npt.NDArray[Any]
    ) -> tuple[Slide, TilesOnce]:
        """The same slide for those who read level 0 from top to bottom, and what holds its tiles.

        Of level 0 `tiles` (column, row) are decoded, each once. `fill` is the slide's own, which
        is not looked for again.
        """
        once = TilesOnce(self._level_0, tiles)
        slide = copy(self)
        slide._level_0 = once
        slide.fill = fill
        return slide, once

    def without(self, is_hidden: Callable[[Points], npt.NDArray[np.bool_]]) -> Slide:
        """The same slide for those who may not see all of it.

        Pixels of `read_at` are the slide's fill where their middle, among (n, 2) in level-0
        pixels, `is_hidden`. What is read by level is not hidden.
        """
        slide = copy(self)
        slide._is_hidden = is_hidden
        return slide

    def find_damage(self, centres_px: Points) -> list[Damage]:
        """Damage that the file's own table of tiles tells, without decoding the slide.

        Tiles of level 0 whose bytes stand there twice although they show something, and tiles
        that the file leaves out where one of `centres_px`, (n, 2) in level-0 pixels, lies:
        without a cell on it, a tile that was left out is glass.
        """
        repeated = self._level_0.repeated_tiles()
        tiles = np.unique(np.floor(centres_px / self.tile_px).astype(np.int64), axis=0)
        with_cells = set(map(tuple, tiles.tolist()))
        missing = [
            box
            for box in self._level_0.empty_tiles()
            if (box[0] // self.tile_px[0], box[1] // self.tile_px[1]) in with_cells
        ]
        return [
            *(Damage(kind="duplicate", box=box) for box in repeated),
            *(Damage(kind="missing", box=box) for box in missing),
        ]

    def read_at(self, box: Box, mpp: float) -> Pixels:
        """(Y, X, C), of the slide's dtype, of a box in the pixels of a grid of `mpp`.

        The grid is anchored at the slide's origin: its pixel (i, j) covers [i, i + 1) x [j, j + 1)
        times `mpp` µm. Resampled once, by an antialiasing cubic from the coarsest level that is
        not coarser than `mpp`, with the filter's margin around the box, so that boxes that overlap
        agree (to two grey levels) where they do.
        """
        pixels = self._read_at(box, mpp)
        if self._is_hidden is None:
            return pixels
        x, y = (np.arange(box[i], box[i + 2]) + 0.5 for i in range(2))
        middles_px = np.stack(np.meshgrid(x, y), axis=-1) * (mpp / self.mpp)
        hidden = self._is_hidden(middles_px.reshape(-1, 2)).reshape(pixels.shape[:2])
        return np.where(hidden[:, :, None], self.fill, pixels)

    def _read_at(self, box: Box, mpp: float) -> Pixels:
        level = self._level_for(mpp)
        # Source pixels per output pixel.
        step = mpp / (self.mpp * self.levels[level].downsample)
        if abs(step - 1) < 1e-9:
            return self.read(box, level)
        x0, y0, x1, y1 = box
        margin = FILTER_REACH * max(step, 1.0)
        source = (
            math.floor(x0 * step - margin),
            math.floor(y0 * step - margin),
            math.ceil(x1 * step + margin),
            math.ceil(y1 * step + margin),
        )
        width, height = x1 - x0, y1 - y0
        n_source_px = (source[2] - source[0]) * (source[3] - source[1])
        if n_source_px > _MAX_SOURCE_PX and max(width, height) > 1:
            if width >= height:
                middle = x0 + width // 2
                halves = (x0, y0, middle, y1), (middle, y0, x1, y1)
            else:
                middle = y0 + height // 2
                halves = (x0, y0, x1, middle), (x0, middle, x1, y1)
            parts = [self._read_at(half, mpp) for half in halves]
            return np.concatenate(parts, axis=1 if width >= height else 0)
        part = (
            x0 * step - source[0],
            y0 * step - source[1],
            x1 * step - source[0],
            y1 * step - source[1],
        )
        return resampled(self.read(source, level), (width, height), part)

    def _level_for(self, mpp: float) -> int:
        if not mpp > 0:
            raise ValueError(f"mpp must be positive, not {mpp}")
        fitting = [
            i
            for i, level in enumerate(self.levels)
            if self.mpp * level.downsample <= mpp * 1.000001
        ]
        return fitting[-1] if fitting else 0


def resampled(
    pixels: Pixels, size: tuple[int, int], part: tuple[float, float, float, float]
) -> Pixels:
    """The float box `part` of (Y, X, C) pixels, resampled to `size`; 8-bit or any other dtype."""
    dtype = pixels.dtype
    if dtype == np.uint8 and pixels.shape[2] == 3:
        return np.array(Image.fromarray(pixels).resize(size, _FILTER, part))
    planes = [
        np.asarray(Image.fromarray(pixels[..., c].astype(np.float32)).resize(size, _FILTER, part))
        for c in range(pixels.shape[2])
    ]
    out = np.stack(planes, axis=-1)
    if not np.issubdtype(dtype, np.integer):
        return out.astype(dtype)
    # The cubic overshoots at edges; wrapping around would turn white into black.
    limits = np.iinfo(dtype)
    rounded: Pixels = np.rint(out).clip(limits.min, limits.max).astype(dtype)
    return rounded
