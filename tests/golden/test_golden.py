"""Every stage does what its version says: it is run on a fixed input, and what it wrote compared.

An artifact is found again by its fingerprint, which holds the version of its stage. A change of
what a stage writes that leaves its version as it was would mix old and new artifacts in one
dataset, and nobody would know. These tests fail at such a change.

Each stage is run alone, on input made by hand (`inputs.py`, `nuclei.py`): a change of one stage
accuses no other. What is compared (`content.py`), so that the records hold on any processor with
the libraries of requirements.lock:

- Exactly: tars and JPEGs by their bytes. The patches lie at quarters of a pixel and are made
  smaller by two: the weights of the resampling are exact, its sums and the encoder's transform are
  of whole numbers. Counts, neighbours, indices, names, flags, verdicts and totals. Neighbours at
  one distance are at exactly one distance.
- Rounded to 1e-6 of the unit: transforms, correlations, positions, areas, overlaps. Sums of floats
  in other orders differ in their last bits.
- What comes after a network, exactly, outlines and positions to 1e-6: weights made by hand let
  flows that are drawn in the colours of a slide through to the output. Only the score, which is a
  float32 of the network, is rounded to 1e-3.
- To 0.05 µm: where the refinement of a given alignment, whose solutions are the processor's, puts
  cells.
- To 1 %: what the network that ships finds on a drawn picture. Its sums are the processor's.
- Not at all: hashes of Parquet files and weights, and metadata of Parquet. Libraries write them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.built import Stage
from shards.dataset import read_record
from tests.golden.content import canonical, digests_of, rounded
from tests.golden.records import (
    VERSIONS,
    Golden,
    NetworkOutcome,
    RefinedOutcome,
    faults,
    network_faults,
    path_of,
    read_golden,
    refined_faults,
)
from tests.golden.stages import golden_of, network_outcome, refined_outcome
from tests.golden.write import write_records


@pytest.mark.parametrize("stage", VERSIONS)
def test_a_stage_does_what_its_version_says(stage: Stage, tmp_path: Path) -> None:
    found = faults(stage, read_golden(stage), golden_of(stage, tmp_path / stage))
    assert not found, "\n".join(found)


def test_the_compact_network_finds_what_it_found(tmp_path: Path) -> None:
    was = read_record(path_of("network"), NetworkOutcome)
    found = network_faults(was, network_outcome(tmp_path))
    assert not found, "\n".join(found)


def test_the_refinement_puts_cells_where_it_did(tmp_path: Path) -> None:
    was = read_record(path_of("refined"), RefinedOutcome)
    found = refined_faults(was, refined_outcome(tmp_path))
    assert not found, "\n".join(found)


# ---------------------------------------------------------------- that they would fail


def changed(golden: Golden, **identity: Any) -> Golden:
    """The record, as if its stage had this identity."""
    new = golden.identity.model_copy(update=identity)
    return golden.model_copy(update={"identity": new, "fingerprint": new.fingerprint})


@pytest.fixture
def cells() -> Golden:
    golden = read_golden("cells")
    assert golden is not None
    return golden


def test_another_output_of_the_same_version_is_a_fault(cells: Golden) -> None:
    output = {**cells.output, "nuclei: neighbors.npy": "other", "nuclei: more.npy": "new"}
    del output["nuclei: panel.json"]
    assert faults("cells", cells, cells.model_copy(update={"output": output})) == [
        "the output of cells changed (new: nuclei: more.npy, nuclei: neighbors.npy, "
        "gone: nuclei: panel.json): raise STAGE_VERSION in pairing/cells.py, and write the record "
        "anew with `python -m tests.golden.write`"
    ]


def test_another_version_than_recorded_is_a_fault_until_it_is_recorded(cells: Golden) -> None:
    raised = changed(cells, stage_version=cells.version + 1)
    assert faults("cells", cells, raised) == [
        f"cells is of version {cells.version + 1}, its record of {cells.version}: write the record "
        "anew with `python -m tests.golden.write`"
    ]
    assert faults("cells", raised, raised) == []
    assert "fell from" in faults("cells", raised, cells)[0]
    assert faults("cells", None, cells) == [
        "cells has no record: write the record anew with `python -m tests.golden.write`"
    ]


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("config", {"max_cells": 5}, "config: new: max_cells"),
        ("config", {"qv_min": 19.0}, "config: qv_min"),
        ("parents", {"nuclei": None}, "parents: gone: nuclei"),
        ("inputs", {"labels": "1234"}, "inputs: new: labels"),
    ],
)
def test_another_identity_of_the_same_version_is_a_fault(
    cells: Golden, part: str, change: dict[str, Any], told: str
) -> None:
    new = {**cells.identity.model_dump()[part], **change}
    new = {key: value for key, value in new.items() if value is not None or key == "species"}
    assert faults("cells", cells, changed(cells, **{part: new})) == [
        f"the fingerprint of cells changed ({told}): raise STAGE_VERSION in pairing/cells.py, and "
        "write the record anew with `python -m tests.golden.write`"
    ]


def test_another_way_of_hashing_is_a_fault(cells: Golden) -> None:
    (fault,) = faults("cells", cells, cells.model_copy(update={"fingerprint": "f" * 20}))
    assert fault.startswith("the fingerprint of cells changed (the way in which it is hashed)")


def test_the_network_may_differ_by_a_hundredth_or_with_its_weights() -> None:
    was = NetworkOutcome(weights_sha256="a", n_nuclei=200, area_um2=1000.0)
    assert network_faults(was, was.model_copy(update={"n_nuclei": 202, "area_um2": 991.0})) == []
    fewer = network_faults(was, was.model_copy(update={"n_nuclei": 197, "area_um2": 1011.0}))
    assert [fault.split(" that ")[0] for fault in fewer] == ["the number of nuclei", "the area"]
    (other,) = network_faults(was, was.model_copy(update={"weights_sha256": "b", "n_nuclei": 1}))
    assert other.startswith("the compact weights changed")


def test_a_refinement_may_differ_by_a_fifth_of_a_pixel() -> None:
    was = RefinedOutcome(verdict="pass", places_px=((1.0, 2.0), (3.0, 4.0)))
    assert refined_faults(was, was.model_copy(update={"places_px": ((1.1, 2.1), (3.0, 4.0))})) == []
    (moved,) = refined_faults(was, was.model_copy(update={"places_px": ((1, 2.0), (3.0, 4.5))}))
    assert "0.50 px" in moved
    assert "REGISTRATION_VERSION" in moved
    (verdict,) = refined_faults(was, was.model_copy(update={"verdict": "doubtful"}))
    assert "from pass to doubtful" in verdict


def test_rounding_keeps_what_a_processor_may_change_and_sees_what_a_person_does() -> None:
    values = np.array([0.0, 12.25, 1 / 3, -768.6, np.nan])
    noise = np.array([1e-15, -1e-14, 1e-16, 1e-12, 0])
    assert rounded(values + noise) == rounded(values)
    assert rounded(values)[-1] == "nan"
    assert canonical({"a": [12.25, None]}) != canonical({"a": [12.250001, None]})
    assert canonical({"score": 0.9701}) == canonical({"score": 0.9701002})
    assert canonical({"table_sha256": "of a library"}) == {}
    with pytest.raises(ValueError, match="border"):
        rounded(np.array([1e-6 * (1 - 0.618)]))


def test_a_new_kind_of_file_must_be_read(tmp_path: Path) -> None:
    (tmp_path / "cells.zarr").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cells\.zarr: say in tests\.golden\.content"):
        digests_of(tmp_path)


def test_records_are_not_written_over_without_a_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(path_of("cells").parent, tmp_path / "records")
    monkeypatch.setattr("tests.golden.records.FOLDER", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = {stage: golden for stage in VERSIONS if (golden := read_golden(stage)) is not None}
    outcome = read_record(path_of("network"), NetworkOutcome)
    refined = read_record(path_of("refined"), RefinedOutcome)
    nearly = outcome.model_copy(update={"area_um2": outcome.area_um2 + 1})
    assert write_records(found, nearly, refined) == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    shards = found["shards"]
    other = shards.model_copy(update={"output": {**shards.output, "donors: figures": "other"}})
    (refused,) = write_records({**found, "shards": other}, outcome, refined)
    assert "raise STAGE_VERSION in pairing/pack.py" in refused
    fewer = outcome.model_copy(update={"n_nuclei": outcome.n_nuclei // 2})
    assert len(write_records(found, fewer, refined)) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    raised = changed(other, stage_version=other.version + 1)
    assert write_records({**found, "shards": raised}, outcome, refined) == []
    assert read_golden("shards") == raised
    raised = changed(found["nuclei"], stage_version=found["nuclei"].version + 1)
    assert write_records({"nuclei": raised}, fewer, refined) == []
    assert read_record(path_of("network"), NetworkOutcome) == fewer
