"""What each key of a config changes: none is forgotten, in a fingerprint or out of it."""

from __future__ import annotations

import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.built import Stage
from flows.config import CurateConfig, RunConfig
from flows.identities import StageConfigs, identities
from flows.stages import RunStages
from shards.artifact import Identity
from shards.schema import Record
from tests.golden.stages import fixed_config, stages_of, write_identity_inputs

REGISTRATION, NUCLEI, CELLS, PATCHES, SHARDS = typing.get_args(Stage)
ALL = {REGISTRATION, NUCLEI, CELLS, PATCHES, SHARDS}
NONE: set[str] = set()
FROM_CELLS = {CELLS, PATCHES, SHARDS}
FROM_PATCHES = {PATCHES, SHARDS}
# A key that can have one value alone, yet.
ONLY = "the only value"
# Of each key: another value than in the fixed config, and the stages that are then made anew.
EFFECTS: dict[str, tuple[Any, set[str]]] = {
    "name": ("other", NONE),
    "out": (Path("/elsewhere"), NONE),
    "patch.fov_um": (112.0, FROM_PATCHES),
    "patch.size_px": (256, FROM_PATCHES),
    "patch.center": ("cell", FROM_CELLS),
    "patch.jpeg_quality": (94, FROM_PATCHES),
    "cells.unit": ("he_nuclei", FROM_CELLS),
    "cells.expansion_um": (4.0, FROM_CELLS),
    "cells.counts": (ONLY, FROM_CELLS),
    "cells.qv_min": (21.0, FROM_CELLS),
    "cells.neighbors_k": (9, FROM_CELLS),
    "cells.neighbors_radius_um": (51.0, FROM_CELLS),
    "segmentation.model": ("weights2", ALL - {REGISTRATION}),
    "registration.refine": (False, ALL - {NUCLEI}),
    "registration.accept": (("pass",), NONE),
    "registration.max_median_error_um": (4.0, NONE),
    "filters.min_counts": (11, {SHARDS}),
    "filters.max_registration_error_um": (6.0, {SHARDS}),
    "filters.drop_flags": ((), {SHARDS}),
    "filters.min_match_iou": (0.5, {SHARDS}),
    "filters.blurred_below": (0.5, {SHARDS}),
    "filters.pen_above": (0.5, {SHARDS}),
    "filters.fold_above": (3.0, {SHARDS}),
    "filters.torn_above": (0.5, {SHARDS}),
    "split.by": (ONLY, NONE),
    "split.fractions": ({"train": 1.0}, NONE),
    "split.assign": ({"D1": "test"}, NONE),
    "split.hold_out": (("S1",), NONE),
    "split.withdraw": (("D2",), NONE),  # of a run of several donors: see below
    "split.aliases": ({"D1": ("D5",)}, NONE),
    "runs.id": ("r2", FROM_PATCHES),
    "runs.xenium": ("xenium2", ALL - {NUCLEI}),
    "runs.donor": ("D2", {SHARDS}),
    "runs.donors": ("donors", {SHARDS}),
    "runs.labels": ("labels2", {SHARDS}),
    "runs.source_id": ("S1", {SHARDS}),
    "runs.slide": ("slide2", ALL),
    "runs.image": ("morphology", FROM_CELLS),
    "runs.alignment": ("alignment2", ALL - {NUCLEI}),
    "runs.tissue": ("breast", {SHARDS}),
    "runs.species": ("mouse", FROM_CELLS),
    "runs.mpp": (0.25, ALL),
}
# What goes with a key, for the config to make sense.
ALONG = {"runs.donors": {"donor": None}, "runs.image": {"slide": None, "alignment": None}}


def keys_of_configs() -> dict[str, Any]:
    """Every key of every section with its type, by what the records themselves declare."""
    keys: dict[str, Any] = {}
    for name, field in CurateConfig.model_fields.items():
        kind = RunConfig if name == "runs" else field.annotation
        if isinstance(kind, type) and issubclass(kind, Record):
            keys |= {f"{name}.{key}": f.annotation for key, f in kind.model_fields.items()}
        else:
            keys[name] = field.annotation
    return keys


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Path]:
    """The raw inputs of the fixed config, and beside each another of the same kind."""
    paths = write_identity_inputs(tmp_path / "raw")
    others = write_identity_inputs(tmp_path / "others")
    for key in ("slide", "alignment", "labels", "weights"):
        others[key].write_text(f"another {key}\n")
    (others["xenium"] / "experiment.xenium").write_text("another run\n")
    return paths | {f"{key}2": path for key, path in others.items()}


def fingerprints(stages: RunStages) -> dict[str, str]:
    return {stage: identity.fingerprint for stage, identity in stages.identities.items()}


def changed(config: CurateConfig, key: str, values: dict[str, Any]) -> CurateConfig:
    """The config with other values of one of its sections, whether it allows them or not."""
    section, _, _ = key.rpartition(".")
    if section == "":
        return config.model_copy(update=values)
    if section == "runs":
        return config.model_copy(update={"runs": (config.runs[0].model_copy(update=values),)})
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def test_of_every_key_it_is_said_what_it_changes() -> None:
    assert keys_of_configs().keys() == EFFECTS.keys(), (
        "say in EFFECTS which stages are made anew when a new key changes; if it changes what a "
        "stage writes and enters none of them, runs with two values of it are taken for one"
    )


@pytest.mark.parametrize("key", EFFECTS)
def test_a_key_changes_these_fingerprints_and_no_others(
    key: str, raw: dict[str, Path], tmp_path: Path
) -> None:
    value, made_anew = EFFECTS[key]
    if value == ONLY:
        kind = keys_of_configs()[key]
        assert typing.get_origin(kind) is typing.Literal
        assert len(typing.get_args(kind)) == 1, "it has other values now: name one in EFFECTS"
        return
    config = fixed_config(tmp_path, raw)
    before = fingerprints(stages_of(config, tmp_path))
    if isinstance(value, str) and value in raw:
        value = str(raw[value]) if key == "segmentation.model" else raw[value]
    _, _, name = key.rpartition(".")
    other = changed(config, key, {name: value, **ALONG.get(key, {})})
    after = fingerprints(stages_of(other, tmp_path))
    assert {stage for stage in after if after[stage] != before[stage]} == made_anew


def test_a_withdrawal_changes_what_is_made_of_a_run_of_several_donors(
    raw: dict[str, Path], tmp_path: Path
) -> None:
    several = changed(
        fixed_config(tmp_path, raw), "runs.donors", {"donors": raw["donors"], "donor": None}
    )
    before = fingerprints(stages_of(several, tmp_path))
    for withdraw, made_anew in ((("D2",), ALL), (("D9",), NONE)):
        split = changed(several, "split.withdraw", {"withdraw": withdraw})
        after = fingerprints(stages_of(split, tmp_path))
        assert {stage for stage in after if after[stage] != before[stage]} == made_anew


def test_where_inputs_lie_is_no_matter(raw: dict[str, Path], tmp_path: Path) -> None:
    before = fingerprints(stages_of(fixed_config(tmp_path, raw), tmp_path))
    moved = write_identity_inputs(tmp_path / "moved")
    assert fingerprints(stages_of(fixed_config(tmp_path / "b", moved), tmp_path)) == before


# The stages whose own config each record is.
STAGES_OF_RECORDS = {
    "segmentation": {NUCLEI},
    "cells": {CELLS},
    "patch": {PATCHES, SHARDS},
    "packing": {SHARDS},
}


def fields_of_records() -> list[tuple[str, str]]:
    """Every field of every stage's config, by what the records themselves declare."""
    kinds = typing.get_type_hints(StageConfigs)
    assert kinds.keys() == STAGES_OF_RECORDS.keys()
    fields = [(name, field) for name, kind in kinds.items() for field in kind.model_fields]
    fields.remove(("segmentation", "model"))  # a path: its content enters instead
    return fields


def another(value: Any) -> Any:
    """A value of the same type, as far as there is one."""
    match value:
        case Record():
            field = next(iter(type(value).model_fields))
            return value.model_copy(update={field: another(getattr(value, field))})
        case int() | float():
            return value + 1
        case None | str():
            return f"not {value}"
    raise TypeError(f"say here what another {type(value).__name__} is")


@pytest.mark.parametrize(("record", "field"), fields_of_records())
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # not all are ever allowed
def test_another_default_of_a_stage_changes_its_fingerprint(
    record: str, field: str, raw: dict[str, Path], tmp_path: Path
) -> None:
    """So does a field that is added to its config, which can't be forgotten."""
    stages = stages_of(fixed_config(tmp_path, raw), tmp_path)
    held = getattr(stages.configs, record)
    other = held.model_copy(update={field: another(getattr(held, field))})
    after = identities(
        stages.config,
        stages.run,
        replace(stages.configs, **{record: other}),
        stages.inputs,
        stages.withdrawn,
    )
    before = stages.identities
    assert {s for s in after if after[s].config != before[s].config} == STAGES_OF_RECORDS[record]
    assert {s for s in after if after[s].fingerprint != before[s].fingerprint} >= STAGES_OF_RECORDS[
        record
    ]


def leaves(config: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            found |= leaves(value, (*path, key))
        else:
            found[*path, key] = value
    return found


def with_leaf(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    key, *rest = path
    return {**config, key: with_leaf(config[key], tuple(rest), value) if rest else value}


def test_every_part_of_an_identity_changes_its_fingerprint(
    raw: dict[str, Path], tmp_path: Path
) -> None:
    for stage, identity in stages_of(fixed_config(tmp_path, raw), tmp_path).identities.items():
        others: list[dict[str, Any]] = [
            {"stage": "other"},
            {"stage_version": identity.stage_version + 1},
            *({"config": with_leaf(identity.config, p, "other")} for p in leaves(identity.config)),
            *({"parents": {**identity.parents, p: "other"}} for p in identity.parents),
            *({"inputs": {**identity.inputs, key: "other"}} for key in identity.inputs),
        ]
        found: set[str] = {identity.fingerprint}
        for other in others:
            found.add(Identity(**{**identity.model_dump(), **other}).fingerprint)
        assert len(found) == len(others) + 1, stage
