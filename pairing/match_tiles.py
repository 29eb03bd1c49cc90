"""Nuclei of both sides that overlap, tile by tile of the slide, and all tiles anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely

from pairing.geometry import Transform
from pairing.outlines import Outlines
from pairing.patch_grid import expanded
from pairing.warp import Warp, read_warp, write_warp
from shards.artifact import make_left, written_aside

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

# Nuclei that share less than this touch as neighbours do; they are not one nucleus seen twice.
MIN_IOU = 0.1
# Side of a tile: some thousands of nuclei, a quarter of a second, 4 MB of outlines.
_SIDE_UM = 1024.0
_AT_A_TIME = 50_000
_WARP_FILE = "he_px_from_xenium_um.npz"

# Pairs of rows of either side, and how they overlap.
PAIRS = pa.schema(
    [
        pa.field("left", pa.int64(), nullable=False),
        pa.field("right", pa.int64(), nullable=False),
        pa.field("iou", pa.float64(), nullable=False),
        pa.field("distance_px", pa.float64(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class MatchTile:
    """Rows and outlines (WKB) of the nuclei that reach into a tile, of the instrument in its µm."""

    name: str
    left: I64
    left_um: list[bytes]
    right: I64
    right_px: list[bytes]


class MatchTiles:
    """The tiles that nuclei of both sides reach into, one after the other.

    Nuclei that overlap share a point, so that some tile holds both.
    """

    what = "tiles of nuclei"

    def __init__(
        self,
        left_um: npt.NDArray[np.object_],
        right_px: Outlines,
        px_from_um: Transform,
        mpp: float,
    ) -> None:
        self._left_um, self._right_px = left_um, right_px
        boxes = list(_boxes_moved(left_um, px_from_um))
        self._left = _by_tile(np.concatenate([_NO_BOXES, *boxes]), _SIDE_UM / mpp)
        boxes = [shapely.bounds(shapely.from_wkb(part)) for part in right_px.parts()]
        self._right = _by_tile(np.concatenate([_NO_BOXES, *boxes]), _SIDE_UM / mpp)
        self._places = sorted(self._left.keys() & self._right.keys())

    def __len__(self) -> int:
        return len(self._places)

    @property
    def names(self) -> list[str]:
        return [_name(place) for place in self._places]

    def left(self, kept: Path) -> MatchTiles:
        """Those whose pairs are not yet published in `kept`."""
        left = copy(self)
        left._places = [p for p in self._places if not _file(kept, _name(p)).exists()]
        return left

    def __iter__(self) -> Iterator[MatchTile]:
        for place in self._places:
            left, right = self._left[place], self._right[place]
            yield MatchTile(
                _name(place),
                left,
                shapely.to_wkb(self._left_um[left]).tolist(),
                right,
                self._right_px.take(right),
            )


def pairs_of_tile(px_from_um: Transform, tile: MatchTile) -> pa.Table:
    """PAIRS of at least MIN_IOU."""
    left_px = moved(shapely.from_wkb(tile.left_um), px_from_um)
    right_px = shapely.from_wkb(tile.right_px)
    left, right = shapely.STRtree(right_px).query(left_px, predicate="intersects")
    shared = shapely.area(shapely.intersection(left_px[left], right_px[right]))
    iou = shared / (shapely.area(left_px[left]) + shapely.area(right_px[right]) - shared)
    alike = iou >= MIN_IOU
    left, right = left[alike], right[alike]
    distance_px = shapely.distance(
        shapely.centroid(left_px[left]), shapely.centroid(right_px[right])
    )
    columns = (tile.left[left], tile.right[right], iou[alike], distance_px)
    return pa.table([pa.array(c) for c in columns], schema=PAIRS)


def pairs_in_turn(px_from_um: Transform, tiles: MatchTiles) -> Iterator[pa.Table]:
    """Those of all tiles, here and now."""
    return (pairs_of_tile(px_from_um, tile) for tile in tiles)


def mapped_pairs(
    kept: Path,
    map_tasks: Callable[[Callable[[MatchTile], str], Any], Iterable[str]],
    px_from_um: Warp,
    tiles: MatchTiles,
) -> Iterator[pa.Table]:
    """Those of all tiles, found anywhere and published in `kept` one by one."""
    warp = kept / _WARP_FILE
    write_warp(warp, px_from_um)
    left = tiles.left(kept)
    make_left(map_tasks, partial(publish_pairs, kept, warp), left, len(tiles))
    for name in tiles.names:
        with pa.OSFile(str(_file(kept, name))) as source, pa.ipc.open_file(source) as file:
            yield file.read_all()


def publish_pairs(kept: Path, warp: Path, tile: MatchTile) -> str:
    """Write the pairs of a tile into `kept`; `warp` is a file of `write_warp`. Returns its name."""
    pairs = pairs_of_tile(read_warp(warp), tile)
    with (
        written_aside(_file(kept, tile.name)) as path,
        pa.ipc.new_file(str(path), PAIRS) as file,
    ):
        file.write_table(pairs)
    return tile.name


def moved(polygons: npt.NDArray[np.object_], dst_from_src: Transform) -> npt.NDArray[np.object_]:
    """The polygons in another frame, valid."""
    # Simplified outlines of the instrument cross themselves now and then; buffer(0) would drop
    # parts of such a ring, make_valid keeps all of its area.
    there: npt.NDArray[np.object_] = shapely.make_valid(shapely.transform(polygons, dst_from_src))
    return there


_NO_BOXES = np.zeros((0, 4))


def _boxes_moved(polygons: npt.NDArray[np.object_], dst_from_src: Transform) -> Iterator[F64]:
    """(n, 4) bounds of the vertices in another frame, some at a time; NaN of what has none."""
    for first in range(0, len(polygons), _AT_A_TIME):
        some = polygons[first : first + _AT_A_TIME]
        at, of = shapely.get_coordinates(some, return_index=True)
        boxes = np.full((len(some), 4), np.nan)
        if len(at):
            there = dst_from_src(at)
            begins = np.flatnonzero(np.diff(of, prepend=-1))
            boxes[of[begins], :2] = np.minimum.reduceat(there, begins)
            boxes[of[begins], 2:] = np.maximum.reduceat(there, begins)
        yield boxes


def _by_tile(boxes: F64, side_px: float) -> dict[tuple[int, int], I64]:
    """Rows, ascending, of the boxes that reach into each tile, by its row and column."""
    rows = np.flatnonzero(np.isfinite(boxes).all(axis=1))
    number, column, row = expanded(np.floor(boxes[rows] / side_px).astype(np.int64))
    order = np.lexsort((number, column, row))
    places = np.stack([row, column], axis=1)[order]
    begins = np.flatnonzero((np.diff(places, axis=0, prepend=np.nan) != 0).any(axis=1))
    parts = np.split(rows[number[order]], begins[1:])
    return dict(zip(map(tuple, places[begins].tolist()), parts, strict=True)) if len(rows) else {}


def _name(place: tuple[int, int]) -> str:
    return f"match-{place[0]:05d}-{place[1]:05d}"


def _file(kept: Path, name: str) -> Path:
    return kept / f"{name}.arrow"
