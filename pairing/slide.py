"""Open a whole-slide image; read regions by level or by mpp.

TIFF (OME-TIFF, plain tiled TIFF, SVS) goes through tifffile, other vendor formats through
OpenSlide, and PNG and JPEG pictures through Pillow. Of a file only its slide is read: label,
macro and thumbnail pictures never are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pairing.geometry import Box
from pairing.slide_sources import (
    ArrayLevel,
    DamagedTile,
    Level,
    OpenSlideLevel,
    Pixels,
    Source,
    levels_of,
    open_vendor,
    vendor_mpp,
)
from pairing.slide_tiff import open_tiff
from shards.errors import BadInput

__all__ = ["DamagedTile", "Level", "Slide", "open_plane", "open_slide"]

TIFF_SUFFIXES = {".tif", ".tiff", ".svs", ".btf", ".tf8"}
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg"}
# Pillow's cubic (a = -0.5) reaches two pixels of the coarser of the two grids to each side.
_FILTER, _FILTER_REACH = Image.Resampling.BICUBIC, 2
# `read_at` holds no more source pixels than this at once (50 MB of RGB).
_MAX_SOURCE_PX = 4096 * 4096
# Glass: no channel absorbs more than this optical density (about 203 of 255).
_GLASS_OD = 0.1
_GLASS_MIN_SHARE = 0.01
_GLASS_SAMPLE_PX = 2048


class Slide:
    """Pixels of an open slide.

    `mpp` µm per level-0 pixel; `size_px` (width, height) of level 0; `tile_px` native tile of
    level 0; `levels` finest first. `fill` may be set; else it is the `background` for RGB and 0
    for anything else.
    """

    def __init__(
        self, path: Path, mpp: float, sources: Sequence[Source], *, fill: int | None = None
    ) -> None:
        self.path = path
        self.mpp = mpp
        self._sources = tuple(sources)
        self._fill = fill
        self.levels = levels_of(path, [s.size_px for s in sources])
        self.size_px = self.levels[0].size_px
        self.tile_px = sources[0].tile_px
        self.dtype = sources[0].dtype
        # The fourth channel of 8-bit pictures is alpha; four stains come as 16 bits.
        self._alpha = sources[0].n_channels == 4 and self.dtype == np.uint8
        self.n_channels = 3 if self._alpha else sources[0].n_channels

    @property
    def is_rgb(self) -> bool:
        return self.n_channels == 3 and self.dtype == np.uint8

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
        width, height = self.levels[-1].size_px
        if max(width, height) <= _GLASS_SAMPLE_PX:
            sample = self.read((0, 0, width, height), len(self.levels) - 1).reshape(-1, 3)
        else:
            side = _GLASS_SAMPLE_PX // 8
            windows = [
                (x, y, min(x + side, width), min(y + side, height))
                for y in np.linspace(0, max(height - side, 0), 8).astype(int).tolist()
                for x in np.linspace(0, max(width - side, 0), 8).astype(int).tolist()
            ]
            parts = [self.read(window, len(self.levels) - 1) for window in windows]
            sample = np.concatenate([part.reshape(-1, 3) for part in parts])
        glass = sample[sample.min(axis=1) + 1.0 > 256 * 10**-_GLASS_OD]
        if len(glass) < _GLASS_MIN_SHARE * len(sample):
            return np.full(3, 255, np.uint8)
        background: npt.NDArray[np.uint8] = np.median(glass, axis=0).astype(np.uint8)
        return background

    def read(self, box: Box, level: int = 0) -> Pixels:
        """(Y, X, C) of a half-open box in the pixels of `level`, `fill` where it reaches outside.

        Raises DamagedTile where a tile that the box touches does not decode.
        """
        x0, y0, x1, y1 = box
        if x1 <= x0 or y1 <= y0:
            raise ValueError(f"an empty box: {box}")
        width, height = self.levels[level].size_px
        inside = (max(x0, 0), max(y0, 0), min(x1, width), min(y1, height))
        if inside == box:
            return self._read_inside(box, level)
        out = np.empty((y1 - y0, x1 - x0, self.n_channels), self.dtype)
        out[:] = self.fill
        a0, b0, a1, b1 = inside
        if a0 < a1 and b0 < b1:
            out[b0 - y0 : b1 - y0, a0 - x0 : a1 - x0] = self._read_inside(inside, level)
        return out

    def _read_inside(self, box: Box, level: int) -> Pixels:
        pixels = self._sources[level].read_inside(box)
        return pixels[..., :3] if self._alpha else pixels

    def read_at(self, box: Box, mpp: float) -> Pixels:
        """(Y, X, C), of the slide's dtype, of a box in the pixels of a grid of `mpp`.

        The grid is anchored at the slide's origin: its pixel (i, j) covers [i, i + 1) x [j, j + 1)
        times `mpp` µm. Resampled once, by an antialiasing cubic from the coarsest level that is
        not coarser than `mpp`, with the filter's margin around the box, so that boxes that overlap
        agree (to one grey level) where they do.
        """
        level = self._level_for(mpp)
        # Source pixels per output pixel.
        step = mpp / (self.mpp * self.levels[level].downsample)
        if abs(step - 1) < 1e-9:
            return self.read(box, level)
        x0, y0, x1, y1 = box
        margin = _FILTER_REACH * max(step, 1.0)
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
            parts = [self.read_at(half, mpp) for half in halves]
            return np.concatenate(parts, axis=1 if width >= height else 0)
        part = (
            x0 * step - source[0],
            y0 * step - source[1],
            x1 * step - source[0],
            y1 * step - source[1],
        )
        return _resampled(self.read(source, level), (width, height), part)

    def _level_for(self, mpp: float) -> int:
        if not mpp > 0:
            raise ValueError(f"mpp must be positive, not {mpp}")
        fitting = [
            i
            for i, level in enumerate(self.levels)
            if self.mpp * level.downsample <= mpp * 1.000001
        ]
        return fitting[-1] if fitting else 0


def _resampled(
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


@contextmanager
def open_slide(path: Path, *, mpp: float | None = None) -> Iterator[Slide]:
    """Open a slide for reading.

    `mpp` overrules knowingly what the file says about its pixel size. Raises BadInput where the
    file is missing, unreadable, not one slide, or says no usable pixel size and none is given.
    """
    path = Path(path)
    _check_exists(path)
    with ExitStack() as stack:
        suffix = path.suffix.lower()
        sources: Sequence[Source] | None = None
        found: float | None = None
        if suffix in TIFF_SUFFIXES:
            tiff = stack.enter_context(open_tiff(path, want_mpp=mpp is None))
            if tiff is not None:
                sources, found = tiff
        elif suffix in PICTURE_SUFFIXES:
            with Image.open(path) as picture:
                sources = [ArrayLevel(np.asarray(picture.convert("RGB")))]
        if sources is None:
            vendor = stack.enter_context(open_vendor(path))
            sources = [OpenSlideLevel(path, i, vendor) for i in range(vendor.level_count)]
            if mpp is None:
                found = vendor_mpp(path, vendor)
        yield Slide(path, _checked_mpp(path, mpp, found), sources)


@contextmanager
def open_plane(path: Path, *, mpp: float) -> Iterator[Slide]:
    """The one plane of a TIFF with its own pyramid, whatever its OME description says.

    For images that are spread over several files, each of which describes them all: read as OME,
    they have the channels but not the pyramid. Filled with 0 outside.
    """
    path = Path(path)
    _check_exists(path)
    with open_tiff(path, want_mpp=False, first_plane=True) as tiff:
        if tiff is None or tiff[0][0].n_channels != 1:
            raise BadInput(
                path,
                expected="a TIFF of one plane",
                found="a vendor's slide format" if tiff is None else "several planes",
                remedy="give the file that the instrument wrote",
            )
        yield Slide(path, mpp, tiff[0], fill=0)


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise BadInput(
            path,
            expected="a slide: one file",
            found="a folder" if path.is_dir() else "nothing",
            remedy="check the path; formats of many files are opened by their main file",
        )


def _checked_mpp(path: Path, given: float | None, found: float | None) -> float:
    if given is not None and not (math.isfinite(given) and given > 0):
        raise BadInput(
            f"mpp for {path}",
            expected="a positive number of µm per pixel",
            found=str(given),
            remedy="look the pixel size up in the scanner's records",
        )
    mpp = given if given is not None else found
    if mpp is None:
        raise BadInput(
            path,
            expected="a pixel size in the file",
            found="none that is usable",
            remedy="give it in µm per level-0 pixel: `mpp = …` of the run in the config, or --mpp",
        )
    return mpp
