"""One level of a TIFF: its tiles or strips decoded as they are asked for."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tifffile import PHOTOMETRIC, TiffPageSeries

from pairing.geometry import Box
from pairing.slide_sources import DECODE_ERRORS, DamagedTile, Pixels, tiles_under
from shards.errors import BadInput

# Uncompressed strips can be entered at any row, and are then read this many rows at a time.
_PLAIN_ROWS = 256
# What has to be decoded as one may hold no more pixels than this (400 MB of RGB).
_MAX_SEGMENT_PX = 2**27
# Where a tile is compared first: compressed bytes of two pictures hardly agree in their middle.
_PROBE_BYTES = 64
# A tile shows something where more than this share of its pixels differ from their neighbour by
# more than so many grey levels of 8 bits. Glass doesn't; nor does a straight border of two fills.
_DETAIL_SHARE, _DETAIL_GREY = 0.1, 2


class TiffLevel:
    """A level of a TIFF series; decodes the tiles or strips that a box touches, no others.

    Channels are the pages of the level times the samples of a page, contiguous or planar, so
    YXS, SYX and CYX come out alike; an alpha channel is left out. With `white`, integers from 0
    to `white` come out as 8 bits from 0 to 255. A tile that the file leaves out (no bytes) is
    `blank`. Raises BadInput where single strips or tiles are too large to decode.
    """

    def __init__(
        self,
        path: Path,
        level: int,
        series: TiffPageSeries,
        *,
        blank: int,
        white: int | None,
        has_alpha: bool,
    ) -> None:
        key = series.keyframe
        self._path, self._level, self._key = path, level, key
        self._blank, self._white = blank, white
        self._pages = [page for page in series.pages if page is not None]
        if len(self._pages) < len(series.pages):
            raise BadInput(
                f"{path}, level {level}",
                expected=f"{len(series.pages)} planes, in this file or in those beside it",
                found=f"{len(self._pages)}",
                remedy="copy all files of the picture into one folder",
            )
        self._file = key.parent.filehandle
        self._planar = key.planarconfig == 2 and key.samplesperpixel > 1
        self._planes = key.samplesperpixel if self._planar else 1
        self._samples = 1 if self._planar else key.samplesperpixel
        self._stored = np.dtype(key.dtype)
        self.size_px = (key.imagewidth, key.imagelength)
        self._row_bytes = key.imagewidth * self._samples * self._stored.itemsize
        self._plain = (
            not key.is_tiled
            and (key.compression, key.predictor, key.fillorder) == (1, 1, 1)
            and key.bitspersample == 8 * self._stored.itemsize
            and list(key.databytecounts) == [self._row_bytes * key.imagelength] * self._planes
        )
        if key.is_tiled:
            self.tile_px = (key.tilewidth, key.tilelength)
        else:
            rows = _PLAIN_ROWS if self._plain else key.rowsperstrip
            self.tile_px = (key.imagewidth, min(rows, key.imagelength))
        self.n_channels = len(self._pages) * key.samplesperpixel - has_alpha
        self.dtype = np.dtype(np.uint8) if white else self._stored
        self._check_segments()

    def _check_segments(self) -> None:
        if not 0 < self.tile_px[0] * self.tile_px[1] <= _MAX_SEGMENT_PX:
            raise BadInput(
                f"{self._path}, level {self._level}",
                expected="tiles or strips that fit into memory",
                found=f"pieces of {self.tile_px[0]} x {self.tile_px[1]} px, compressed as one",
                remedy="export the slide in tiles, as OME-TIFF",
            )
        for page in self._pages:
            offsets = np.asarray(page.dataoffsets, np.int64)
            end = int((offsets + np.asarray(page.databytecounts, np.int64)).max())
            if end > self._file.size:
                raise BadInput(
                    f"{self._path}, level {self._level}",
                    expected=f"a whole TIFF file, of at least {end:,} bytes",
                    found=f"{self._file.size:,} bytes",
                    remedy="check that the file was copied whole",
                )

    def read_inside(self, box: Box, damaged: list[Box] | None = None) -> Pixels:
        x0, y0, x1, y1 = box
        out = np.zeros((y1 - y0, x1 - x0, self.n_channels), self._stored)
        for tile in tiles_under(box, self.tile_px, self.size_px):
            a0, b0 = max(x0, tile[0]), max(y0, tile[1])
            a1, b1 = min(x1, tile[2]), min(y1, tile[3])
            target = out[b0 - y0 : b1 - y0, a0 - x0 : a1 - x0]
            part = (slice(b0 - tile[1], b1 - tile[1]), slice(a0 - tile[0], a1 - tile[0]))
            try:
                for first, page, index in self._segments(tile):
                    n_channels = min(self._samples, self.n_channels - first)
                    pixels = self._decode(page, index, tile)[..., :n_channels]
                    target[..., first : first + n_channels] = pixels[part]
            except DamagedTile:
                if damaged is None:
                    raise
                target[:] = 0
                damaged.append(tile)
        return out if self._white is None else _eight_bits(out, self._white)

    def _segments(self, tile: Box) -> list[tuple[int, Any, int]]:
        """Of each segment that makes up a tile: its first channel, page and index in the page."""
        across, down = (-(-s // t) for s, t in zip(self.size_px, self.tile_px, strict=True))
        row, column = tile[1] // self.tile_px[1], tile[0] // self.tile_px[0]
        found = []
        for p, page in enumerate(self._pages):
            for plane in range(self._planes):
                first = p * self._key.samplesperpixel + plane
                if first < self.n_channels:
                    found.append((first, page, (plane * down + row) * across + column))
        return found

    def _decode(self, page: Any, index: int, tile: Box) -> Pixels:
        """A segment as (Y, X, samples), at least as large as the part of it on the slide."""
        offset, n_bytes = self._place(page, index)
        if offset == 0 or n_bytes == 0:
            width, height = self.tile_px
            return np.full((height, width, self._samples), self._blank, self._stored)
        data = self._bytes(offset, n_bytes)
        if self._plain:
            stored = self._stored.newbyteorder(self._key.parent.byteorder)
            return np.frombuffer(data, stored).reshape(-1, self.size_px[0], self._samples)
        tables: dict[str, Any] = {}
        if page.jpegtables is not None:
            tables["jpegtables"] = page.jpegtables
        if self._key.jpegheader is not None:
            tables["jpegheader"] = self._key.jpegheader
        try:
            decoded = self._key.decode(data, index, _fullsize=True, **tables)[0]
        except DECODE_ERRORS as error:
            reason = str(error)
        else:
            assert decoded is not None  # only segments without bytes decode to nothing
            pixels: Pixels = decoded[0]
            return pixels
        # Raised here and not above: codecs' errors don't pickle, and as its cause or context one
        # would keep this error from travelling back from a worker.
        raise DamagedTile(self._path, self._level, tile, reason)

    def _place(self, page: Any, index: int) -> tuple[int, int]:
        """Offset and number of the bytes of a segment in the file."""
        if not self._plain:
            return page.dataoffsets[index], page.databytecounts[index]
        rows, height = self.tile_px[1], self.size_px[1]
        plane, piece = divmod(index, -(-height // rows))
        n_rows = min(rows, height - piece * rows)
        offset = page.dataoffsets[plane] + piece * rows * self._row_bytes
        return offset, n_rows * self._row_bytes

    def _bytes(self, offset: int, n_bytes: int) -> bytes:
        with self._file.lock:
            self._file.seek(offset)
            data: bytes = self._file.read(n_bytes)
        return data

    def empty_tiles(self) -> list[Box]:
        return [tile for tile, places in self._tiles() if not any(n for _, n in places)]

    def repeated_tiles(self) -> list[Box]:
        """Tiles whose bytes stand in the file at two places, found without decoding the slide.

        Only tiles of equal size are compared, by a few bytes first and by all of them where those
        agree; one tile of each group is decoded, to tell glass, which may repeat, from tissue.
        """
        if not self._key.is_tiled:
            return []
        groups = _alike(
            ((tile, places) for tile, places in self._tiles() if any(n for _, n in places)),
            lambda places: tuple(n for _, n in places),
        )
        groups = [g for group in groups for g in _alike(group, self._probe)]
        groups = [g for group in groups for g in _alike(group, self._digest)]
        repeated = [[tile for tile, _ in group] for group in groups]
        return sorted(
            (tile for group in repeated if self._shows_something(group[0]) for tile in group),
            key=lambda box: (box[1], box[0]),
        )

    def _tiles(self) -> Iterable[tuple[Box, Places]]:
        for tile in tiles_under((0, 0, *self.size_px), self.tile_px, self.size_px):
            yield tile, tuple(self._place(page, index) for _, page, index in self._segments(tile))

    def _probe(self, places: Places) -> bytes:
        return b"".join(
            self._bytes(offset + max(0, n_bytes // 2 - _PROBE_BYTES), min(n_bytes, _PROBE_BYTES))
            for offset, n_bytes in places
        )

    def _digest(self, places: Places) -> bytes:
        digests = [hashlib.sha256(self._bytes(*place)).digest() for place in places]
        return b"".join(digests)

    def _shows_something(self, tile: Box) -> bool:
        pixels = self.read_inside(tile, []).astype(np.int32)
        grey = _DETAIL_GREY if self.dtype == np.uint8 else _DETAIL_GREY * 257
        steps = (np.abs(np.diff(pixels, axis=1)) > grey).any(axis=2)
        return steps.size > 0 and float(steps.mean()) > _DETAIL_SHARE


Places = tuple[tuple[int, int], ...]


def _alike(
    tiles: Iterable[tuple[Box, Places]], key: Callable[[Places], Hashable]
) -> list[list[tuple[Box, Places]]]:
    """Groups of at least two tiles that agree in a key."""
    groups: defaultdict[Hashable, list[tuple[Box, Places]]] = defaultdict(list)
    for tile, places in tiles:
        groups[key(places)].append((tile, places))
    return [group for group in groups.values() if len(group) > 1]


def _eight_bits(pixels: Pixels, white: int) -> Pixels:
    """Rounded to the nearest of 256 levels; what is brighter than `white` is white."""
    scaled = (pixels.astype(np.uint32) * 255 + white // 2) // white
    return np.minimum(scaled, 255).astype(np.uint8)


def is_alpha(photometric: int, n_channels: int, dtype: np.dtype[Any]) -> bool:
    """Whether the last of four channels is alpha: of RGB, or of any 8 bits.

    Four stains come as 16 bits and as four grey planes.
    """
    return n_channels == 4 and (photometric == PHOTOMETRIC.RGB or dtype == np.uint8)
