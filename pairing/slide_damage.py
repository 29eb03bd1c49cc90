"""Damage of a slide: what kinds there are, and reading on over it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pairing.geometry import Box
from pairing.slide_sources import Pixels, Source
from shards.schema import Record

# A hole is black (0 in every channel) wherever a square of this side is: 8 µm of a slide at
# 0.25 µm per pixel. The darkest pigment or ink still has the scanner's noise.
_HOLE_PX = 32
# Whether a pixel is in a hole is told by the pixels around it, up to this far.
HOLE_REACH_PX = _HOLE_PX - 1

DamageKind = Literal["undecodable", "black", "duplicate", "missing"]


class Damage(Record):
    """A place of a slide that shows no tissue, or tissue of elsewhere: `box` in level-0 px.

    `undecodable`: a tile that does not decode. `black`: pixels of 0 in squares of 32 px,
    by native tile. `duplicate`: a tile whose bytes stand at another place too, so that one
    of the two is wrong. `missing`: a tile that the file leaves out where a cell lies.
    """

    kind: DamageKind
    box: Box

    def scaled(self, factor: float) -> Damage:
        x0, y0, x1, y1 = self.box
        far = math.ceil(x1 * factor), math.ceil(y1 * factor)
        return Damage(kind=self.kind, box=(int(x0 * factor), int(y0 * factor), *far))


def read_over_damage(
    source: Source, box: Box, *, holes: bool
) -> tuple[Pixels, npt.NDArray[np.bool_], list[Damage]]:
    """(Y, X, C) of a box inside a level, (Y, X) where it is damaged, and the damage found.

    The boxes of the damage are in the level's pixels, those of black holes (looked for by `holes`)
    cut off at native tiles and at what was looked at.
    """
    # Boxes that overlap must agree on holes: a hole that ends in the box begins within this margin.
    wide = _grown(box, HOLE_REACH_PX, source.size_px) if holes else box
    undecodable: list[Box] = []
    pixels = source.read_inside(wide, undecodable)
    damaged = np.zeros(pixels.shape[:2], bool)
    for tile in undecodable:
        damaged[_part(tile, wide)] = True
    damage = [Damage(kind="undecodable", box=tile) for tile in undecodable]
    if holes:
        black = _holes(pixels, damaged)
        damage += [Damage(kind="black", box=b) for b in _by_tile(black, wide, source.tile_px)]
        damaged |= black
    inner = _part(box, wide)
    return np.ascontiguousarray(pixels[inner]), damaged[inner], damage


def merged(damage: Iterable[Damage], tile_px: tuple[int, int]) -> list[Damage]:
    """One damage for all of one kind in one native tile of level 0, row by row of tiles.

    What several blocks saw of a tile becomes the box around all of it.
    """
    seen: dict[tuple[int, int, DamageKind], Box] = {}
    for d in damage:
        key = d.box[1] // tile_px[1], d.box[0] // tile_px[0], d.kind
        a = seen.get(key, d.box)
        b = d.box
        seen[key] = (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
    return [Damage(kind=key[2], box=seen[key]) for key in sorted(seen)]


def _grown(box: Box, margin: int, size_px: tuple[int, int]) -> Box:
    x0, y0 = (max(v - margin, 0) for v in box[:2])
    x1, y1 = (min(v + margin, n) for v, n in zip(box[2:], size_px, strict=True))
    return x0, y0, x1, y1


def _part(box: Box, of: Box) -> tuple[slice, slice]:
    """Rows and columns of a box in an array of the pixels of another."""
    x0, y0 = max(box[0], of[0]) - of[0], max(box[1], of[1]) - of[1]
    return slice(y0, max(box[3] - of[1], y0)), slice(x0, max(box[2] - of[0], x0))


def _holes(pixels: Pixels, damaged: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(Y, X) whether a pixel lies in a black square of _HOLE_PX."""
    # Most pictures have none: every such square holds pixels of any grid of half its side.
    half = _HOLE_PX // 2
    if pixels[::half, ::half].any(axis=2).all():
        return np.zeros_like(damaged)
    black = ~damaged
    for c in range(pixels.shape[2]):
        black &= pixels[..., c] == 0
    # Nor do dark specks make one: every such square holds one of half the side on the grid.
    down, across = (n // half for n in black.shape)
    cells = black[: down * half, : across * half].reshape(down, half, across, half)
    if not cells.all(axis=(1, 3)).any():
        return np.zeros_like(black)
    # The union of the squares: a morphological opening, whose second filter mirrors the first.
    centres = ndimage.minimum_filter(black, _HOLE_PX, mode="constant", cval=0)
    holes: npt.NDArray[np.bool_] = ndimage.maximum_filter(
        centres, _HOLE_PX, mode="constant", cval=0, origin=-1
    )
    return holes


def _by_tile(mask: npt.NDArray[np.bool_], box: Box, tile_px: tuple[int, int]) -> list[Box]:
    """The box around what is set of a mask over `box`, for each native tile."""
    if not mask.any():
        return []
    rows = np.arange(box[1], box[3]) // tile_px[1]
    columns = np.arange(box[0], box[2]) // tile_px[0]
    rows, columns = rows - rows[0], columns - columns[0]
    tile = rows[:, None] * (columns[-1] + 1) + columns + 1
    return [
        (
            box[0] + found[1].start,
            box[1] + found[0].start,
            box[0] + found[1].stop,
            box[1] + found[0].stop,
        )
        for found in ndimage.find_objects(np.where(mask, tile, 0))
        if found is not None
    ]
