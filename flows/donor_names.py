"""Donors whose names look like one: often one person, written twice, who would be two here."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping

_SEPARATORS = re.compile(r"[\s_.\-/‐-―]+")
_NUMBER = re.compile(r"\d+")
# Cyrillic and Greek letters, small ones, that a Latin one can't be told from as capitals or small.
_LOOKALIKES = str.maketrans("авеіјкмнорѕстухαβεζηικμνορτυχ", "abeijkmhopsctyxabezhikmnoptyx")
_DIGITS = str.maketrans("oil", "011")


def confusable(names: Iterable[str], canonical: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Groups of names that differ in what people do not mean, and are not known as one donor.

    In case, accents, spaces, hyphens and underscores, leading zeros of numbers, forms of one
    character, and letters and digits that look alike (O and 0; l, I and 1; other alphabets).
    """
    persons: dict[str, dict[str, str]] = {}
    for name in sorted(set(names)):
        plain = _plain(name)
        for key in (f"number {_without_zeros(plain)}", f"look {plain.translate(_DIGITS)}"):
            persons.setdefault(key, {}).setdefault(canonical.get(name, name), name)
    groups = {tuple(sorted(found.values())) for found in persons.values() if len(found) > 1}
    return sorted(group for group in groups if not any(set(group) < set(other) for other in groups))


def _plain(name: str) -> str:
    parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", name).casefold())
    letters = "".join(c for c in parts if not unicodedata.combining(c)).translate(_LOOKALIKES)
    # Between digits a hyphen tells two numbers apart: 1-2 is not 12.
    return re.sub(r"(?<!\d)-|-(?!\d)", "", _SEPARATORS.sub("-", letters))


def _without_zeros(plain: str) -> str:
    return _NUMBER.sub(lambda number: str(int(number[0])), plain)
