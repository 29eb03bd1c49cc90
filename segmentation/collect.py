"""The nuclei of blocks: published one block at a time, then one table of all, numbered by place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from pairing.slide import Damage, Slide
from segmentation.blocks import Block
from segmentation.nuclei import FoundNuclei
from segmentation.outlines import NUCLEI_SCHEMA, nuclei_table
from shards.artifact import written_aside

# What a block keeps of a nucleus beside the table: its mask, packed into bits, and where it is, on
# the grid of pixels of the network.
_MASK_FIELDS = (
    pa.field("left_px", pa.int32(), nullable=False),
    pa.field("top_px", pa.int32(), nullable=False),
    pa.field("width_px", pa.int32(), nullable=False),
    pa.field("height_px", pa.int32(), nullable=False),
    pa.field("mask", pa.binary(), nullable=False),
)
# What the file lost was replaced by glass: a nucleus as near as this may be cut off there.
_NEAR_DAMAGE_PX = 4.0
# The same rows make the same file, whatever the blocks were.
_ROWS_A_GROUP = 1 << 16


def publish_block(
    kept: Path, block: Block, found: FoundNuclei, mpp: float, slide_mpp: float
) -> None:
    """Write the nuclei that a block owns: with their outlines, and the masks that labels need."""
    table = nuclei_table(found, mpp, slide_mpp)
    x0, y0, x1, y1 = found.box.T
    packed = [np.packbits(mask).tobytes() for mask in found.masks()]
    left, top = found.origin_px
    columns = (x0 + left, y0 + top, x1 - x0, y1 - y0, pa.array(packed, pa.binary()))
    for field, column in zip(_MASK_FIELDS, columns, strict=True):
        table = table.append_column(field, pa.array(column, field.type))
    with written_aside(_path_of(kept, block)) as path:
        pq.write_table(table, path)


def is_published(kept: Path, block: Block) -> bool:
    return _path_of(kept, block).exists()


def remove_blocks(kept: Path) -> None:
    """Remove all published blocks, of whatever size."""
    for path in kept.glob("block-*"):
        path.unlink()


def _path_of(kept: Path, block: Block) -> Path:
    return kept / f"{block.name}.parquet"


def collect_nuclei(
    out: Path, kept: Path, blocks: Sequence[Block], slide: Slide, damage: Sequence[Damage],
    size_px: tuple[int, int],
) -> int:  # fmt: skip
    """One table of the blocks' nuclei in the file `out`, numbered by centroid, y before x.

    `blocks` row by row. Flagged are nuclei at the slide's end (`edge`; it has `size_px` pixels of
    the network) and those that touch damage, be it `damage` or what the file itself tells
    (`damaged_tile`). What the rows of each block are called is published beside it. Returns how
    many nuclei there are.
    """
    n_nuclei = 0
    with written_aside(out) as path, pq.ParquetWriter(path, NUCLEI_SCHEMA) as writer:
        waiting = NUCLEI_SCHEMA.empty_table()
        # A row of blocks holds all nuclei of its span of y: those of later ones come after.
        for _, row in groupby(blocks, key=lambda block: block.core[1]):
            table = _numbered(kept, list(row), n_nuclei)
            n_nuclei += len(table)
            flagged = _flagged(table, slide, damage, size_px)
            waiting = pa.concat_tables([waiting, flagged.select(NUCLEI_SCHEMA.names)])
            while len(waiting) >= _ROWS_A_GROUP:
                writer.write_table(waiting.slice(0, _ROWS_A_GROUP).combine_chunks())
                waiting = waiting.slice(_ROWS_A_GROUP)
        if len(waiting):
            writer.write_table(waiting.combine_chunks())
    return n_nuclei


def _numbered(kept: Path, row: list[Block], n_before: int) -> pa.Table:
    """The nuclei of a row of blocks by centroid, numbered on; publishes their numbers."""
    tables = [pq.read_table(_path_of(kept, block)) for block in row]
    table = pa.concat_tables(tables).combine_chunks()
    columns = [table[name].to_numpy() for name in ("area_um2", "x_px", "y_px")]
    order = np.lexsort(columns)
    ids = np.empty(len(table), np.int64)
    ids[order] = np.arange(n_before + 1, n_before + 1 + len(table))
    ends = np.cumsum([len(t) for t in tables])
    for block, part in zip(row, np.split(ids, ends[:-1]), strict=True):
        with written_aside(_ids_path(kept, block)) as path, path.open("wb") as file:
            np.save(file, part, allow_pickle=False)
    numbered = table.take(pa.array(order))
    return numbered.set_column(0, NUCLEI_SCHEMA.field("nucleus_id"), pa.array(ids[order]))


def _ids_path(kept: Path, block: Block) -> Path:
    return kept / f"{block.name}.ids.npy"


def _flagged(
    table: pa.Table, slide: Slide, damage: Sequence[Damage], size_px: tuple[int, int]
) -> pa.Table:
    left, top, width, height = (table[f.name].to_numpy() for f in _MASK_FIELDS[:4])
    at_edge = (left <= 0) | (top <= 0)
    at_edge |= (left + width >= size_px[0]) | (top + height >= size_px[1])
    centres_px = np.column_stack([table["x_px"].to_numpy(), table["y_px"].to_numpy()])
    boxes = {d.box for d in (*damage, *slide.find_damage(centres_px))}
    damaged = np.zeros(len(table), bool)
    if boxes:
        tree = shapely.STRtree(shapely.from_wkb(table["polygon_px"].to_pylist()))
        near = shapely.box(*np.array(sorted(boxes), np.float64).T)
        damaged[tree.query(near, predicate="dwithin", distance=_NEAR_DAMAGE_PX)[1]] = True
    flags = [
        [name for name, held in (("damaged_tile", d), ("edge", e)) if held]
        for d, e in zip(damaged.tolist(), at_edge.tolist(), strict=True)
    ]
    field = NUCLEI_SCHEMA.field("flags")
    return table.set_column(
        table.schema.get_field_index("flags"), field, pa.array(flags, field.type)
    )


@dataclass(frozen=True, slots=True)
class Mask:
    """The pixels of a nucleus on the network's grid: `mask_YX` begins at (left, top)."""

    nucleus_id: int
    left_px: int
    top_px: int
    mask_YX: npt.NDArray[np.bool_]


def read_masks(kept: Path, block: Block) -> Iterator[Mask]:
    """The masks of the nuclei that a block owns, after `collect_nuclei`."""
    table = pq.read_table(_path_of(kept, block), columns=[f.name for f in _MASK_FIELDS])
    columns = [table[f.name].to_pylist() for f in _MASK_FIELDS]
    ids = np.load(_ids_path(kept, block), allow_pickle=False).tolist()
    for nucleus_id, left, top, width, height, packed in zip(ids, *columns, strict=True):
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=width * height)
        yield Mask(nucleus_id, left, top, bits.reshape(height, width).astype(bool))
