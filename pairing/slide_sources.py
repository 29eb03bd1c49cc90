"""Where the pixels of a slide come from: TIFF pages, OpenSlide, arrays; one level at a time.

A source serves boxes that lie inside its level, as (Y, X, C), and knows nothing of pixel sizes,
fills or resampling; those are `pairing.slide`'s.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import openslide
from PIL import Image
from tifffile import TiffPageSeries

from pairing.geometry import Box
from shards.errors import BadInput

Pixels = npt.NDArray[Any]

# What decoders raise on damaged data: imagecodecs and OpenSlide derive from RuntimeError and
# Exception respectively, TiffFileError from ValueError.
_DECODE_ERRORS = (
    RuntimeError,
    ValueError,
    OSError,
    zlib.error,
    struct.error,
    openslide.OpenSlideError,
)


class DamagedTile(BadInput):
    """A tile of a slide that does not decode: `path`, `level`, `box` in that level's pixels."""

    def __init__(self, path: Path, level: int, box: Box, reason: str) -> None:
        self.path, self.level, self.box, self.reason = path, level, box, reason
        super().__init__(
            path,
            expected=f"a tile that decodes at level {level}, box {box}",
            found=reason,
            remedy="copy or export the slide again; the tile is damaged in the file itself",
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (DamagedTile, (self.path, self.level, self.box, self.reason))


class Source(Protocol):
    """One level of a slide: size and native tile in px, and boxes of it as (Y, X, C)."""

    @property
    def size_px(self) -> tuple[int, int]: ...
    @property
    def tile_px(self) -> tuple[int, int]: ...
    @property
    def n_channels(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def read_inside(self, box: Box) -> Pixels: ...


@dataclass(frozen=True, slots=True)
class Level:
    """A level of the pyramid: its size, and how many level-0 pixels one of its pixels spans."""

    size_px: tuple[int, int]
    downsample: float


def levels_of(path: Path, sizes: list[tuple[int, int]]) -> tuple[Level, ...]:
    """Levels of these sizes, with the downsample that their size stands for.

    Writers round odd sizes up or down at every step (5789 -> 2894 -> 1447 -> 723), so the ratio of
    sizes is only near the factor by which pixels were merged; taken as it is, it would shift the
    far edge by a pixel. A power of two that explains both sizes to a pixel is preferred, then the
    nearest integer, then the ratio itself where both axes agree on it.
    """
    width, height = sizes[0]
    levels = [Level(sizes[0], 1.0)]
    for w, h in sizes[1:]:
        ratio = width / w if width >= height else height / h
        candidates = (2.0 ** round(math.log2(ratio)), float(round(ratio)), ratio)
        fits = [r for r in candidates if abs(w - width / r) <= 1 and abs(h - height / r) <= 1]
        if not fits or fits[0] <= levels[-1].downsample:
            raise BadInput(
                f"{path}, level {len(levels)}",
                expected=f"{width} x {height} px by one factor, larger than the level's before",
                found=f"{w} x {h} px",
                remedy="export the slide again with a regular pyramid",
            )
        levels.append(Level((w, h), fits[0]))
    return tuple(levels)


class TiffLevel:
    """A level of a TIFF series; decodes the tiles or strips that a box touches, no others.

    Channels are the pages of the level times the samples of a page, contiguous or planar, so
    YXS, SYX and CYX come out alike. A tile that the file leaves out (no bytes) is `blank`.
    """

    def __init__(self, path: Path, level: int, series: TiffPageSeries, blank: int) -> None:
        key = series.keyframe
        self._path, self._level, self._key, self._blank = path, level, key, blank
        self._pages = list(series.pages)
        self._file = key.parent.filehandle
        self._planar = key.planarconfig == 2 and key.samplesperpixel > 1
        self.size_px = (key.imagewidth, key.imagelength)
        if key.is_tiled:
            self.tile_px = (key.tilewidth, key.tilelength)
        else:
            self.tile_px = (key.imagewidth, min(key.rowsperstrip, key.imagelength))
        self.n_channels = len(self._pages) * key.samplesperpixel
        self.dtype = np.dtype(key.dtype)

    def read_inside(self, box: Box) -> Pixels:
        x0, y0, x1, y1 = box
        out = np.empty((y1 - y0, x1 - x0, self.n_channels), self.dtype)
        tile_w, tile_h = self.tile_px
        across, down = (-(-s // t) for s, t in zip(self.size_px, self.tile_px, strict=True))
        planes = self._key.samplesperpixel if self._planar else 1
        for row in range(y0 // tile_h, -(-y1 // tile_h)):
            for column in range(x0 // tile_w, -(-x1 // tile_w)):
                left, top = column * tile_w, row * tile_h
                # The part of the tile that lies in the box, in the level's pixels.
                a0, b0 = max(x0, left), max(y0, top)
                a1 = min(x1, left + tile_w)
                b1 = min(y1, top + tile_h)
                for p, page in enumerate(self._pages):
                    for plane in range(planes):
                        index = (plane * down + row) * across + column
                        tile = self._decode(page, index, (left, top))
                        first = p * self._key.samplesperpixel + plane
                        target = out[b0 - y0 : b1 - y0, a0 - x0 : a1 - x0]
                        target[..., first : first + tile.shape[2]] = tile[
                            b0 - top : b1 - top, a0 - left : a1 - left
                        ]
        return out

    def _decode(self, page: Any, index: int, corner: tuple[int, int]) -> Pixels:
        """Tile `index` of a page as (Y, X, samples), of the tile's full size."""
        width, height = self.tile_px
        samples = 1 if self._planar else self._key.samplesperpixel
        offset, n_bytes = page.dataoffsets[index], page.databytecounts[index]
        if offset == 0 or n_bytes == 0:
            return np.full((height, width, samples), self._blank, self.dtype)
        x, y = corner
        box = (x, y, min(x + width, self.size_px[0]), min(y + height, self.size_px[1]))
        with self._file.lock:
            self._file.seek(offset)
            data = self._file.read(n_bytes)
        if len(data) != n_bytes:
            reason = f"the file ends after {len(data)} of the tile's {n_bytes} bytes"
            raise DamagedTile(self._path, self._level, box, reason)
        tables: dict[str, Any] = {}
        if page.jpegtables is not None:
            tables["jpegtables"] = page.jpegtables
        if self._key.jpegheader is not None:
            tables["jpegheader"] = self._key.jpegheader
        try:
            decoded = self._key.decode(data, index, _fullsize=True, **tables)[0]
        except _DECODE_ERRORS as error:
            reason = str(error)
        else:
            assert decoded is not None  # only segments without bytes decode to nothing
            tile: Pixels = decoded[0]
            return tile
        # Raised here and not above: codecs' errors don't pickle, and as its cause or context one
        # would keep this error from travelling back from a worker.
        raise DamagedTile(self._path, self._level, box, reason)


class OpenSlideLevel:
    """A level of a slide that OpenSlide reads; unscanned parts get the format's own background."""

    n_channels = 3
    dtype: np.dtype[Any] = np.dtype(np.uint8)

    def __init__(self, path: Path, level: int, slide: openslide.OpenSlide) -> None:
        self._path, self._level, self._slide = path, level, slide
        self.size_px = slide.level_dimensions[level]
        tile = [slide.properties.get(f"openslide.level[0].tile-{k}") for k in ("width", "height")]
        # Formats without a regular tile grid name none; 512 is then only a unit of work.
        self.tile_px = (int(tile[0] or 512), int(tile[1] or 512))
        colour = slide.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
        self._background = tuple(bytes.fromhex(colour.lstrip("#")))

    def read_inside(self, box: Box) -> Pixels:
        x0, y0, x1, y1 = box
        downsample = self._slide.level_downsamples[self._level]
        corner = (round(x0 * downsample), round(y0 * downsample))
        try:
            rgba = self._slide.read_region(corner, self._level, (x1 - x0, y1 - y0))
        except _DECODE_ERRORS as error:
            raise DamagedTile(self._path, self._level, box, f"{error}") from error
        canvas = Image.new("RGBA", rgba.size, (*self._background, 255))
        return np.array(Image.alpha_composite(canvas, rgba))[..., :3]


class ArrayLevel:
    """A level that is an array: (Y, X, C) in memory, or one channel of a lazy (C, Y, X)."""

    def __init__(self, array: Any, *, channel: int | None = None) -> None:
        self._array, self._channel = array, channel
        lazy = channel is not None
        height, width = array.shape[1:3] if lazy else array.shape[:2]
        self.size_px = (int(width), int(height))
        chunks = array.chunks[:0:-1] if lazy else (512, 512)
        self.tile_px = (int(chunks[0]), int(chunks[1]))
        self.n_channels = 1 if lazy else int(array.shape[2])
        self.dtype = np.dtype(array.dtype)

    def read_inside(self, box: Box) -> Pixels:
        x0, y0, x1, y1 = box
        if self._channel is None:
            return np.asarray(self._array[y0:y1, x0:x1])
        return np.asarray(self._array[self._channel, y0:y1, x0:x1])[..., None]


@contextmanager
def open_vendor(path: Path) -> Iterator[openslide.OpenSlide]:
    """A slide opened by OpenSlide; raises BadInput where it knows no such format."""
    try:
        slide = openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise BadInput(
            path,
            expected="a slide: OME-TIFF, tiled TIFF, SVS, or a format that OpenSlide reads",
            found=f"a file that OpenSlide cannot open ({error})",
            remedy="export the slide as OME-TIFF",
        ) from error
    with slide:
        yield slide


def vendor_mpp(path: Path, slide: openslide.OpenSlide) -> float | None:
    """µm per level-0 pixel by the slide's properties; None where they say none."""
    x = slide.properties.get(openslide.PROPERTY_NAME_MPP_X)
    y = slide.properties.get(openslide.PROPERTY_NAME_MPP_Y)
    return square_mpp(path, float(x), float(y)) if x and y else None


def square_mpp(path: Path, x: float, y: float) -> float:
    """Mean of two pixel sizes that must agree within 1 %; raises BadInput where they don't."""
    if abs(x - y) > 0.01 * max(x, y):
        raise BadInput(
            path,
            expected="square pixels: the same size in x and y within 1 %",
            found=f"{x:g} x {y:g} µm per pixel",
            remedy="export the slide with square pixels, or give the true size as mpp",
        )
    return (x + y) / 2
