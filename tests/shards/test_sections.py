"""Sections: the same tissue in two splits is found, neighbours on a slide are left in peace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards.artifact import Identity, build_artifact
from shards.check import validate
from shards.dataset import publish_dataset, read_dataset
from shards.schema import Dataset, Section, Split
from shards.sections import n_meeting, overlap
from shards.write import Sample
from tests.shards.tiny import write_tiny_dataset

DONORS: dict[str, Split] = {"D1": "train", "D2": "test"}


def test_cells_meet_within_the_error_of_a_registration() -> None:
    grid_px = np.stack(np.meshgrid(np.arange(10), np.arange(10)), axis=-1).reshape(-1, 2) * 100.0
    assert n_meeting(grid_px, grid_px + 9.9, mpp=0.25) == 100  # 3.5 µm away
    assert n_meeting(grid_px, grid_px + np.array([21.0, 0]), mpp=0.25) == 0  # 5.25 µm
    assert overlap(grid_px, grid_px + np.array([900.0, 0]), mpp=0.25) == 10  # one column
    assert overlap(grid_px, grid_px + np.array([900.0, 600.0]), mpp=0.25) is None  # 4 cells
    assert overlap(grid_px[:0], grid_px, mpp=0.25) is None
    assert overlap(grid_px, grid_px + 10_000, mpp=0.25) is None


def tiny(
    root: Path,
    sections: list[Section],
    changed: Callable[[list[Sample]], list[Sample]] = lambda samples: samples,
    donors: dict[str, Split] = DONORS,
    aliases: dict[str, str] | None = None,
) -> Path:
    """Runs of one donor each, at the same places; run i is of `sections[i]`."""
    write_tiny_dataset(root, donors, n_per_donor=8, changed=changed)
    old, _ = read_dataset(root)
    runs = [
        run.model_copy(update={"section": section, "donors": (donor,)})
        for run, section, donor in zip(old.runs, sections, donors, strict=True)
    ]
    publish_dataset(root, Dataset.of(old.name, runs, old.panels, old.donors, old.shards, aliases))
    return root


def on_slide(bundle: str, slide: str, mpp: float = 0.25) -> Section:
    return Section(bundle=bundle, slide=slide, slide_mpp=mpp)


def renamed(samples: list[Sample]) -> list[Sample]:
    """Cells of the same ids in every run."""
    return [dataclasses.replace(s, cell_id=f"cell{i}-1") for i, s in enumerate(samples)]


def moved(samples: list[Sample]) -> list[Sample]:
    """The cells of the second run somewhere else."""
    x_px = 1e5 * samples[0].cell_id.startswith("run1")
    return [dataclasses.replace(s, row={**s.row, "x_px": s.row["x_px"] + x_px}) for s in samples]


def test_other_bundles_on_other_slides_are_sound(tmp_path: Path) -> None:
    assert validate(tiny(tmp_path, [on_slide("b0", "s0"), on_slide("b1", "s1")])) == []


def test_runs_on_each_other_in_two_splits_are_one_section(tmp_path: Path) -> None:
    root = tiny(tmp_path, [on_slide("b0", "s"), on_slide("b1", "s")])
    assert validate(root) == [
        "run0 and run1 overlap on one slide, 8 of 8 cells, and are in test and train: one section "
        "straddles splits"
    ]


def test_runs_side_by_side_or_of_one_split_are_sound(tmp_path: Path) -> None:
    sections = [on_slide("b0", "s"), on_slide("b1", "s")]
    assert validate(tiny(tmp_path / "side", sections, moved)) == []
    one_split: dict[str, Split] = {"D1": "train", "D2": "train"}
    assert validate(tiny(tmp_path / "one", sections, donors=one_split)) == []


@pytest.mark.parametrize("split", ["test", "train"])
def test_a_bundle_that_comes_twice_is_of_one_donor(tmp_path: Path, split: Split) -> None:
    sections = [on_slide("b", "s"), Section(bundle="b")]
    donors: dict[str, Split] = {"D1": "train", "D2": split}
    root = tiny(tmp_path / "two", sections, renamed, donors)
    assert validate(root) == [
        "run0 and run1 have the same bundle, but cells that are of donor 'D1' in one and of 'D2' "
        f"in the other, in train and {split}"
    ]


def test_two_names_of_one_donor_are_one_donor(tmp_path: Path) -> None:
    sections = [on_slide("b", "s"), Section(bundle="b")]
    donors: dict[str, Split] = {"D1": "train", "D2": "train"}
    root = tiny(tmp_path, sections, renamed, donors, {"D2": "D1"})
    assert validate(root) == []


@pytest.mark.parametrize(
    ("stage", "inputs", "sound"),
    [
        ("cells", {"xenium": "b0"}, True),
        ("cells", {"xenium": "b9"}, False),
        ("registration", {"xenium": "b0", "slide": "s0", "alignment": "a"}, True),
        ("registration", {"xenium": "b0", "slide": "s9"}, False),
        ("patches", {"slide": "s0"}, True),
        ("patches", {"xenium": "b0"}, False),
    ],
)
def test_a_section_is_what_the_stages_were_made_of(
    tmp_path: Path, stage: str, inputs: dict[str, str], sound: bool
) -> None:
    made = Identity(stage=stage, stage_version=1, config={}, parents={}, inputs=inputs)
    parents = {stage: made.fingerprint}
    root = write_tiny_dataset(tmp_path, {"D1": "train"}, n_per_donor=3, parents=parents)
    build_artifact(
        root / "runs" / "run0" / stage,
        made,
        lambda folder, blocks: {},
        provenance={},
        check_inputs=lambda: None,
    )
    old, _ = read_dataset(root)
    run = old.runs[0].model_copy(update={"section": on_slide("b0", "s0"), "donors": ("D1",)})
    publish_dataset(root, Dataset.of(old.name, [run], old.panels, old.donors, old.shards))
    faults = validate(root)
    assert bool(faults) != sound
    assert all(f"is not what {stage}/{made.fingerprint} was made of" in f for f in faults)


def test_a_shard_of_a_donor_that_the_dataset_does_not_tell_is_found(tmp_path: Path) -> None:
    root = tiny(tmp_path, [on_slide("b0", "s0"), on_slide("b1", "s1")])
    old, _ = read_dataset(root)
    runs = [old.runs[0].model_copy(update={"donors": ("D7",)}), old.runs[1]]
    publish_dataset(root, Dataset.of(old.name, runs, old.panels, old.donors, old.shards))
    assert any("'D1' is none of those that the dataset tells" in f for f in validate(root))
