"""Blocks of a slide: planned, cut into patches anywhere, and published one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg

from pairing.geometry import Box, Points
from pairing.patch_grid import GridRows, PatchGrid, Rgb, columns_by_row, rows_of_grid
from pairing.patch_plan import Plan, plan_cuts
from pairing.quality import SCORES, Scores, measure
from pairing.slide import Damage, Slide
from shards.artifact import written_aside
from shards.schema import PatchSpec, Record

DAMAGE_FILE = "damage.json"
_NOTES_KEY = "notes"
# Of the patches of a block so many bytes are held and put in order before they are written.
_HELD_BYTES = 256 * 2**20

INDEX_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # of cells.parquet
        pa.field("part", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int32(), nullable=False),
        pa.field("x_px", pa.float64(), nullable=False),
        pa.field("y_px", pa.float64(), nullable=False),
        pa.field("edge", pa.bool_(), nullable=False),
        pa.field("damaged_tile", pa.bool_(), nullable=False),
        # Of pairing.quality; null where a score can't be told, and all of them for DAPI.
        *(pa.field(score, pa.float32()) for score in SCORES),
    ]
)


class DamageReport(Record):
    """`damage.json`: the damage of the slide that was met where cells lie, or that its table tells.

    Boxes in level-0 pixels, at most one a kind and native tile.
    """

    schema_version: Literal[1] = 1
    damage: tuple[Damage, ...]


@dataclass(frozen=True, slots=True)
class PatchBlock:
    """Work for one worker: cells whose patches are cut from the tiles that they share.

    `centres_px` is (n, 2) in level-0 pixels; `rows` are their rows in cells.parquet and `ranks`
    their places in the order of the shards; `damage` is what is known of the slide there before it
    is decoded.
    """

    name: str
    rows: npt.NDArray[np.int64]
    centres_px: Points
    ranks: npt.NDArray[np.int64]
    damage: tuple[Damage, ...] = ()


@dataclass(frozen=True, slots=True)
class Look:
    """What is one for all blocks of a slide.

    `grey_scale` holds the intensities that become 0 and 255 in a DAPI patch, None for RGB slides;
    `fill` is the (C,) value of what can't be seen.
    """

    grey_scale: tuple[float, float] | None
    fill: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class CutBlock:
    """What became of a block: its rows of the index, the damage met, and the tiles decoded.

    `sha256` is of its file of patches.
    """

    index: pa.Table
    damage: tuple[Damage, ...]
    n_decoded: int
    sha256: str


class BlockNotes(DamageReport):
    """What a block's table tells beside its rows; `sha256` is of the patches' file."""

    n_decoded: int
    sha256: str


OpenImage = Callable[[], AbstractContextManager[Slide]]


def plan_blocks(
    slide: Slide,
    centres_px: Points,
    spec: PatchSpec,
    ranks: npt.NDArray[np.int64],
    damage: Sequence[Damage] = (),
) -> tuple[list[PatchBlock], Plan]:
    """Blocks that hold every centre on the slide once, as `pairing.patch_plan` cuts them.

    `ranks` are the (n,) places in the order of the shards. Of `damage`, known of the slide, each
    block gets what lies around its patches.
    """
    on_slide = ((centres_px >= 0) & (centres_px < slide.size_px)).all(axis=1)
    rows = np.flatnonzero(on_slide)
    grid = PatchGrid.of(slide, spec)
    corners = grid.corners(centres_px[rows])
    seen = grid.seen(corners)
    tile_w, tile_h = slide.tile_px
    # Two rows of tiles and what lies between them, besides decoded pixels on their way.
    held_rows = 2 * tile_h + grid.rows_held()
    plan = plan_cuts(
        grid.footprints(slide, corners),
        tile_w * held_rows * slide.n_channels * slide.dtype.itemsize,
    )
    blocks = []
    for number, members in enumerate(plan.blocks):
        box = (*seen[members, :2].min(axis=0).tolist(), *seen[members, 2:].max(axis=0).tolist())
        known = tuple(d for d in damage if overlaps(d.box, box))
        own = rows[members]
        blocks.append(PatchBlock(f"part-{number:05d}", own, centres_px[own], ranks[own], known))
    return blocks, plan


def cut_block(
    out: Path, open_image: OpenImage, spec: PatchSpec, look: Look, block: PatchBlock
) -> str:
    """Publish the patches of one block as `out/<name>.jpgs`, and after them `<name>.parquet`.

    The table holds their rows of the index and, in its metadata, the damage that was met; where it
    is, the block is whole. Returns the name.

    Each tile is decoded once. A patch is a square of `spec.fov_um` around its cell, whose middle is
    that of the cell to half a pixel of the patch, of a grid that is resampled once with an
    antialiasing filter. Outside the slide, and where it does not decode or is black, lies the
    slide's fill; patches over damage are marked.

    Patches lie in the order of the shards, so that a shard finds its own side by side; in a block
    that is too large to be held, those that are cut one after the other do.
    """
    with (
        open_image() as opened,
        written_aside(out / jpgs_file(block.name)) as path,
        path.open("wb") as file,
    ):
        grid = PatchGrid.of(opened, spec)
        corners = grid.corners(block.centres_px)
        footprints = columns_by_row(grid.footprints(opened, corners))
        wanted = [(x, y) for y, columns in footprints.items() for x in columns.tolist()]
        once, tiles = opened.decoding_once(wanted, look.fill)
        slide, met = once.tolerant()
        part = _Part(file, block.ranks)
        numbers, scores = list[int](), list[Scores]()
        for rows in rows_of_grid(slide, tiles, grid, corners, look.grey_scale):
            numbers += rows.numbers
            for number, rgb in zip(rows.numbers, rows.patches(spec.size_px), strict=True):
                part.add(number, encoded(rgb, spec.jpeg_quality))
            if spec.image == "he":
                scores.append(_scores(rows, spec))
        part.write_held()
    known = {(d.kind, d.box): d for d in (*block.damage, *met)}
    columns = {
        "row": block.rows[numbers],
        "part": pa.repeat(block.name, len(numbers)),
        "offset": part.offsets[numbers],
        "size": part.sizes[numbers],
        "x_px": block.centres_px[numbers, 0],
        "y_px": block.centres_px[numbers, 1],
        "edge": _reaches_outside(grid.fields(corners[numbers]), slide.size_px),
        "damaged_tile": _sees(grid.seen(corners[numbers]), [box for _, box in known]),
        **{name: _score(name, scores, len(numbers)) for name in SCORES},
    }
    found = {(d.kind, d.box): d for d in met}
    notes = BlockNotes(
        damage=tuple(found.values()), n_decoded=tiles.n_decoded, sha256=part.sha.hexdigest()
    )
    metadata = {_NOTES_KEY: notes.model_dump_json()}
    index = pa.table(columns, schema=INDEX_SCHEMA).replace_schema_metadata(metadata)
    with written_aside(out / f"{block.name}.parquet") as path:
        pq.write_table(index, path)
    return block.name


class _Part:
    """The file of a block's patches, in which they lie by rank; tells where each does."""

    def __init__(self, file: BinaryIO, ranks: npt.NDArray[np.int64]) -> None:
        self.offsets = np.zeros(len(ranks), np.int64)
        self.sizes = np.zeros(len(ranks), np.int32)
        self.sha = hashlib.sha256()
        self._file = file
        self._ranks = ranks
        self._held: list[tuple[int, int, bytes]] = []
        self._n_held_bytes = self._n_bytes = 0

    def add(self, number: int, jpeg: bytes) -> None:
        self._held.append((int(self._ranks[number]), number, jpeg))
        self._n_held_bytes += len(jpeg)
        if self._n_held_bytes >= _HELD_BYTES:
            self.write_held()

    def write_held(self) -> None:
        for _, number, jpeg in sorted(self._held):
            self.offsets[number], self.sizes[number] = self._n_bytes, len(jpeg)
            self._n_bytes += self._file.write(jpeg)
            self.sha.update(jpeg)
        self._held, self._n_held_bytes = [], 0


def _scores(rows: GridRows, spec: PatchSpec) -> Scores:
    """Of the patches of these rows, measured on what they share."""
    left = int(rows.corners_px[:, 0].min())
    right = int(rows.corners_px[:, 0].max()) + spec.size_px
    return measure(
        np.ascontiguousarray(rows.picture[:, left:right]),
        spec.mpp,
        rows.corners_px - np.array([left, 0]),
        spec.size_px,
        (rows.origin_px[0] + left, rows.origin_px[1]),
    )


def _score(name: str, scores: Sequence[Scores], n: int) -> pa.Array:
    """(n,) float32, null where it can't be told; scores are of stained tissue, DAPI has none."""
    if not scores:
        return pa.nulls(n, pa.float32())
    return pa.array(np.concatenate([getattr(s, name) for s in scores]), from_pandas=True)


def encoded(rgb: Rgb, quality: int) -> bytes:
    """A patch as JPEG, 4:2:0."""
    jpeg: bytes = simplejpeg.encode_jpeg(
        rgb, quality=quality, colorspace="RGB", colorsubsampling="420"
    )
    return jpeg


def read_block(out: Path, name: str) -> CutBlock | None:
    """What `cut_block` published under this name, or None where it has not yet."""
    path = out / f"{name}.parquet"
    if not path.exists():
        return None
    table = pq.read_table(path)
    notes = BlockNotes.model_validate_json(table.schema.metadata[_NOTES_KEY.encode()])
    return CutBlock(table.replace_schema_metadata(), notes.damage, notes.n_decoded, notes.sha256)


def jpgs_file(name: str) -> str:
    return f"{name}.jpgs"


def overlaps(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether two half-open boxes share a place."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _reaches_outside(
    fields: npt.NDArray[np.float64], size_px: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    """(n,) of (n, 4) boxes."""
    before, beyond = fields[:, :2] < 0, fields[:, 2:] > np.array(size_px)
    return np.asarray(before.any(axis=1) | beyond.any(axis=1))


def _sees(seen: npt.NDArray[np.int64], boxes: Sequence[Box]) -> npt.NDArray[np.bool_]:
    """(n,) whether an (n, 4) box overlaps any of `boxes`."""
    found = np.zeros(len(seen), bool)
    for x0, y0, x1, y1 in boxes:
        across = (seen[:, 0] < x1) & (seen[:, 2] > x0)
        found |= across & (seen[:, 1] < y1) & (seen[:, 3] > y0)
    return found
