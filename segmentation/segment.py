"""Nuclei of a slide: plan blocks, map them, collect one table. The map is handed in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from pydantic import Field

from pairing.slide import open_slide
from segmentation.blocks import GRID_PX, Block, plan_blocks
from segmentation.network import load_model, weights_digest
from segmentation.outlines import NUCLEI_SCHEMA, nuclei_table
from segmentation.pictures import nuclei_geojson, overview_picture
from shards.schema import Record

__all__ = [
    "NUCLEI_FILE",
    "STAGE_VERSION",
    "SegmentationConfig",
    "collect",
    "segment",
    "segment_block",
    "segment_slide_to",
    "weights_digest",
    "write_nuclei",
]

log = logging.getLogger("cellpair")

STAGE_VERSION = 2
NUCLEI_FILE = "nuclei.parquet"
# Two outlines of different blocks that share more than this are one nucleus seen twice.
_DOUBLE_IOU = 0.5


class SegmentationConfig(Record):
    """What changes the nuclei that are found.

    `model` is "compact" or a path to Cellpose 4 weights; block and halo are in pixels of the
    network's mpp. A halo of 64 px holds a nucleus and the way its pixels flow.
    """

    model: str = "compact"
    block_px: int = Field(default=1024, ge=GRID_PX, multiple_of=GRID_PX)
    halo_px: int = Field(default=64, ge=0, multiple_of=GRID_PX)

    def fingerprint_config(self) -> dict[str, Any]:
        """All of it but the path of the weights: their content enters by `weights_digest`."""
        return self.model_dump(exclude={"model"})


class BlockMap(Protocol):
    """`map`, or anything that does the same on workers, in any order."""

    def __call__(
        self, fn: Callable[[Block], tuple[int, pa.Table]], items: Iterable[Block], /
    ) -> Iterable[tuple[int, pa.Table]]: ...


def segment_block(
    block: Block, *, slide_path: Path, slide_mpp: float | None, model: str, device: str
) -> tuple[int, pa.Table]:
    """The index of a block and the nuclei that it owns. Pure: path and block in, table out.

    `slide_mpp` overrules the slide's own pixel size. Where the slide is damaged it is read as
    glass, which holds no nuclei, and a warning is logged. Raises BadInput as `open_slide` and
    `load_model`.
    """
    network = load_model(model, device)
    with open_slide(slide_path, mpp=slide_mpp) as opened:
        slide, damage = opened.tolerant()
        rgb = slide.read_at(block.read, network.mpp)
        for kind, box in sorted({(d.kind, d.box) for d in damage}):
            log.warning("%s: %s at %s px, where no nuclei are looked for", slide_path, kind, box)
        labels, logit = network.find(rgb)
        return block.index, nuclei_table(labels, logit, block, network.mpp, slide.mpp)


def collect(parts: Iterable[tuple[int, pa.Table]]) -> pa.Table:
    """One table of the blocks' nuclei, whatever order they come in; ids run from 1.

    A nucleus that two blocks own, since each saw its centroid a little on its own side, is kept
    once: as the block with the lower index saw it.
    """
    ordered = sorted(parts, key=lambda part: part[0])
    tables = [table for _, table in ordered]
    table = pa.concat_tables([NUCLEI_SCHEMA.empty_table(), *tables]).combine_chunks()
    block_of_row = np.repeat(
        [index for index, _ in ordered], [len(part) for part in tables]
    ).astype(np.int64)
    polygons = shapely.from_wkb(table["polygon_px"].to_pylist())
    first, second = shapely.STRtree(polygons).query(polygons, predicate="intersects")
    across = block_of_row[first] < block_of_row[second]
    first, second = first[across], second[across]
    shared = shapely.area(shapely.intersection(polygons[first], polygons[second]))
    union = shapely.area(polygons[first]) + shapely.area(polygons[second]) - shared
    keep = np.ones(len(table), bool)
    keep[second[shared > _DOUBLE_IOU * union]] = False
    kept = table.filter(pa.array(keep))
    ids = pa.array(np.arange(1, len(kept) + 1, dtype=np.int64))
    return kept.set_column(0, NUCLEI_SCHEMA.field("nucleus_id"), ids)


def segment(
    slide_path: Path,
    config: SegmentationConfig,
    *,
    mpp: float | None = None,
    device: str = "auto",
    map_blocks: BlockMap = map,
) -> pa.Table:
    """All nuclei of a slide, in NUCLEI_SCHEMA.

    `mpp` overrules the slide's own pixel size; `device` and `map_blocks` say where the work is done
    and don't change a byte on CPUs. Raises BadInput where slide or weights can't be used.
    """
    network_mpp = load_model(config.model, device).mpp
    with open_slide(slide_path, mpp=mpp) as slide:
        slide.require_rgb()
        blocks = plan_blocks(slide, network_mpp, config.block_px, config.halo_px)
    work = partial(
        segment_block, slide_path=slide_path, slide_mpp=mpp, model=config.model, device=device
    )
    return collect(map_blocks(work, blocks))


def write_nuclei(
    out: Path,
    slide_path: Path,
    config: SegmentationConfig,
    *,
    mpp: float | None = None,
    device: str = "auto",
    map_blocks: BlockMap = map,
) -> dict[str, Any]:
    """As `segment`, into `out/nuclei.parquet`; what was found, in figures."""
    table = segment(slide_path, config, mpp=mpp, device=device, map_blocks=map_blocks)
    pq.write_table(table, out / NUCLEI_FILE)
    return {"n_nuclei": len(table), "weights_sha256": weights_digest(config.model)}


def segment_slide_to(
    out: Path,
    slide: Path,
    *,
    mpp: float | None = None,
    model: str = "compact",
    device: str = "auto",
    map_blocks: BlockMap = map,
) -> int:
    """Nuclei of a plain slide or picture: parquet, GeoJSON and an overview picture in `out`.

    Returns how many nuclei there are.
    """
    table = segment(
        slide, SegmentationConfig(model=model), mpp=mpp, device=device, map_blocks=map_blocks
    )
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, out / NUCLEI_FILE)
    (out / "nuclei.geojson").write_text(nuclei_geojson(table))
    with open_slide(slide, mpp=mpp) as opened:
        overview_picture(opened.tolerant()[0], table).save(out / "overview.png")
    return len(table)
