"""Donors who look alike: told where they may be one person, and not where they are two."""

from __future__ import annotations

import pytest

from flows.donor_names import confusable


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("P1", "p1"),
        ("P1", "P01"),
        ("P1", "P 1"),
        ("P-1", "P_1"),
        ("VUILD 96", "VUILD96"),
        ("Patient7", "Patient007"),
        ("P1", "\uff30\uff11"),  # full width
        ("Zoë", "Zoe\u0308"),
        ("Zoë", "Zoe"),
        ("P10", "P1O"),
        ("PI", "P1"),
        ("Al", "AI"),
        ("C1", "\u04211"),  # Cyrillic
        ("TENX-1.2", "TENX 1_2"),
        ("a–b", "a-b"),
    ],
)
def test_names_that_look_alike(one: str, other: str) -> None:
    assert confusable([one, other, "somebody else"], {}) == [tuple(sorted((one, other)))]
    assert confusable([one, other], {one: "P", other: "P"}) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("P1", "P2"),
        ("P1", "P10"),
        ("1-2", "12"),
        ("D1", "DD1"),
        ("A", "B"),
        ("S1-1", "S11"),
        ("", "P"),
    ],
)
def test_names_that_do_not(one: str, other: str) -> None:
    assert confusable([one, other], {}) == []


def test_each_group_is_told_once_and_whole() -> None:
    names = [f"patient {i}" for i in range(300)]
    assert confusable(names, {}) == []
    assert confusable([*names, "Patient 7", "patient-007"], {}) == [
        ("Patient 7", "patient 7", "patient-007")
    ]
