"""What single runs cannot know: two of them that hold the same cells.

The same cell twice in a dataset is a pair counted twice; under two donors it is a leak between
splits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from flows.config import RunConfig
from shards.errors import BadInput, BadInputs

# Cells of one section that were carried over twice meet again within the error that a registration
# may have (5 µm by default). Regions that only touch have few such pairs: of random cells at ρ per
# µm², ρ² · 2/3 r³ a µm of border, so with 8,000 cells per mm² and four borders 0.24 / √n of n cells
# (4 % of 36, 1 % of 576), and fewer of real cells, which keep apart. The floor is for tiny runs.
MEETING_UM = 5.0
OVERLAP_FRACTION = 0.05
OVERLAP_CELLS = 5


@dataclass(frozen=True, slots=True)
class RunOnSlide:
    """A registered run: its cells' centres (n, 2) in level-0 pixels of the slide with this hash."""

    run: str
    slide: str
    centres_px: npt.NDArray[np.float64]
    mpp: float


def same_bundles(runs: Sequence[tuple[RunConfig, str]]) -> dict[str, Exception]:
    """The faults, by run, of runs whose bundles have the same content hash.

    One bundle may come twice only as an H&E run and a morphology run of the same donors.
    """
    faults: list[tuple[str, BadInput]] = []
    for (a, a_hash), (b, b_hash) in combinations(runs, 2):
        if a_hash == b_hash:
            faults += [(one.id, fault) for one in (a, b) for fault in _same(one, a, b)]
    return _by_run(faults)


def _same(one: RunConfig, a: RunConfig, b: RunConfig) -> Iterator[BadInput]:
    same = f"run {a.id} and run {b.id} have the same bundle, byte by byte"
    if a.donor != b.donor:
        found = f"{same}, but the donors {_donor(a)} and {_donor(b)}"
        remedy = "name the right bundle, or the right donor; a person's other names: split.aliases"
    elif a.image == b.image:
        found, remedy = f"{same}, and the same kind of image", "remove one of the two [[runs]]"
    else:
        return
    yield BadInput(
        f"run {one.id}, xenium = {one.xenium}",
        expected="every bundle once, or once with its slide and once as morphology, of one donor",
        found=found,
        remedy=remedy,
    )


def _donor(run: RunConfig) -> str:
    return f"of {run.donors.name}" if run.donors is not None else repr(run.donor)


def overlaps(runs: Sequence[RunOnSlide]) -> dict[str, Exception]:
    """The faults, by run, of runs on one slide whose cells lie on each other.

    Runs side by side on one slide are normal. A pair overlaps where at least 5 % of the cells of
    the smaller run, and at least 5 of them, lie within 5 µm of a cell of the other.
    """
    faults = []
    for a, b in combinations(runs, 2):
        small, large = sorted((a, b), key=lambda run: len(run.centres_px))
        if a.slide != b.slide or not len(small.centres_px):
            continue
        away_px, _ = cKDTree(large.centres_px).query(small.centres_px)
        n, n_meet = len(away_px), int((away_px * small.mpp <= MEETING_UM).sum())
        if n_meet >= max(OVERLAP_CELLS, OVERLAP_FRACTION * n):
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
