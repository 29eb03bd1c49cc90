"""Blocks of a slide: planned, cut into patches anywhere, and published one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image

from pairing.geometry import Box, Points
from pairing.quality import SCORES, measure
from pairing.slide import Damage, Slide
from pairing.slide_image import FILTER_REACH
from shards.artifact import written_aside
from shards.schema import PatchSpec, Record

DAMAGE_FILE = "damage.json"

# Side of a block's core in level-0 pixels: whole tiles of the slide, about this size, so that a
# tile is decoded for one core and at most for its neighbours' halos.
BLOCK_PX = 2048

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
    """Work for one worker: the cells whose centres lie in one core, and the box to decode.

    `centres_px` is (n, 2) in level-0 pixels; `rows` are their rows in cells.parquet; `damage` is
    what is known of the box before it is decoded.
    """

    name: str
    box: Box
    rows: npt.NDArray[np.int64]
    centres_px: Points
    damage: tuple[Damage, ...] = ()


@dataclass(frozen=True, slots=True)
class CutBlock:
    """What became of a block: its rows of the index, and the damage that decoding it met."""

    index: pa.Table
    damage: tuple[Damage, ...]


OpenImage = Callable[[], AbstractContextManager[Slide]]


def plan_blocks(
    slide: Slide, centres_px: Points, spec: PatchSpec, damage: Sequence[Damage] = ()
) -> list[PatchBlock]:
    """Blocks that hold every centre on the slide once, each with the halo that its patches need.

    Cores are whole tiles or strips; blocks without cells are left out. Of `damage`, known of the
    slide, each block gets what lies in its box.
    """
    halo = int(np.ceil(_reach_px(slide, spec)))
    tile_w, tile_h = slide.tile_px
    core_w = max(tile_w, BLOCK_PX // tile_w * tile_w)
    # Strips are as wide as the slide: fewer of their rows are held at once.
    rows_at_once = min(BLOCK_PX, 4 * BLOCK_PX**2 // core_w)
    core = np.array([core_w, max(tile_h, rows_at_once // tile_h * tile_h)])
    on_slide = ((centres_px >= 0) & (centres_px < slide.size_px)).all(axis=1)
    rows = np.flatnonzero(on_slide)
    column, line = (centres_px[rows] // core).astype(np.int64).T
    blocks = []
    for y, x in sorted(set(zip(line.tolist(), column.tolist(), strict=True))):
        inside = (line == y) & (column == x)
        x0, y0 = int(x * core[0]), int(y * core[1])
        box = (x0 - halo, y0 - halo, x0 + int(core[0]) + halo, y0 + int(core[1]) + halo)
        known = tuple(d for d in damage if overlaps(d.box, box))
        name = f"part-{y:05d}-{x:05d}"
        blocks.append(PatchBlock(name, box, rows[inside], centres_px[rows[inside]], known))
    return blocks


def cut_block(
    out: Path,
    open_image: OpenImage,
    spec: PatchSpec,
    grey_scale: tuple[float, float] | None,
    block: PatchBlock,
) -> str:
    """Publish the patches of one block as `out/<name>.jpgs`, and after them `<name>.parquet`.

    The table holds their rows of the index and, in its metadata, the damage that was met; where it
    is, the block is whole. Returns the name.

    The block is decoded once. A patch is a square of `spec.fov_um` centred on its cell to a
    fraction of a pixel, resampled once with an antialiasing filter. Outside the slide, and where
    it does not decode or is black, lies the slide's fill; patches over damage are marked.
    `grey_scale` holds the intensities that become 0 and 255 in a DAPI patch; None for RGB slides.
    """
    columns: dict[str, list[Any]] = {name: [] for name in INDEX_SCHEMA.names}
    with (
        open_image() as opened,
        written_aside(out / jpgs_file(block.name)) as path,
        path.open("wb") as part,
    ):
        slide, met = opened.tolerant()
        reach = _reach_px(slide, spec)
        box = _clipped(block, reach)
        pixels = slide.read(box)
        picture = Image.fromarray(as_rgb(pixels, grey_scale))
        side_px = spec.fov_um / slide.mpp
        width, height = slide.size_px
        damage = [d.box for d in (*block.damage, *met)]
        for row, (x, y) in zip(block.rows.tolist(), block.centres_px.tolist(), strict=True):
            half = side_px / 2
            edge = x < half or y < half or x > width - half or y > height - half
            seen = (x - reach, y - reach, x + reach, y + reach)
            patch = _cut(picture, box[:2], seen, (x - half, y - half, x + half, y + half), spec)
            jpeg = _encoded(patch, spec)
            damaged = any(overlaps(d, seen) for d in damage)
            values = (
                *(row, block.name, part.tell(), len(jpeg), x, y, edge, damaged),
                *_scores(patch, spec),
            )
            for name, value in zip(INDEX_SCHEMA.names, values, strict=True):
                columns[name].append(value)
            part.write(jpeg)
    report = DamageReport(damage=tuple(met)).model_dump_json()
    index = pa.table(columns, schema=INDEX_SCHEMA).replace_schema_metadata({DAMAGE_FILE: report})
    with written_aside(out / f"{block.name}.parquet") as path:
        pq.write_table(index, path)
    return block.name


def read_block(out: Path, name: str) -> CutBlock | None:
    """What `cut_block` published under this name, or None where it has not yet."""
    path = out / f"{name}.parquet"
    if not path.exists():
        return None
    table = pq.read_table(path)
    report = DamageReport.model_validate_json(table.schema.metadata[DAMAGE_FILE.encode()])
    return CutBlock(table.replace_schema_metadata(), report.damage)


def jpgs_file(name: str) -> str:
    return f"{name}.jpgs"


def overlaps(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether two half-open boxes share a place."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _reach_px(slide: Slide, spec: PatchSpec) -> float:
    """How far from its centre a patch sees: half its side, and what the cubic filter adds."""
    side_px = spec.fov_um / slide.mpp
    return side_px / 2 + FILTER_REACH * max(1.0, side_px / spec.size_px)


def _clipped(block: PatchBlock, reach_px: float) -> Box:
    """The part of the block's box that its patches touch, so that sparse blocks decode little."""
    x0, y0 = np.floor(block.centres_px.min(axis=0) - reach_px).astype(int)
    x1, y1 = np.ceil(block.centres_px.max(axis=0) + reach_px).astype(int)
    return (
        max(block.box[0], int(x0)),
        max(block.box[1], int(y0)),
        min(block.box[2], int(x1)),
        min(block.box[3], int(y1)),
    )


def _cut(
    picture: Image.Image,
    corner: tuple[int, ...],
    seen: tuple[float, ...],
    field: tuple[float, ...],
    spec: PatchSpec,
) -> npt.NDArray[np.uint8]:
    # Pillow's box is in continuous pixel coordinates, as ours are, but of 32 bits: it is told from
    # beside the patch, so that a patch has the same bytes wherever its block begins, which depends
    # on the other cells. Its resize is antialiased.
    x0, y0 = (int(np.floor(v)) for v in seen[:2])
    x1, y1 = (int(np.ceil(v)) for v in seen[2:])
    near = picture.crop((x0 - corner[0], y0 - corner[1], x1 - corner[0], y1 - corner[1]))
    patch = near.resize(
        (spec.size_px, spec.size_px),
        Image.Resampling.BICUBIC,
        box=(field[0] - x0, field[1] - y0, field[2] - x0, field[3] - y0),
    )
    return np.ascontiguousarray(patch)


def _scores(patch: npt.NDArray[np.uint8], spec: PatchSpec) -> list[float | None]:
    """In the order of SCORES; they are of stained tissue, so a DAPI patch has none."""
    if spec.image == "morphology":
        return [None] * len(SCORES)
    scores = measure(patch, spec.mpp, [(0, 0)], spec.size_px)
    values = (float(getattr(scores, name)[0]) for name in SCORES)
    return [None if np.isnan(value) else value for value in values]


def _encoded(patch: npt.NDArray[np.uint8], spec: PatchSpec) -> bytes:
    jpeg: bytes = simplejpeg.encode_jpeg(
        patch,
        quality=spec.jpeg_quality,
        colorspace="RGB",
        colorsubsampling="420",
    )
    return jpeg


def as_rgb(
    pixels: npt.NDArray[Any], grey_scale: tuple[float, float] | None
) -> npt.NDArray[np.uint8]:
    """(Y, X, 3) for the eye: RGB as it is, DAPI (Y, X, 1) with `grey_scale` from 0 to 255."""
    if grey_scale is None:
        return np.ascontiguousarray(pixels, dtype=np.uint8)
    low, high = grey_scale
    scaled = ((pixels[..., :1].astype(np.float32) - low) / (high - low) * 255).round()
    return np.repeat(scaled.clip(0, 255).astype(np.uint8), 3, axis=2)
