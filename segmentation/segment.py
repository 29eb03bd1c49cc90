"""Nuclei of a slide: plan blocks, map them, collect one table. The map is handed in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from pairing.slide import Damage, open_slide
from segmentation.blocks import Block, plan_blocks
from segmentation.config import NUCLEI_FILE, SegmentationConfig, weights_digest
from segmentation.network import load_model
from segmentation.outlines import NUCLEI_SCHEMA, nuclei_table
from segmentation.pictures import nuclei_geojson, overview_picture
from shards.artifact import tell_found, write_atomically, written_aside
from shards.errors import BadInput
from shards.schema import Record

log = logging.getLogger("cellpair")

_FACTS = b"cellpair.block"
# Two outlines of different blocks that share more than this are one nucleus seen twice.
_DOUBLE_IOU = 0.5


class BlockMap(Protocol):
    """`map`, or anything that does the same on workers, in any order."""

    def __call__(
        self, fn: Callable[[Block], SegmentedBlock], items: Collection[Block], /
    ) -> Iterable[SegmentedBlock]: ...


class BlockFacts(Record):
    """How a block was segmented: on which kind of device, and what damage it met there."""

    device: str
    damage: tuple[Damage, ...]


@dataclass(frozen=True, slots=True)
class SegmentedBlock:
    """The nuclei that a block owns, in NUCLEI_SCHEMA."""

    index: int
    table: pa.Table
    facts: BlockFacts


def segment_block(
    block: Block,
    *,
    kept: Path | None,
    slide_path: Path,
    slide_mpp: float | None,
    model: str,
    device: str,
) -> SegmentedBlock:
    """Segment one block; publish it in the folder `kept` where there is one.

    `slide_mpp` overrules the slide's own pixel size. Where the slide is damaged it is read as
    glass, which holds no nuclei. Raises BadInput as `open_slide` and `load_model`.
    """
    network = load_model(model, device)
    with open_slide(slide_path, mpp=slide_mpp) as opened:
        slide, damage = opened.tolerant()
        rgb = slide.read_at(block.read, network.mpp)
        labels, logit = network.find(rgb)
        table = nuclei_table(labels, logit, block, network.mpp, slide.mpp)
    facts = BlockFacts(device=network.device, damage=tuple(sorted(set(damage), key=str)))
    if kept is not None:
        with written_aside(_path_of(kept, block)) as path:
            pq.write_table(table.replace_schema_metadata({_FACTS: facts.model_dump_json()}), path)
    return SegmentedBlock(block.index, table, facts)


def read_block(kept: Path, block: Block) -> SegmentedBlock | None:
    """What `segment_block` published, or None where it has not yet."""
    path = _path_of(kept, block)
    if not path.exists():
        return None
    table = pq.read_table(path)
    facts = BlockFacts.model_validate_json(table.schema.metadata[_FACTS])
    return SegmentedBlock(block.index, table.replace_schema_metadata(), facts)


def _path_of(kept: Path, block: Block) -> Path:
    return kept / f"block-{block.index:06d}.parquet"


def collect(parts: Iterable[tuple[int, pa.Table]]) -> pa.Table:
    """One table of the blocks' nuclei, whatever order they come in; ids run from 1.

    A nucleus that two blocks own, since each saw its centroid a little on its own side, is kept
    once: as the block with the lower index saw it.
    """
    ordered = sorted(parts, key=lambda part: part[0])
    tables = [table for _, table in ordered]
    table = pa.concat_tables([NUCLEI_SCHEMA.empty_table(), *tables]).combine_chunks()
    block_of_row = np.repeat(
        [index for index, _ in ordered], [len(table) for table in tables]
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


def segment_blocks(
    slide_path: Path,
    config: SegmentationConfig,
    *,
    mpp: float | None = None,
    device: str = "auto",
    map_blocks: BlockMap = map,
    kept: Path | None = None,
) -> list[SegmentedBlock]:
    """The blocks of a slide, segmented.

    `mpp` overrules the slide's own pixel size; `device` and `map_blocks` say where the work is done
    and don't change a byte on CPUs. With `kept`, blocks are published there one by one, and those
    that lie there already are not segmented again, unless on another kind of device. Raises
    BadInput where slide or weights can't be used, or where workers differ in their device.
    """
    network_mpp = load_model(config.model, device).mpp
    with open_slide(slide_path, mpp=mpp) as slide:
        slide.require_rgb()
        blocks = plan_blocks(slide, network_mpp, config.block_px, config.halo_px)
    work = partial(
        segment_block,
        kept=kept,
        slide_path=slide_path,
        slide_mpp=mpp,
        model=config.model,
        device=device,
    )
    found = [read_block(kept, block) for block in blocks] if kept is not None else []
    parts = {part.index: part for part in found if part is not None}
    tell_found(len(parts), len(blocks))
    made = {p.index: p for p in map_blocks(work, [b for b in blocks if b.index not in parts])}
    devices = {part.facts.device for part in made.values()}
    # What another kind of device found is not quite what this one finds.
    foreign = {i for i, part in parts.items() if devices and part.facts.device not in devices}
    if foreign:
        log.info("%d blocks were segmented on another kind of device: again", len(foreign))
        made |= {p.index: p for p in map_blocks(work, [b for b in blocks if b.index in foreign])}
    parts |= made
    devices = {part.facts.device for part in parts.values()}
    if len(devices) > 1:
        raise BadInput(
            "workers",
            expected="one kind of device for all blocks of a slide",
            found=", ".join(sorted(devices)),
            remedy="give --device cpu, or the resource GPU to those workers alone that have one",
        )
    for kind, box in sorted({(d.kind, d.box) for p in parts.values() for d in p.facts.damage}):
        log.warning("%s: %s at %s px, where no nuclei are looked for", slide_path, kind, box)
    return list(parts.values())


def segment(
    slide_path: Path,
    config: SegmentationConfig,
    *,
    mpp: float | None = None,
    device: str = "auto",
    map_blocks: BlockMap = map,
) -> pa.Table:
    """All nuclei of a slide, in NUCLEI_SCHEMA; as `segment_blocks`."""
    parts = segment_blocks(slide_path, config, mpp=mpp, device=device, map_blocks=map_blocks)
    return collect((part.index, part.table) for part in parts)


def write_nuclei(
    out: Path,
    kept: Path,
    slide_path: Path,
    config: SegmentationConfig,
    *,
    mpp: float | None = None,
    device: str = "auto",
    map_blocks: BlockMap = map,
) -> dict[str, Any]:
    """As `segment_blocks`, into `out/nuclei.parquet`; what was found, in figures, and on what."""
    parts = segment_blocks(
        slide_path, config, mpp=mpp, device=device, map_blocks=map_blocks, kept=kept
    )
    table = collect((part.index, part.table) for part in parts)
    pq.write_table(table, out / NUCLEI_FILE)
    return {
        "n_nuclei": len(table),
        "weights_sha256": weights_digest(config.model),
        # GPUs are not bit-stable, so that it belongs to what was found.
        "devices": sorted({part.facts.device for part in parts}),
    }


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
    with written_aside(out / NUCLEI_FILE) as path:
        pq.write_table(table, path)
    write_atomically(out / "nuclei.geojson", nuclei_geojson(table).encode())
    with open_slide(slide, mpp=mpp) as opened, written_aside(out / "overview.png") as path:
        overview_picture(opened.tolerant()[0], table).save(path, format="PNG")
    return len(table)
