"""Golden records: what a version of a stage made of a fixed input, and what is wrong with a change.

One file a stage, `records/<stage>.json`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from flows.built import Stage
from shards.artifact import Identity
from shards.dataset import read_record
from shards.schema import Record

FOLDER = Path(__file__).parent / "records"
WRITE = "python -m tests.golden.write"

# Where the version of each stage stands.
VERSIONS: dict[Stage, str] = {
    "registration": "REGISTRATION_VERSION in flows/identities.py",
    "nuclei": "STAGE_VERSION in segmentation/config.py",
    "cells": "STAGE_VERSION in pairing/cells.py",
    "patches": "STAGE_VERSION in pairing/patches.py",
    "shards": "STAGE_VERSION in pairing/pack.py",
}


class Golden(Record):
    """What a version of a stage wrote: a digest a file, by the case of the input that it is of.

    `identity` is that of a fixed config, its parents replaced by their names.
    """

    identity: Identity
    fingerprint: str
    output: dict[str, str]

    @property
    def version(self) -> int:
        return self.identity.stage_version


class NetworkOutcome(Record):
    """What the network that ships finds on a fixed picture."""

    weights_sha256: str
    n_nuclei: int
    area_um2: float


class RefinedOutcome(Record):
    """Where the refinement of a given alignment puts some cells of the fixed run, in px."""

    verdict: str
    places_px: tuple[tuple[float, float], ...]


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.json"


def read_golden(stage: Stage) -> Golden | None:
    """The record of a stage, None where there is none."""
    path = path_of(stage)
    return read_record(path, Golden) if path.is_file() else None


def faults(stage: Stage, was: Golden | None, now: Golden) -> list[str]:
    """What is wrong with a stage that was `was` and is `now`, in words for whoever changed it."""
    anew = f"write the record anew with `{WRITE}`"
    if was is None:
        return [f"{stage} has no record: {anew}"]
    if now.version < was.version:
        return [
            f"the version of {stage} fell from {was.version} to {now.version}: what is stored "
            f"under a version is never made by another; raise {VERSIONS[stage]}"
        ]
    if now.version > was.version:
        return [f"{stage} is of version {now.version}, its record of {was.version}: {anew}"]
    found = []
    remedy = f"raise {VERSIONS[stage]}, and {anew}"
    if changed := _changed(was.output, now.output):
        found.append(f"the output of {stage} changed ({', '.join(changed)}): {remedy}")
    if was.fingerprint != now.fingerprint:
        before, after = was.identity.model_dump(), now.identity.model_dump()
        parts = {p: _changed(before[p], after[p]) for p in ("config", "parents", "inputs")}
        told = [f"{part}: {', '.join(keys)}" for part, keys in parts.items() if keys]
        why = "; ".join(told) or "the way in which it is hashed"
        found.append(f"the fingerprint of {stage} changed ({why}): {remedy}")
    return found


def network_faults(was: NetworkOutcome, now: NetworkOutcome) -> list[str]:
    """As `faults`, of the network that ships: its own figures agree to 1 %."""
    if was.weights_sha256 != now.weights_sha256:
        return [f"the compact weights changed: write the record anew with `{WRITE}`"]
    return [
        f"the {name} that the compact network finds changed from {before} to {after}: "
        f"raise {VERSIONS['nuclei']}, and write the record anew with `{WRITE}`"
        for name, before, after in (
            ("number of nuclei", was.n_nuclei, now.n_nuclei),
            ("area", was.area_um2, now.area_um2),
        )
        if abs(after - before) > 0.01 * before
    ]


def refined_faults(was: RefinedOutcome, now: RefinedOutcome) -> list[str]:
    """As `faults`, of the refinement: its own places agree to a fifth of a pixel, 0.05 µm."""
    remedy = f"raise {VERSIONS['registration']}, and write the record anew with `{WRITE}`"
    if was.verdict != now.verdict:
        return [
            f"the verdict of the refinement changed from {was.verdict} to {now.verdict}: {remedy}"
        ]
    moved_px = max(math.dist(a, b) for a, b in zip(was.places_px, now.places_px, strict=True))
    if moved_px <= 0.2:
        return []
    return [f"the refinement puts a cell {moved_px:.2f} px from where it did: {remedy}"]


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [
        f"{'new: ' if k not in before else 'gone: ' if k not in after else ''}{k}"
        for k in sorted(before.keys() | after.keys())
        if k not in before or k not in after or before[k] != after[k]
    ]
