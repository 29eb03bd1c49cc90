"""What single runs cannot know: two of them that hold the same cells.

The same cell twice in a dataset is a pair counted twice; under two donors it is a leak between
splits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from flows.config import RunConfig, SplitSection
from shards.errors import BadInput, BadInputs
from shards.sections import MEETING_UM, Centres, overlap


@dataclass(frozen=True, slots=True)
class RunOnSlide:
    """A registered run: its cells' centres (n, 2) in level-0 pixels of the slide with this hash."""

    run: str
    slide: str
    centres_px: Centres
    mpp: float


@dataclass(frozen=True, slots=True)
class RunOfCells:
    """A run with several donors: the canonical donor of each cell that has one, by cell_id."""

    run: RunConfig
    bundle: str
    donor_of: Mapping[str, str]


def same_bundles(
    runs: Sequence[tuple[RunConfig, str]], split: SplitSection
) -> dict[str, Exception]:
    """The faults, by run, of runs whose bundles have the same content hash.

    One bundle may come twice only as an H&E run and a morphology run of the same donors; whether
    files of donors say the same of each cell is `other_donors`'.
    """
    of_bundle: dict[str, list[RunConfig]] = {}
    for run, bundle in runs:
        of_bundle.setdefault(bundle, []).append(run)
    faults: list[tuple[str, BadInput]] = []
    for same in of_bundle.values():
        for a, b in combinations(same, 2):
            faults += [(one.id, fault) for one in (a, b) for fault in _same(one, a, b, split)]
    return _by_run(faults)


def _same(one: RunConfig, a: RunConfig, b: RunConfig, split: SplitSection) -> Iterator[BadInput]:
    same = f"run {a.id} and run {b.id} have the same bundle, byte by byte"
    donor, other = (None if run.donor is None else split.canonical(run.donor) for run in (a, b))
    if donor != other:
        found = f"{same}, but the donors {_donor(a)} and {_donor(b)}"
        remedy = "name the right bundle, or the right donor; a person's other names: split.aliases"
    elif a.image == b.image:
        found, remedy = f"{same}, and the same kind of image", "remove one of the two [[runs]]"
    else:
        return
    yield _twice(one, found, remedy)


def _twice(run: RunConfig, found: str, remedy: str) -> BadInput:
    return BadInput(
        f"run {run.id}, xenium = {run.xenium}",
        expected="every bundle once, or once with its slide and once as morphology, of one donor",
        found=found,
        remedy=remedy,
    )


def other_donors(runs: Sequence[RunOfCells]) -> dict[str, Exception]:
    """The faults, by run, of runs of one bundle whose files give a cell to different donors."""
    faults: list[tuple[str, BadInput]] = []
    for a, b in combinations(runs, 2):
        if a.bundle != b.bundle:
            continue
        both = sorted(a.donor_of.keys() & b.donor_of.keys())
        differing = [cell for cell in both if a.donor_of[cell] != b.donor_of[cell]]
        if differing:
            first = differing[0]
            found = (
                f"run {a.run.id} and run {b.run.id} have the same bundle, byte by byte, but "
                f"{len(differing)} of {len(both)} cells have other donors, the first is {first}: "
                f"{a.donor_of[first]!r} and {b.donor_of[first]!r}"
            )
            remedy = "mend one of the two files of donors; a person's other names: split.aliases"
            faults += [(one.run.id, _twice(one.run, found, remedy)) for one in (a, b)]
    return _by_run(faults)


def _donor(run: RunConfig) -> str:
    return f"of {run.donors.name}" if run.donors is not None else repr(run.donor)


def overlaps(runs: Sequence[RunOnSlide]) -> dict[str, Exception]:
    """The faults, by run, of runs on one slide whose cells lie on each other.

    Runs side by side on one slide are normal. A pair overlaps where at least 5 % of the cells of
    the smaller run, and at least 5 of them, lie within 5 µm of a cell of the other.
    """
    of_slide: dict[str, list[RunOnSlide]] = {}
    for run in runs:
        of_slide.setdefault(run.slide, []).append(run)
    faults = []
    for same in of_slide.values():
        for a, b in combinations(same, 2):
            small, large = sorted((a, b), key=lambda run: len(run.centres_px))
            n_meet = overlap(small.centres_px, large.centres_px, small.mpp)
            if n_meet is not None:
                faults += [(one.run, _overlap(one, a, b, small, n_meet)) for one in (a, b)]
    return _by_run(faults)


def _overlap(
    one: RunOnSlide, a: RunOnSlide, b: RunOnSlide, small: RunOnSlide, n_meet: int
) -> BadInput:
    return BadInput(
        f"run {one.run}",
        expected="runs that lie side by side on their slide",
        found=f"run {a.run} and run {b.run} overlap: {n_meet} of {len(small.centres_px)} cells of "
        f"{small.run} lie within {MEETING_UM:g} µm of a cell of the other",
        remedy="check the alignments of both: one may be the other's; or remove one of the "
        "[[runs]] if both are of one section",
    )


def _by_run(faults: Iterable[tuple[str, BadInput]]) -> dict[str, Exception]:
    of_run: dict[str, list[BadInput]] = {}
    for run, fault in faults:
        of_run.setdefault(run, []).append(fault)
    return {run: f[0] if len(f) == 1 else BadInputs(f) for run, f in of_run.items()}
