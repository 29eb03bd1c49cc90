"""Tiles of a slide that are decoded once each, and held for as long as somebody reads them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from pairing.geometry import Box
from pairing.slide_sources import Pixels, Source, tiles_under

# What stands for pixels of tiles that nobody asked for: not 0, which would look like a hole.
_UNREAD = 255


class TilesOnce:
    """A source that decodes of another one the `tiles` (column, row), each when it is first read.

    Decoded tiles are held until `drop_above`; read again after it, they are decoded again. Pixels
    of other tiles are not decoded and mean nothing. `n_decoded` counts.
    """

    def __init__(self, source: Source, tiles: Collection[tuple[int, int]]) -> None:
        self._source = source
        self._wanted = set(tiles)
        self._held: dict[tuple[int, int], Pixels | None] = {}  # None: it did not decode
        self.size_px, self.tile_px = source.size_px, source.tile_px
        self.n_channels, self.dtype = source.n_channels, source.dtype
        self.n_decoded = 0

    def read_inside(self, box: Box, damaged: list[Box] | None = None) -> Pixels:
        x0, y0, x1, y1 = box
        out: Pixels = np.empty((y1 - y0, x1 - x0, self.n_channels), self.dtype)
        for tile in tiles_under(box, self.tile_px, self.size_px):
            a0, b0 = max(x0, tile[0]), max(y0, tile[1])
            a1, b1 = min(x1, tile[2]), min(y1, tile[3])
            target = out[b0 - y0 : b1 - y0, a0 - x0 : a1 - x0]
            place = tile[0] // self.tile_px[0], tile[1] // self.tile_px[1]
            if place not in self._wanted:
                target[:] = _UNREAD
                continue
            if place not in self._held:
                self._held[place] = self._decoded(tile, tolerant=damaged is not None)
                self.n_decoded += 1
            pixels = self._held[place]
            if pixels is not None:
                target[:] = pixels[b0 - tile[1] : b1 - tile[1], a0 - tile[0] : a1 - tile[0]]
            else:
                assert damaged is not None
                target[:] = 0
                damaged.append(tile)
        return out

    def _decoded(self, tile: Box, *, tolerant: bool) -> Any:
        undecodable: list[Box] | None = [] if tolerant else None
        pixels = self._source.read_inside(tile, undecodable)
        return None if undecodable else pixels

    def drop_above(self, y: int) -> None:
        """Let tiles go that lie above a row of pixels."""
        row = y // self.tile_px[1]
        for place in [p for p in self._held if p[1] < row]:
            del self._held[place]

    def repeated_tiles(self) -> list[Box]:
        return self._source.repeated_tiles()

    def empty_tiles(self) -> list[Box]:
        return self._source.empty_tiles()
