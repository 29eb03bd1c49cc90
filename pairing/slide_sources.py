"""Where the pixels of a slide come from: OpenSlide, arrays, and what is promised of any source.

A source serves boxes that lie inside its level, as (Y, X, C), and knows nothing of pixel sizes,
fills or resampling; those are `pairing.slide`'s. TIFF's is in `pairing.slide_tiff_level`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import openslide
from PIL import Image

from pairing.geometry import Box
from shards.errors import BadInput

Pixels = npt.NDArray[Any]

# What decoders raise on damaged data: imagecodecs and OpenSlide derive from RuntimeError and
# Exception respectively, TiffFileError from ValueError.
DECODE_ERRORS = (
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
    """One level of a slide: size and native tile in px, and boxes of it as (Y, X, C).

    `read_inside` raises DamagedTile where a tile does not decode; given the list `damaged`, it
    leaves such a tile at 0, adds its box to the list and goes on. `repeated_tiles` are the boxes
    of tiles that the file holds twice, bit for bit, though they show something; `empty_tiles` the
    boxes of those that it holds no bytes for.
    """

    @property
    def size_px(self) -> tuple[int, int]: ...
    @property
    def tile_px(self) -> tuple[int, int]: ...
    @property
    def n_channels(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def read_inside(self, box: Box, damaged: list[Box] | None = None) -> Pixels: ...
    def repeated_tiles(self) -> list[Box]: ...
    def empty_tiles(self) -> list[Box]: ...


class VendorFile:
    """An open file of OpenSlide's, which after an error serves nothing any more until reopened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.slide = openslide.OpenSlide(path)

    def reopen(self) -> None:
        self.slide.close()
        self.slide = openslide.OpenSlide(self._path)


class OpenSlideLevel:
    """A level of a slide that OpenSlide reads; unscanned parts get the format's own background.

    OpenSlide doesn't tell where tiles lie in the file, so none is known to be repeated or empty.
    """

    n_channels = 3
    dtype: np.dtype[Any] = np.dtype(np.uint8)

    def __init__(self, path: Path, level: int, file: VendorFile) -> None:
        self._path, self._level, self._file = path, level, file
        properties = file.slide.properties
        self.size_px = file.slide.level_dimensions[level]
        tile = [properties.get(f"openslide.level[{level}].tile-{k}") for k in ("width", "height")]
        # Formats without a regular tile grid name none; 512 is then only a unit of work.
        self.tile_px = (int(tile[0] or 512), int(tile[1] or 512))
        colour = properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
        self._background = tuple(bytes.fromhex(colour.lstrip("#")))

    def read_inside(self, box: Box, damaged: list[Box] | None = None) -> Pixels:
        try:
            return self._read(box)
        except DamagedTile:
            if damaged is None:
                raise
        x0, y0, x1, y1 = box
        out = np.zeros((y1 - y0, x1 - x0, 3), np.uint8)
        for tile in tiles_under(box, self.tile_px, self.size_px):
            a0, b0 = max(x0, tile[0]), max(y0, tile[1])
            a1, b1 = min(x1, tile[2]), min(y1, tile[3])
            try:
                out[b0 - y0 : b1 - y0, a0 - x0 : a1 - x0] = self._read((a0, b0, a1, b1))
            except DamagedTile:
                damaged.append(tile)
        return out

    def _read(self, box: Box) -> Pixels:
        x0, y0, x1, y1 = box
        downsample = self._file.slide.level_downsamples[self._level]
        corner = (round(x0 * downsample), round(y0 * downsample))
        try:
            rgba = self._file.slide.read_region(corner, self._level, (x1 - x0, y1 - y0))
        except DECODE_ERRORS as error:
            self._file.reopen()
            reason = str(error)
        else:
            canvas = Image.new("RGBA", rgba.size, (*self._background, 255))
            return np.array(Image.alpha_composite(canvas, rgba))[..., :3]
        # Raised here and not above: the library's error, as a cause, would not pickle.
        raise DamagedTile(self._path, self._level, box, reason)

    def repeated_tiles(self) -> list[Box]:
        return []

    def empty_tiles(self) -> list[Box]:
        return []


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

    def read_inside(self, box: Box, damaged: list[Box] | None = None) -> Pixels:
        x0, y0, x1, y1 = box
        if self._channel is None:
            return np.array(self._array[y0:y1, x0:x1])
        return np.asarray(self._array[self._channel, y0:y1, x0:x1])[..., None]

    def repeated_tiles(self) -> list[Box]:
        return []

    def empty_tiles(self) -> list[Box]:
        return []


def tiles_under(box: Box, tile_px: tuple[int, int], size_px: tuple[int, int]) -> Iterator[Box]:
    """The tiles of a grid that a box touches, row by row, cut off at the level's border."""
    (tile_w, tile_h), (width, height) = tile_px, size_px
    for top in range(box[1] // tile_h * tile_h, box[3], tile_h):
        for left in range(box[0] // tile_w * tile_w, box[2], tile_w):
            yield left, top, min(left + tile_w, width), min(top + tile_h, height)


@contextmanager
def open_vendor(path: Path) -> Iterator[VendorFile]:
    """A slide opened by OpenSlide; raises BadInput where it knows no such format."""
    try:
        file = VendorFile(path)
    except openslide.OpenSlideError as error:
        raise BadInput(
            path,
            expected="a slide: OME-TIFF, tiled TIFF, SVS, or a format that OpenSlide reads",
            found=f"a file that OpenSlide cannot open ({error})",
            remedy="export the slide as OME-TIFF",
        ) from error
    try:
        yield file
    finally:
        file.slide.close()


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
