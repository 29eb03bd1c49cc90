"""`cellpair curate --plan`: what would be reused, what built, and on how much disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from flows.built import Stage
from flows.cluster import BlockMap, Runtime
from flows.config import CurateConfig
from flows.local import exit_code
from flows.outfolder import claim_out
from flows.pipeline import closing_copies, plan_runs
from flows.sizes import in_words
from flows.stages import RunStages
from pairing.xenium import open_xenium
from shards.artifact import ArtifactRecord
from shards.schema import PatchSpec
from shards.store import store_of

# As measured on simulated sections (docs/benchmarks.md): bytes of a JPEG at quality 95, 4:2:0, for
# each of its pixels. It varies by half with stain, focus and scale: the plan says "about".
_JPEG_BYTES_PER_PX = 0.35
# Rows of tables and arrays; in a shard, the counts of a cell and of its neighbours.
_BYTES_PER_CELL: dict[Stage, int] = {
    "registration": 40,
    "nuclei": 900,
    "cells": 1500,
    "patches": 60,
    "shards": 9000,
}


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """One stage of one run: `n_bytes` on disk, as found or as expected (then `exact` is false)."""

    run: str
    stage: Stage
    fingerprint: str
    reused: bool
    n_bytes: int


def plan(stages: RunStages) -> list[PlannedStage]:
    """What would be done for one run. Raises BadInput where its bundle can't be opened."""
    found = {s: stages.store.find(stages.folder_of(s)) for s in stages.identities}
    n_cells = 0
    if not all(found.values()):
        stages.hold_inputs()
        with open_xenium(stages.run.xenium) as xenium:
            n_cells = xenium.n_cells
    return [
        PlannedStage(
            run=stages.run.id,
            stage=stage,
            fingerprint=identity.fingerprint,
            reused=record is not None,
            n_bytes=_expected_bytes(stage, n_cells, stages.configs.patch)
            if record is None
            else _size(record),
        )
        for (stage, identity), record in zip(stages.identities.items(), found.values(), strict=True)
    ]


def _size(record: ArtifactRecord) -> int:
    return sum(facts.n_bytes for facts in record.files.values())


def _expected_bytes(stage: Stage, n_cells: int, spec: PatchSpec) -> int:
    per_cell = _BYTES_PER_CELL[stage]
    if stage in ("patches", "shards"):
        per_cell += round(spec.size_px**2 * _JPEG_BYTES_PER_PX)
    return n_cells * per_cell


def print_plan(config: CurateConfig, only: tuple[str, ...] = ()) -> int:
    """Print what `curate` would do; returns the exit code: 2 for bad input, 1 for too little disk.

    Nothing is built; only the hashes of the raw inputs are remembered.
    """
    store = store_of(config.out, config.remote)
    claim_out(config.out, config.name, config.split.withdrawn_names, store)
    planned, failures = plan_runs(config, BlockMap(Runtime()), store, only=only)
    lines = []
    for stages in planned:
        with closing_copies(stages):
            lines += plan(stages)
    store.save()
    for line in lines:
        size = f"{'' if line.reused else 'about '}{in_words(line.n_bytes)}"
        print(
            f"{line.run}  {line.stage:<13} {'reused' if line.reused else 'to build':<9}"
            f"{line.fingerprint}  {size}"
        )
    n_bytes = sum(line.n_bytes for line in lines if not line.reused)
    free_bytes = shutil.disk_usage(config.out).free
    n_left = sum(not line.reused for line in lines)
    print(
        f"{len(lines) - n_left} artifacts reused, {n_left} to build on about {in_words(n_bytes)}; "
        f"{in_words(free_bytes)} are free at {config.out}"
    )
    if failures:
        return exit_code(failures)
    if n_bytes > free_bytes:
        print("that is not enough: free space, or set out to another disk")
        return 1
    return 0
