"""`[split]`: which split a donor goes to, which names are one donor, which donors must go."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from shards.schema import SPLITS, Record, Split, is_one_line


def _written_one_way(donor: str) -> str:
    if not is_one_line(donor):
        raise PydanticCustomError("donor", "text without line breaks and without spaces around it")
    return donor


Donor = Annotated[str, Field(min_length=1), AfterValidator(_written_one_way)]


class SplitSection(Record):
    """`[split]`: a stable hash of the donor decides, unless `assign` names its split.

    `aliases` maps a donor's canonical name to its other names: one person, one split. `assign`
    and `withdraw` may use any of the names. Shards keep the donor as written. `hold_out` are names
    of lists (flows.hold_out) and source_ids of runs: all their donors go to test.
    """

    by: Literal["donor"] = "donor"
    fractions: dict[Split, Annotated[float, Field(ge=0, le=1)]] = {
        "train": 0.8,
        "val": 0.1,
        "test": 0.1,
    }
    assign: dict[Donor, Split] = {}
    hold_out: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    withdraw: tuple[Donor, ...] = ()
    aliases: dict[Donor, tuple[Donor, ...]] = {}

    @model_validator(mode="after")
    def _goes_together(self) -> SplitSection:
        tell_together(split_faults(self.model_dump()))
        return self

    def canonical(self, donor: str) -> str:
        """The one name of a donor that may have several."""
        return _canonical_names(self.aliases).get(donor, donor)

    def is_withdrawn(self, donor: str) -> bool:
        """Whether this donor must go, by this or another of its names."""
        names = _canonical_names(self.aliases)
        return names.get(donor, donor) in {names.get(name, name) for name in self.withdraw}

    @property
    def withdrawn_names(self) -> tuple[str, ...]:
        """Every name that this section knows of the donors who must go, sorted."""
        known = {*self.withdraw, *self.aliases, *_canonical_names(self.aliases)}
        return tuple(sorted(filter(self.is_withdrawn, known)))


def tell_together(faults: Iterable[str]) -> None:
    """Raise what keys of one table say against each other, for pydantic to collect."""
    if told := "; ".join(faults):
        raise PydanticCustomError("keys_together", "{told}", {"told": told})


def split_of(donor: str, split: SplitSection, held_out: Collection[str] = ()) -> Split:
    """The split of a donor: by name, else by a hash of the donor that no other donor moves.

    `held_out` are canonical names of donors who are in test whatever the hash says.
    """
    names = _canonical_names(split.aliases)
    canonical = names.get(donor, donor)
    if canonical in held_out:
        return "test"
    assigned = {names.get(name, name): to for name, to in split.assign.items()}
    if canonical in assigned:
        return assigned[canonical]
    point = int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big") / 2**64
    upper = 0.0
    for name in SPLITS:
        upper += split.fractions.get(name, 0.0)
        if point < upper:
            return name
    return SPLITS[-1]


def split_faults(table: Mapping[str, Any]) -> Iterator[str]:
    """What the keys of `[split]` say against each other, in words.

    `table` may be as a person wrote it: what is not of the right kind is another fault, and
    passed over here.
    """
    fractions = table.get("fractions")
    if isinstance(fractions, dict) and all(_is_number(f) for f in fractions.values()):
        total = sum(fractions.values())
        if abs(total - 1) > 1e-9:
            yield f"fractions add up to {total}, not to 1"
    aliases = table.get("aliases")
    if not isinstance(aliases, dict) or not all(_are_names(n) for n in aliases.values()):
        return
    faults = list(_alias_faults(aliases))
    yield from faults
    assign = table.get("assign")
    if not faults and isinstance(assign, dict):
        yield from _contradictions(assign, _canonical_names(aliases))


def _canonical_names(aliases: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    return {other: name for name, others in aliases.items() for other in others}


def _alias_faults(aliases: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    names_of: dict[str, list[str]] = {}
    for name, others in aliases.items():
        for other in dict.fromkeys(others):
            names_of.setdefault(other, []).append(name)
    for other, names in names_of.items():
        if len(names) > 1:
            yield f"aliases: {other!r} is another name of {' and of '.join(map(repr, names))}"
    upper = {other: names[0] for other, names in names_of.items()}
    in_circles: set[str] = set()
    for name in aliases:
        way = [name]
        while way[-1] in upper and upper[way[-1]] not in way:
            way.append(upper[way[-1]])
        if way[-1] in upper:
            if not in_circles & set(way):
                circle = way[way.index(upper[way[-1]]) :][::-1]
                yield f"aliases go in a circle: {' → '.join(map(repr, [*circle, circle[0]]))}"
            in_circles |= set(way)
        elif len(way) > 1:
            yield (
                f"aliases: {name!r} has other names, but is itself one of {way[1]!r}: list all "
                "names of a donor under one"
            )


def _contradictions(assign: Mapping[str, Any], canonical: Mapping[str, str]) -> Iterator[str]:
    by_donor: dict[str, dict[str, Any]] = {}
    for name, split in assign.items():
        by_donor.setdefault(canonical.get(name, name), {})[name] = split
    for donor, given in by_donor.items():
        if len(set(map(repr, given.values()))) > 1:
            told = " and ".join(f"{name!r} to {split!r}" for name, split in given.items())
            yield f"assign sends {told}, but by aliases they are one donor, {donor!r}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
