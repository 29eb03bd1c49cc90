"""`[split]`: one person is in one split under any name, and a withdrawn one in none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flows import pipeline
from flows.cluster import BlockMap, Runtime
from flows.config import read_curate_config
from flows.split import SplitSection, split_of
from shards.check import validate
from shards.dataset import read_dataset
from shards.schema import SPLITS, Dataset
from tests.flows.ruined import copy_by_links

DONORS = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1)
VUILD = {"VUILD96": ("VUILD96LF", "VUILD96MF")}


@given(DONORS, st.sampled_from(SPLITS))
def test_a_donor_goes_where_it_is_assigned(donor: str, split: str) -> None:
    assert split_of(donor, SplitSection.model_validate({"assign": {donor: split}})) == split


def test_fractions_hold_over_many_donors_and_adding_one_moves_none() -> None:
    section = SplitSection()
    splits = [split_of(f"donor {i}", section) for i in range(4000)]
    assert abs(splits.count("train") / 4000 - 0.8) < 0.02
    assert abs(splits.count("val") / 4000 - 0.1) < 0.02
    all_test = SplitSection(fractions={"train": 0.0, "val": 0.0, "test": 1.0})
    assert {split_of(f"donor {i}", all_test) for i in range(50)} == {"test"}


@given(DONORS, st.lists(DONORS, min_size=1, unique=True))
def test_all_names_of_a_donor_are_in_the_split_of_its_canonical_name(
    name: str, others: list[str]
) -> None:
    others = [other for other in others if other != name]
    section = SplitSection(aliases={name: tuple(others)})
    assert {split_of(other, section) for other in others} <= {split_of(name, SplitSection())}


@pytest.mark.parametrize("assigned", ["VUILD96", "VUILD96LF", "VUILD96MF"])
def test_assigning_one_name_assigns_all(assigned: str) -> None:
    section = SplitSection(aliases=VUILD, assign={assigned: "test"})
    assert {split_of(name, section) for name in ("VUILD96", "VUILD96LF", "VUILD96MF")} == {"test"}
    assert section.canonical("VUILD96MF") == "VUILD96"
    assert section.canonical("D1") == "D1"


@pytest.mark.parametrize("withdrawn", ["VUILD96", "VUILD96LF"])
def test_withdrawing_one_name_withdraws_the_person(withdrawn: str) -> None:
    section = SplitSection(aliases=VUILD, withdraw=(withdrawn,))
    assert all(map(section.is_withdrawn, ("VUILD96", "VUILD96LF", "VUILD96MF")))
    assert not section.is_withdrawn("D1")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"aliases": {"A": ["B"], "B": ["A"]}}, ["circle: 'B' → 'A' → 'B'"]),
        ({"aliases": {"A": ["A"]}}, ["circle: 'A' → 'A'"]),
        ({"aliases": {"A": ["B"], "B": ["C"], "C": ["A"]}}, ["go in a circle"]),
        ({"aliases": {"A": ["C"], "B": ["C"]}}, ["'C' is another name of 'A' and of 'B'"]),
        ({"aliases": {"A": ["B"], "B": ["C"]}}, ["'B' has other names, but is itself one of 'A'"]),
        (
            {"aliases": {"A": ["B"]}, "assign": {"A": "train", "B": "test"}},
            ["'A' to 'train' and 'B' to 'test'", "one donor, 'A'"],
        ),
        (
            {"aliases": {"A": ["B", "C"]}, "assign": {"C": "train", "B": "test"}},
            ["'C' to 'train' and 'B' to 'test'"],
        ),
        (
            {
                "fractions": {"train": 0.5, "val": 0.1, "test": 0.1},
                "aliases": {"A": ["C"], "B": ["C"], "D": ["E"], "E": ["F"], "X": ["Y"], "Y": ["X"]},
            },
            ["add up to 0.7", "of 'A' and of 'B'", "itself one of 'D'", "in a circle"],
        ),
    ],
)
def test_names_that_contradict_are_told(table: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        SplitSection.model_validate(table)
    for word in words:
        assert word in str(caught.value)


def test_names_that_agree_are_no_fault() -> None:
    SplitSection.model_validate({"aliases": {"A": ["B"]}, "assign": {"A": "test", "B": "test"}})
    SplitSection.model_validate({"aliases": {"A": ["B", "B"], "C": []}, "assign": {"D": "val"}})


@pytest.mark.parametrize("donor", ["", " D1", "D1 ", "D\n1", "D\r1", "D1\0", "D\u20281"])
def test_a_donor_is_written_one_way(donor: str) -> None:
    for table in ({"assign": {donor: "test"}}, {"withdraw": [donor]}, {"aliases": {"A": [donor]}}):
        with pytest.raises(ValidationError):
            SplitSection.model_validate(table)


@pytest.mark.parametrize("donor", ["<script>", "../x", "D 1", "Ł€", "a/b", "患者", "=1+1"])
def test_a_donor_is_any_text(donor: str) -> None:
    assert SplitSection(assign={donor: "test"}, withdraw=(donor,)).is_withdrawn(donor)


# ---------------------------------------------------------------- through a curation

CONFIG = """
name = "split"
out = "out"
[patch]
fov_um = 16.0
size_px = 32
[split]
assign = {{ P = "{to}" }}
{more}
[[runs]]
id = "a"
xenium = "a/outs"
image = "morphology"
donor = "P left"
[[runs]]
id = "b"
xenium = "b/outs"
image = "morphology"
donor = "P right"
[[runs]]
id = "c"
xenium = "c/outs"
image = "morphology"
donor = "Q"
"""


def shard_sets(out: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in out.glob("runs/*/*/*/*")
    }


def test_a_changed_alias_moves_a_person_and_rewrites_no_shard(
    simulated: Path, tmp_path: Path
) -> None:
    for name in "abc":
        copy_by_links(simulated, tmp_path / name)
    out = tmp_path / "out"

    def curated(to: str, more: str) -> Dataset:
        (tmp_path / "curate.toml").write_text(CONFIG.format(to=to, more=more))
        config = read_curate_config(tmp_path / "curate.toml")
        with BlockMap(Runtime(workers=1)) as blocks:
            dataset = pipeline.curate(config, blocks).dataset
        assert dataset is not None
        assert read_dataset(out)[0] == dataset
        assert validate(out) == []
        return dataset

    apart = curated("test", "")
    assert apart.aliases == {}
    before = shard_sets(out)
    names = 'aliases = { P = ["P left", "P right", "unseen"] }'
    joined = curated("test", names)
    assert joined.aliases == {"P left": "P", "P right": "P"}
    assert (joined.donors["P left"], joined.donors["P right"]) == ("test", "test")
    assert curated("val", names).donors == {**joined.donors, "P left": "val", "P right": "val"}
    assert shard_sets(out) == before
    withdrawn = curated("val", f'withdraw = ["P left"]\n{names}')
    assert [run.run for run in withdrawn.runs] == ["c"]
    assert list(withdrawn.donors) == ["Q"]
    assert len({d.fingerprint for d in (apart, joined, withdrawn)}) == 3
