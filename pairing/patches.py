"""Slide blocks and cells to patches: every croppable cell, cut once, from decoded blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image

from pairing.geometry import Box, Points
from pairing.slide import Damage, Slide
from pairing.slide_damage import merged
from pairing.slide_image import FILTER_REACH
from pairing.xenium import open_xenium
from shards.errors import BadInput
from shards.schema import PatchSpec, Record

INDEX_FILE = "index.parquet"
DAMAGE_FILE = "damage.json"
STAGE_VERSION = 2

# Side of a block's core in level-0 pixels: whole tiles of the slide, about this size, so that a
# tile is decoded for one core and at most for its neighbours' halos.
BLOCK_PX = 2048

# The two ends of the grey scale of a DAPI patch, as percentiles of what the run imaged.
DAPI_PERCENTILES = (1.0, 99.8)

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
MapBlocks = Callable[[Callable[[PatchBlock], CutBlock], Iterable[PatchBlock]], Iterable[CutBlock]]


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


@contextmanager
def open_run_morphology(bundle: Path) -> Iterator[Slide]:
    """The DAPI image of a bundle as a slide, for patches of `image = "morphology"`."""
    with open_xenium(bundle) as run, run.open_morphology() as slide:
        yield slide


def cut_block(
    out: Path,
    open_image: OpenImage,
    spec: PatchSpec,
    grey_scale: tuple[float, float] | None,
    block: PatchBlock,
) -> CutBlock:
    """Cut the patches of one block into `out/<name>.jpgs`; returns their rows of the index.

    The block is decoded once. A patch is a square of `spec.fov_um` centred on its cell to a
    fraction of a pixel, resampled once with an antialiasing filter. Outside the slide, and where
    it does not decode or is black, lies the slide's fill; patches over damage are marked.
    `grey_scale` holds the intensities that become 0 and 255 in a DAPI patch; None for RGB slides.
    """
    path = out / f"{block.name}.jpgs"
    columns: dict[str, list[Any]] = {name: [] for name in INDEX_SCHEMA.names}
    with open_image() as opened, path.open("wb") as part:
        slide, met = opened.tolerant()
        reach = _reach_px(slide, spec)
        box = _clipped(block, reach)
        pixels = slide.read(box)
        picture = Image.fromarray(as_rgb(pixels, grey_scale))
        side_px = spec.fov_um / slide.mpp
        width, height = slide.size_px
        damage = [d.box for d in (*block.damage, *met)]
        for row, (x, y) in zip(block.rows.tolist(), block.centres_px.tolist(), strict=True):
            jpeg = _cut(picture, x - box[0], y - box[1], side_px, spec)
            half = side_px / 2
            edge = x < half or y < half or x > width - half or y > height - half
            seen = (x - reach, y - reach, x + reach, y + reach)
            damaged = any(overlaps(d, seen) for d in damage)
            values = (row, block.name, part.tell(), len(jpeg), x, y, edge, damaged)
            for name, value in zip(INDEX_SCHEMA.names, values, strict=True):
                columns[name].append(value)
            part.write(jpeg)
    return CutBlock(pa.table(columns, schema=INDEX_SCHEMA), tuple(met))


def overlaps(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether two half-open boxes share a place."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def write_patches(
    out: Path,
    open_image: OpenImage,
    centres_px: Points,
    spec: PatchSpec,
    map_blocks: MapBlocks,
) -> dict[str, Any]:
    """Cut the patches of all cells into `out`; returns the figures of the stage.

    `map_blocks(cut, blocks)` runs `cut` over the blocks anywhere, in any order; the index is
    sorted by cell, so the result does not depend on that order. Both arguments can be pickled.
    """
    with open_image() as opened:
        if spec.image == "he":
            opened.require_rgb()
        slide, _ = opened.tolerant()
        known = slide.find_damage(centres_px)
        blocks = plan_blocks(slide, centres_px, spec, known)
        grey_scale = _dapi_scale(slide) if spec.image == "morphology" else None
        decoded_px = sum((b.box[2] - b.box[0]) * (b.box[3] - b.box[1]) for b in blocks)
        slide_px = slide.size_px[0] * slide.size_px[1]
    cut = partial(cut_block, out, open_image, spec, grey_scale)
    done = list(map_blocks(cut, blocks))
    index = pa.concat_tables([INDEX_SCHEMA.empty_table(), *(d.index for d in done)]).sort_by("row")
    pq.write_table(index, out / INDEX_FILE)
    damage = merged([*known, *(d for block in done for d in block.damage)], slide.tile_px)
    report = DamageReport(damage=tuple(damage))
    (out / DAMAGE_FILE).write_text(report.model_dump_json(indent=1) + "\n")
    return {
        "n_cut": index.num_rows,
        "n_outside_slide": len(centres_px) - index.num_rows,
        "n_edge": int(np.count_nonzero(index["edge"].to_numpy())),
        "n_damaged_tiles": len(damage),
        "n_on_damaged_tile": int(np.count_nonzero(index["damaged_tile"].to_numpy())),
        "n_blocks": len(blocks),
        "decoded_share_of_slide": round(decoded_px / slide_px, 4),
        "grey_scale": grey_scale,
        "slide_notes": list(slide.notes),
    }


class PatchReader:
    """Reads patches of a patches artifact by their index rows; closes its files at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: tuple[str, Any] | None = None

    def read(self, part: str, offset: int, size: int) -> bytes:
        if self._open is None or self._open[0] != part:
            self.close()
            self._open = (part, (self._folder / f"{part}.jpgs").open("rb"))
        self._open[1].seek(offset)
        data: bytes = self._open[1].read(size)
        return data

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


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


def _cut(picture: Image.Image, x: float, y: float, side_px: float, spec: PatchSpec) -> bytes:
    # Pillow's box is in continuous pixel coordinates, as ours are; its resize is antialiased.
    half = side_px / 2
    patch = picture.resize(
        (spec.size_px, spec.size_px),
        Image.Resampling.BICUBIC,
        box=(x - half, y - half, x + half, y + half),
    )
    jpeg: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(patch),
        quality=spec.jpeg_quality,
        colorspace="RGB",
        colorsubsampling="420",
    )
    return jpeg


def _dapi_scale(slide: Slide) -> tuple[float, float]:
    """Low and high intensity of the run, from its coarsest level of at least 256 px.

    Pixels of 0 were never imaged: the instrument scans the fields of view that were asked for and
    leaves the rest of the picture at 0. Raises BadInput where nothing was imaged.
    """
    levels = [i for i, level in enumerate(slide.levels) if min(level.size_px) >= 256] or [0]
    level = levels[-1]
    width, height = slide.levels[level].size_px
    pixels = slide.read((0, 0, width, height), level)
    if not pixels.any():
        raise BadInput(
            slide.path,
            expected="a DAPI image",
            found="pixels of 0 alone",
            remedy="copy the morphology image again from the instrument's output",
        )
    low, high = np.percentile(pixels[pixels > 0], DAPI_PERCENTILES)
    return float(low), float(max(high, low + 1))


def as_rgb(
    pixels: npt.NDArray[Any], grey_scale: tuple[float, float] | None
) -> npt.NDArray[np.uint8]:
    """(Y, X, 3) for the eye: RGB as it is, DAPI (Y, X, 1) with `grey_scale` from 0 to 255."""
    if grey_scale is None:
        return np.ascontiguousarray(pixels, dtype=np.uint8)
    low, high = grey_scale
    scaled = ((pixels[..., :1].astype(np.float32) - low) / (high - low) * 255).round()
    return np.repeat(scaled.clip(0, 255).astype(np.uint8), 3, axis=2)
