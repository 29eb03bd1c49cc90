"""Nuclei of a slide: plan, run windows and blocks as they become ready, collect one table."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pairing.slide import open_slide
from segmentation.blocks import TISSUE_MPP, Block, plan_blocks, tissue_mask
from segmentation.collect import collect_nuclei, is_published, publish_block, remove_blocks
from segmentation.config import (
    BLOCK_PX,
    FACTS_FILE,
    NUCLEI_FILE,
    SegmentationConfig,
    SegmentationFacts,
    require_usable,
)
from segmentation.dynamics import kind_of_device
from segmentation.maps import InTurn, Maps, Tasks
from segmentation.network import load_model
from segmentation.nuclei import find_nuclei, halo_px
from segmentation.stain import Normalisation, percentile_scale
from segmentation.windows import (
    Group,
    GroupFacts,
    SlideSource,
    WindowGrid,
    has_outputs,
    plan_windows,
    read_field,
    read_group_facts,
    remove_group,
    remove_outputs,
    run_groups,
)
from shards.artifact import tell_found, write_atomically
from shards.errors import BadInput

log = logging.getLogger("cellpair")

# On a GPU so many groups are one task: the next is decoded while the network runs.
_GPU_GROUPS_A_TASK = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """All that any task on a slide needs to know; `kept` is where windows and blocks are kept."""

    source: SlideSource
    slide_mpp: float
    grid: WindowGrid
    normalisation: Normalisation
    model: str
    weights_sha256: str
    device: str
    kept: Path


@dataclass(frozen=True, slots=True)
class Segmented:
    """What was done and found, and the grid and blocks whose masks are kept."""

    facts: SegmentationFacts
    grid: WindowGrid
    blocks: tuple[Block, ...]


def run_windows(plan: Plan, groups: tuple[Group, ...]) -> list[tuple[Group, GroupFacts]]:
    """The network over groups of windows, published in `plan.kept`.

    Raises BadInput where the name of the model means other weights here.
    """
    network = load_model(plan.model, plan.device)
    if network.weights_sha256 != plan.weights_sha256:
        raise BadInput(
            f"model = {plan.model!r} on a worker",
            expected=f"the weights of the planner, SHA-256 {plan.weights_sha256}",
            found=network.weights_sha256,
            remedy="copy the same file to every machine",
        )
    return run_groups(
        groups, kept=plan.kept, source=plan.source, grid=plan.grid,
        normalisation=plan.normalisation, network=network,
    )  # fmt: skip


def segment_block(plan: Plan, block: Block) -> Block:
    """The nuclei that a block owns, published in `plan.kept`; returns the block.

    All windows that touch the block and its halo are there.
    """
    halo = halo_px(plan.grid.mpp)
    box = block.read_box(halo)
    field = read_field(plan.kept, plan.grid, box)
    found = find_nuclei(field, box[:2], block.core, plan.grid.mpp, kind_of_device(plan.device))
    publish_block(plan.kept, block, found, plan.grid.mpp, plan.slide_mpp)
    return block


def segment(
    out: Path,
    kept: Path,
    slide_path: Path,
    config: SegmentationConfig,
    *,
    mpp: float | None = None,
    device: str = "auto",
    maps: Maps | None = None,
    block_px: int = BLOCK_PX,
) -> Segmented:
    """All nuclei of a slide into the file `out`, in NUCLEI_SCHEMA.

    What lies in the folder `kept` from an earlier call on the same slide and config is not done
    again, unless it was done on another kind of device. `mpp` overrules the slide's own pixel
    size; `device`, `maps` and `block_px` say how the work is done and change no byte on CPUs.
    Raises BadInput where slide or weights can't be used, or where workers differ in their device.
    """
    maps = maps or InTurn()
    plan = plan_slide(kept, slide_path, config, mpp, device)
    blocks = plan_blocks(plan.grid, block_px)
    ran_on = _run(plan, blocks, maps)
    met = [read_group_facts(kept, group) for group in plan.grid.groups()]
    damage = {d for facts in met if facts is not None for d in facts.damage}
    ordered = tuple(sorted(damage, key=lambda d: (d.kind, d.box)))
    for d in ordered:
        log.warning("%s: %s at %s px, where no nuclei are looked for", slide_path, d.kind, d.box)
    with open_slide(slide_path, mpp=mpp) as slide:
        n_nuclei = collect_nuclei(out, kept, blocks, slide, ordered, plan.grid.size_px)
    n_windows = int(plan.grid.shown.sum())
    if not n_windows:
        log.warning("%s: no tissue was found, so no nuclei", slide_path)
    facts = SegmentationFacts(
        slide_mpp=plan.slide_mpp,
        network_mpp=plan.grid.mpp,
        weights_sha256=plan.weights_sha256,
        device=ran_on,
        n_nuclei=n_nuclei,
        n_windows=n_windows,
        n_empty_windows=_n_empty_windows(out, plan),
        looked_at_mm2=n_windows * (plan.grid.stride_px * plan.grid.mpp / 1000) ** 2,
        damage=ordered,
    )
    return Segmented(facts, plan.grid, tuple(blocks))


def _n_empty_windows(nuclei: Path, plan: Plan) -> int:
    table = pq.read_table(nuclei, columns=["x_px", "y_px"])
    stride_px = plan.grid.stride_px * plan.grid.mpp / plan.slide_mpp
    column, row = (
        (table[name].to_numpy() // stride_px).astype(np.int64) for name in ("x_px", "y_px")
    )
    empty = plan.grid.shown.copy()
    empty[row, column] = False
    return int(empty.sum())


def plan_slide(
    kept: Path, slide_path: Path, config: SegmentationConfig, mpp: float | None, device: str
) -> Plan:
    """The windows of a slide and what tasks on it need. Raises BadInput as `segment`."""
    network = load_model(config.model, device)
    with open_slide(slide_path, mpp=mpp) as slide:
        require_usable(slide)
        width, height = (math.ceil(n * slide.mpp / network.mpp) for n in slide.size_px)
        tissue = tissue_mask(slide)
        grid = WindowGrid.over((width, height), network.mpp, network.window_px, network.overlap_px)
        grid = plan_windows(grid, tissue, TISSUE_MPP)
        normalisation = Normalisation(kind="optical_density")
        if network.normalisation == "percentiles" and grid.shown.any():
            normalisation = percentile_scale(slide, tissue, TISSUE_MPP)
        source = SlideSource(slide_path, mpp)
        return Plan(
            source, slide.mpp, grid, normalisation,
            config.model, network.weights_sha256, device, kept,
        )  # fmt: skip


def _run(plan: Plan, blocks: list[Block], maps: Maps) -> str:
    """Run what is missing of windows and blocks; returns on which kind of device."""
    (device,) = maps.on_gpu(partial(_device_of, plan.model), Tasks([plan.device], "networks"))
    groups = plan.grid.groups()
    ran = {g: f for g in groups if (f := read_group_facts(plan.kept, g)) is not None}
    foreign = {group for group, facts in ran.items() if facts.device != device}
    if foreign:
        # What another kind of device found is not quite what this one finds.
        log.info("%d groups of windows were run on another kind of device: again", len(foreign))
        remove_blocks(plan.kept)
        for group in foreign:
            remove_group(plan.kept, group)
    left = [block for block in blocks if not is_published(plan.kept, block)]
    tell_found(len(blocks) - len(left), len(blocks))
    needed = {block: plan.grid.groups_of(block.read_box(halo_px(plan.grid.mpp))) for block in left}
    wanted = set().union(*needed.values())
    done = {group for group in ran if has_outputs(plan.kept, group)}
    for group in done - wanted:  # left by a process that was killed
        remove_outputs(plan.kept, group)
    missing = [group for group in groups if group in wanted - done]
    side = _GPU_GROUPS_A_TASK if device.startswith("cuda") else 1
    tasks = [tuple(missing[i : i + side]) for i in range(0, len(missing), side)]
    made = iter(maps.on_gpu(partial(run_windows, plan), Tasks(tasks, "groups of windows")))
    # Any worker takes them, on its GPU if it has one: what they find is the same.
    n_waiting = Counter(group for of_block in needed.values() for group in of_block)
    for block in maps(partial(segment_block, plan), _Ready(needed, done, made, device)):
        n_waiting.subtract(needed[block])
        for group in needed[block]:
            if not n_waiting[group]:
                remove_outputs(plan.kept, group)
    for _ in made:  # none is left, but who maps them tells that they are through
        pass
    return device


def _device_of(model: str, device: str) -> str:
    return load_model(model, device).device


class _Ready:
    """Blocks one after the other, each as soon as all windows are there that it needs."""

    def __init__(
        self,
        needed: dict[Block, set[Group]],
        done: set[Group],
        made: Iterator[list[tuple[Group, GroupFacts]]],
        device: str,
    ) -> None:
        self._needed = needed
        self._done = done
        self._made = made
        self._device = device

    def __len__(self) -> int:
        return len(self._needed)

    def __iter__(self) -> Iterator[Block]:
        for block, groups in self._needed.items():
            while not groups <= self._done:
                for group, facts in next(self._made):
                    if facts.device != self._device:
                        raise BadInput(
                            "workers",
                            expected="one kind of device for all windows of a slide",
                            found=f"{self._device}, {facts.device}",
                            remedy="give --device cpu, or the resource GPU to those workers alone "
                            "that have one",
                        )
                    self._done.add(group)
            yield block


def write_nuclei(
    out: Path,
    kept: Path,
    slide_path: Path,
    config: SegmentationConfig,
    *,
    mpp: float | None = None,
    device: str = "auto",
    maps: Maps | None = None,
    block_px: int = BLOCK_PX,
) -> dict[str, Any]:
    """As `segment`, into files of the folder `out`; what was found, in figures, and on what."""
    done = segment(
        out / NUCLEI_FILE, kept, slide_path, config,
        mpp=mpp, device=device, maps=maps, block_px=block_px,
    )  # fmt: skip
    facts = done.facts
    write_atomically(out / FACTS_FILE, facts.model_dump_json(indent=1).encode())
    return {
        "n_nuclei": facts.n_nuclei,
        "weights_sha256": facts.weights_sha256,
        # GPUs are not bit-stable, so that it belongs to what was found.
        "devices": [facts.device],
        "n_damaged_places": len(facts.damage),
    }
