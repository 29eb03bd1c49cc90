"""Nuclei expanded into cells, as label tiles of the Xenium frame that are made and read one by one.

A pixel is of the nucleus whose mask is nearest, within a distance; of two that are equally near it
is of the first. So no pixel is of two cells, and the tiles of a section are those of one raster
wherever they are cut.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely

from pairing.geometry import Points
from pairing.label_raster import MOST_LABELS, expanded, filled
from pairing.tally import OfCells
from pairing.warp import Warp, read_warp
from pairing.xenium.transcripts import Rows
from shards.artifact import written_aside
from shards.errors import BadInput

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

# Of the raster, about that of the instrument's own masks (0.2125 µm).
PIXEL_UM = 0.25
# Side of a tile: 512 µm, 16 MB while it is made.
TILE_PX = 2048
# A registration that stretches more than this where a nucleus lies has failed.
_MOST_STRETCH = 1.25
# Tiles that are held while transcripts are looked up, 8 MB each.
_HELD_TILES = 12
_NO_LABEL = MOST_LABELS
_SCHEMA = pa.schema([pa.field("label", pa.uint16(), nullable=False)])
_ROWS, _AREAS = b"rows", b"areas_px"


@dataclass(frozen=True, slots=True)
class TileNuclei:
    """The nuclei that reach into a tile: their rows, ascending, and outlines in slide pixels."""

    column: int
    row: int
    rows: I64
    outlines_px: list[bytes]  # WKB

    @property
    def name(self) -> str:
        return _name(self.column, self.row)


class Tiles:
    """The tiles that nuclei reach into, one after the other, each with its nuclei.

    `centres_um` is (n, 2), `reach_um` (n,) how far from there a nucleus and its expansion go at
    most, `outlines_px` a WKB column of all of them.
    """

    what = "tiles of cells"

    def __init__(
        self, centres_um: Points, reach_um: npt.NDArray[np.float64], outlines_px: pa.ChunkedArray
    ) -> None:
        self._outlines_px = outlines_px
        side_um = TILE_PX * PIXEL_UM
        first, last = (
            np.floor((centres_um + sign * reach_um[:, None]) / side_um).astype(np.int64)
            for sign in (-1, 1)
        )
        places, rows = [], []
        for step in np.ndindex(*(last - first).max(axis=0, initial=0) + 1):
            reached = np.flatnonzero((first + step <= last).all(axis=1))
            places.append(first[reached] + step)
            rows.append(reached)
        place, row = np.concatenate(places), np.concatenate(rows)
        order = np.lexsort((row, place[:, 0], place[:, 1]))
        self._place, self._row = place[order], row[order]
        begins = np.flatnonzero((np.diff(self._place, axis=0, prepend=np.nan) != 0).any(axis=1))
        self._spans = list(zip(begins, np.append(begins[1:], len(order)), strict=True))

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def names(self) -> list[str]:
        return [_name(*self._place[first]) for first, _ in self._spans]

    def left(self, kept: Path) -> Tiles:
        """Those that are not yet published in `kept`."""
        left = copy(self)
        left._spans = [
            span
            for span, name in zip(self._spans, self.names, strict=True)
            if not _file(kept, name).exists()
        ]
        return left

    def __iter__(self) -> Iterator[TileNuclei]:
        for first, end in self._spans:
            column, row = self._place[first].tolist()
            rows = self._row[first:end]
            outlines = self._outlines_px.take(pa.array(rows)).to_pylist()
            yield TileNuclei(column, row, rows, outlines)


def reach_um(
    centres_px: Points, outlines_px: pa.ChunkedArray, mpp: float, expansion_um: float
) -> npt.NDArray[np.float64]:
    """(n,) how far from its centroid a nucleus and its expansion go at most, in Xenium µm."""
    farthest_px = [np.zeros(0)]
    first = 0
    for chunk in outlines_px.chunks:
        outlines = shapely.from_wkb(chunk.to_numpy(zero_copy_only=False))
        x0, y0, x1, y1 = shapely.bounds(outlines).T
        x, y = centres_px[first : first + len(chunk)].T
        farthest_px.append(np.hypot(np.maximum(x - x0, x1 - x), np.maximum(y - y0, y1 - y)))
        first += len(chunk)
    return np.concatenate(farthest_px) * mpp * _MOST_STRETCH + expansion_um + PIXEL_UM


def xenium_um_of(he_px: Points, he_px_from_xenium_um: Warp) -> Points:
    """(n, 2) places of the slide in the Xenium frame.

    Raises BadInput where the transform has no inverse there.
    """
    try:
        return he_px_from_xenium_um.inverse(he_px)
    except ValueError as error:
        raise BadInput(
            "registration",
            expected="a transform that can be inverted, to carry H&E nuclei over",
            found=str(error),
            remedy='look at the registration by `cellpair register`, or set unit = "xenium"',
        ) from error


def make_tile(kept: Path, warp: Path, expansion_um: float, tile: TileNuclei) -> str:
    """Publish the cells of one tile as `<name>.arrow` in `kept`; returns the name.

    Outlines are carried over vertex by vertex by the inverse of the transform in the file `warp`
    (`write_warp`). A pixel is of a nucleus's mask where its centre is inside of the outline, and
    of its cell where its centre is no farther than `expansion_um` from the side of a pixel of the
    mask. Raises BadInput where the transform has no inverse.
    """
    he_px_from_xenium_um = read_warp(warp)
    outlines = shapely.transform(
        shapely.from_wkb(tile.outlines_px), lambda px: xenium_um_of(px, he_px_from_xenium_um)
    )
    radius_px = expansion_um / PIXEL_UM + 0.5
    halo = int(radius_px)
    corner_px = np.array([tile.column, tile.row]) * TILE_PX - halo
    outlines = shapely.transform(outlines, lambda um: um / PIXEL_UM - corner_px)
    masks = filled(outlines, TILE_PX + 2 * halo)
    labels = expanded(masks, radius_px)
    areas_px = np.bincount(labels[labels >= 0], minlength=len(tile.rows))
    flat = np.where(labels < 0, _NO_LABEL, labels).astype(np.uint16).ravel()
    schema = _SCHEMA.with_metadata(
        {_ROWS: tile.rows.astype("<i8").tobytes(), _AREAS: areas_px.astype("<i8").tobytes()}
    )
    options = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
    with (
        written_aside(_file(kept, tile.name)) as path,
        pa.ipc.new_file(str(path), schema, options=options) as file,
    ):
        file.write_batch(pa.record_batch([pa.array(flat)], schema=_SCHEMA))
    return tile.name


def cell_areas_um2(kept: Path, names: list[str], n_nuclei: int) -> npt.NDArray[np.float64]:
    """(n,) area of the cell of each nucleus, of all published tiles."""
    n_px = np.zeros(n_nuclei, np.int64)
    for name in names:
        with pa.OSFile(str(_file(kept, name))) as source:
            metadata = pa.ipc.open_file(source).schema.metadata
        n_px[np.frombuffer(metadata[_ROWS], "<i8")] += np.frombuffer(metadata[_AREAS], "<i8")
    return n_px.astype(np.float64) * PIXEL_UM**2


@dataclass(frozen=True, slots=True)
class ByPlace:
    """The cell at the place of a transcript, in the tiles of `kept`; an `Assignment`.

    `x` and `y` are the table's columns of positions in µm.
    """

    kept: Path
    x: str
    y: str

    @property
    def columns(self) -> tuple[str, ...]:
        return self.x, self.y

    def open(self) -> OfCells:
        return _Lookup(self).of_cells


class _Lookup:
    """Holds the tiles that were asked for last: transcripts come field of view by field of view."""

    def __init__(self, where: ByPlace) -> None:
        self._where = where
        self._held: OrderedDict[tuple[int, int], tuple[npt.NDArray[np.uint16], I32]] = OrderedDict()
        places = (path.stem.split("_")[1:] for path in where.kept.glob("tile_*.arrow"))
        self._there = {(int(column), int(row)) for column, row in places}

    def of_cells(self, rows: Rows) -> I32:
        found = np.full(len(rows), -1, np.int32)
        x_px, y_px = (
            np.floor(rows.numbers(name) / np.float64(PIXEL_UM))
            for name in (self._where.x, self._where.y)
        )
        corners = np.array(sorted(self._there), np.int64).reshape(-1, 2)
        if not len(corners):
            return found
        (c0, r0), (c1, r1) = corners.min(axis=0), corners.max(axis=0)
        near = np.flatnonzero(
            (x_px >= c0 * TILE_PX) & (x_px < (c1 + 1) * TILE_PX)
            & (y_px >= r0 * TILE_PX) & (y_px < (r1 + 1) * TILE_PX)
        )  # fmt: skip
        x, y = x_px[near].astype(np.int64), y_px[near].astype(np.int64)
        n_columns = int(c1 - c0 + 1)
        tile = (y // TILE_PX - r0) * n_columns + (x // TILE_PX - c0)
        # numpy sorts numbers of 16 bits many times as fast as those of 64.
        n_tiles = n_columns * int(r1 - r0 + 1)
        order = np.argsort(tile.astype(np.min_scalar_type(n_tiles)), kind="stable")
        ends = np.cumsum(np.bincount(tile, minlength=1))
        for number in np.flatnonzero(np.diff(ends, prepend=0)).tolist():
            here = order[ends[number - 1] if number else 0 : ends[number]]
            column, row = number % n_columns + int(c0), number // n_columns + int(r0)
            if (column, row) in self._there:
                labels, row_of_label = self._tile(column, row)
                place = (y[here] - row * TILE_PX) * TILE_PX + (x[here] - column * TILE_PX)
                found[near[here]] = row_of_label[labels[place]]
        return found

    def _tile(self, column: int, row: int) -> tuple[npt.NDArray[np.uint16], I32]:
        """Labels of the tile's pixels, and the row of each label."""
        if (column, row) not in self._held:
            while len(self._held) >= _HELD_TILES:
                self._held.popitem(last=False)
            with pa.OSFile(str(_file(self._where.kept, _name(column, row)))) as source:
                reader = pa.ipc.open_file(source)
                labels = reader.get_batch(0).column(0).to_numpy()
                rows = np.frombuffer(reader.schema.metadata[_ROWS], "<i8")
            row_of_label = np.full(_NO_LABEL + 1, -1, np.int32)
            row_of_label[: len(rows)] = rows
            self._held[column, row] = labels, row_of_label
        self._held.move_to_end((column, row))
        return self._held[column, row]


def _name(column: int, row: int) -> str:
    return f"tile_{column}_{row}"


def _file(kept: Path, name: str) -> Path:
    return kept / f"{name}.arrow"
