"""`[split]`: one person is in one split under any name, and a withdrawn one in none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flows.split import SplitSection, split_of
from shards.schema import SPLITS

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
