"""Slide and cells to patches: every croppable cell, cut once, from decoded blocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pairing.geometry import Points
from pairing.pack_plan import Rows
from pairing.patch_blocks import (
    DAMAGE_FILE,
    INDEX_SCHEMA,
    DamageReport,
    Look,
    OpenImage,
    PatchBlock,
    cut_block,
    jpgs_file,
    plan_blocks,
    read_block,
)
from pairing.slide import Slide
from pairing.slide_damage import merged
from pairing.xenium import open_xenium
from shards.advice import here_and_there, will_need
from shards.artifact import Made, link_or_copy, make_left
from shards.errors import BadInput
from shards.schema import PatchSpec

INDEX_FILE = "index.parquet"
STAGE_VERSION = 5

# The two ends of the grey scale of a DAPI patch, as percentiles of what the run imaged.
DAPI_PERCENTILES = (1.0, 99.8)

MapBlocks = Callable[[Callable[[PatchBlock], str], Collection[PatchBlock]], Iterable[str]]


@contextmanager
def open_run_morphology(bundle: Path) -> Iterator[Slide]:
    """The DAPI image of a bundle as a slide, for patches of `image = "morphology"`."""
    with open_xenium(bundle) as run, run.open_morphology() as slide:
        yield slide


def write_patches(
    out: Path,
    kept: Path,
    open_image: OpenImage,
    centres_px: Points,
    order: Rows,
    spec: PatchSpec,
    map_blocks: MapBlocks,
) -> Made:
    """Cut the patches of all cells into `out`; returns the figures of the stage.

    `order` has the rows of all cells in the order of the shards, in which patches of a part lie.
    Blocks are published one by one in `kept`; those that lie there already are not cut again.
    `map_blocks(cut, blocks)` runs `cut` over the blocks anywhere, in any order; the index is
    sorted by cell, so the result does not depend on that order. Both arguments can be pickled.
    """
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    with open_image() as opened:
        if spec.image == "he":
            opened.require_rgb()
        slide, _ = opened.tolerant()
        known = slide.find_damage(centres_px)
        blocks, plan = plan_blocks(slide, centres_px, spec, ranks, known)
        grey_scale = _dapi_scale(slide) if spec.image == "morphology" else None
        look = Look(grey_scale, slide.fill)
        slide_tiles = np.ceil(np.divide(slide.size_px, slide.tile_px))
    left = [block for block in blocks if read_block(kept, block.name) is None]
    make_left(map_blocks, partial(cut_block, kept, open_image, spec, look), left, len(blocks))
    done = []
    for block in blocks:
        cut = read_block(kept, block.name)
        assert cut is not None, block.name
        done.append(cut)
        link_or_copy(kept / jpgs_file(block.name), out / jpgs_file(block.name))
    index = pa.concat_tables([INDEX_SCHEMA.empty_table(), *(d.index for d in done)]).sort_by("row")
    pq.write_table(index, out / INDEX_FILE)
    damage = merged([*known, *(d for block in done for d in block.damage)], slide.tile_px)
    report = DamageReport(damage=tuple(damage))
    n_decoded = sum(block.n_decoded for block in done)
    (out / DAMAGE_FILE).write_text(report.model_dump_json(indent=1) + "\n")
    summary = {
        "n_cut": index.num_rows,
        "n_outside_slide": len(centres_px) - index.num_rows,
        "n_edge": int(np.count_nonzero(index["edge"].to_numpy())),
        "n_damaged_tiles": len(damage),
        "n_on_damaged_tile": int(np.count_nonzero(index["damaged_tile"].to_numpy())),
        "n_blocks": len(blocks),
        "n_tiles": plan.n_tiles,
        "decoded_share_of_slide": round(n_decoded / float(slide_tiles.prod()), 4),
        "redecoded_share": round(n_decoded / max(plan.n_tiles, 1) - 1, 4),
        "grey_scale": grey_scale,
        "slide_notes": list(slide.notes),
    }
    hashes = {jpgs_file(block.name): cut.sha256 for block, cut in zip(blocks, done, strict=True)}
    return Made(summary, hashes)


# Patches of no shard, or of another donor's, that are read along between two that are wanted.
_GAP_BYTES = 128 * 2**10


class PatchReader:
    """Reads patches of a patches artifact by their index rows; closes its file at the end.

    One part is open at a time: whoever reads many goes through them part by part.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: tuple[str, BinaryIO] | None = None

    def expect(
        self, part: str, offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
    ) -> None:
        """Have the system fetch these of a part, by ascending offset, before they are read.

        One by one each waits for its way to the disk and back: of a run larger than the system's
        cache a shard would take minutes. Those that lie close to each other are one request.
        """
        ends = offsets + sizes
        gap = np.flatnonzero(offsets[1:] - ends[:-1] > _GAP_BYTES)
        starts, stops = np.append(offsets[:1], offsets[gap + 1]), np.append(ends[gap], ends[-1:])
        with (self._folder / jpgs_file(part)).open("rb", buffering=0) as file:
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
                will_need(file.fileno(), start, stop)

    def read(self, part: str, offset: int, size: int) -> bytes:
        if self._open is None or self._open[0] != part:
            self.close()
            self._open = (part, (self._folder / jpgs_file(part)).open("rb", buffering=0))
            here_and_there(self._open[1].fileno())  # or the system reads 128 kB around each
        data = os.pread(self._open[1].fileno(), size, offset)
        if len(data) < size:
            raise EOFError(f"{self._folder / jpgs_file(part)} ends before byte {offset + size}")
        return data

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


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
