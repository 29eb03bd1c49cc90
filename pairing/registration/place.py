"""A section's place on its slide: found among all, refined to a smooth field, and weighed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from pairing.geometry import Affine, Points
from pairing.registration.coarse import Candidate, find_candidates, find_pieces
from pairing.registration.evidence import (
    Evidence,
    LocalEvidence,
    mutual_matches,
    on_tissue,
    weigh_evidence,
)
from pairing.registration.field import Field, solve_field
from pairing.registration.growth import (
    SEARCH_UM,
    agreeing,
    first_shifts,
    fit_affine,
    grow,
    look_beside,
    open_ends,
    trend_at,
)
from pairing.registration.nuclei import HeNuclei
from pairing.registration.votes import FIRST_Z, Shifts, find_shifts

Mask = npt.NDArray[np.bool_]
F64 = npt.NDArray[np.float64]

# Right registrations have evidence of 0.45 and more and z of 14 and more, wrong ones 0.05 and 3
# at most (docs/registration.md).
CLEAR_EVIDENCE, CLEAR_Z = 0.15, 6.0
# Pixel sizes that files state may be wrong by a quarter; a stretch of 3.5 % does no harm.
SCALES = (0.93, 1.07, 0.86, 1.15, 0.8, 1.24, 0.75, 1.33)
_N_CANDIDATES, _N_OF_PIECE = 6, 2
# Candidates are compared by the windows of so many nuclei, in squares all over the section.
_COMPARED_NUCLEI, _SQUARE_UM = 15_000, 600.0
_MIN_WINDOWS, _MIN_MATCHES = 8, 12
# Windows on one line hold no turn.
_ACROSS_UM = 20.0
_PLACE_UM, _NEAR_PLACE_UM = 5.0, 25.0
# Rounds of matching: radius, and how many matches a block takes.
_MAX_FIELDS, _GROWN = 12, 1.003
_MATCHING = ((5.0, 150), (3.0, 500))
# Nuclei are matched only where a window around them has found its place.
_KNOWN_UM = 60.0
# Or, on from there, where the field is as sure along an axis.
_NEAR_SD_UM = 2.0
# Of a match along an axis; the least is what pixels allow, the most what a chance match has.
_NOISE_UM, _N_NOISE = (0.2, 1.2), 24
# Cells whose error may be more than this are not sure.
SURE_UM = 2.0
# Where support falls to this share of what is usual, cells are SURE_UM off; below, soon far more.
_WEAK_SUPPORT, _LEAST_SUPPORT, _STEEP = 0.4, 0.1, 8


@dataclass(frozen=True, slots=True)
class Fit:
    """`he_um_from_xenium_um`: an affine and a field; what held-out nuclei say of it.

    `check` is the field that the held-out nuclei alone would give.
    """

    rough: Affine
    field: Field
    check: Field
    evidence: Evidence
    local: LocalEvidence
    he_tree: cKDTree

    def __call__(self, points_um: Points) -> Points:
        return self.rough(points_um) + self.field.at(points_um)

    @property
    def is_clear(self) -> bool:
        """Whether nobody would doubt that it is the right place."""
        return self.evidence.evidence >= CLEAR_EVIDENCE and self.evidence.z >= CLEAR_Z

    def on_tissue(self, points_um: Points) -> Mask:
        """(n,) which points the slide shows tissue of."""
        return on_tissue(self(points_um), self.he_tree)

    def error_um(self, points_um: Points) -> F64:
        """(n,) estimated distance between where points are put and where they belong.

        Root mean square of what the fit leaves open, given how far from it the held-out nuclei
        put the points, and of what too few matches around them tell; at most what was searched.
        """
        own, other = self.field.sd_at(points_um) ** 2, self.check.sd_at(points_um) ** 2
        apart = ((self.field.at(points_um) - self.check.at(points_um)) ** 2).sum(axis=1)
        left = apart * (own / (own + other)) ** 2 + 2 * own * other / (own + other)
        support = np.maximum(self.local.support_at(points_um), _LEAST_SUPPORT)
        weak_um = SURE_UM * (_WEAK_SUPPORT / support) ** _STEEP
        return np.asarray(np.minimum(np.sqrt(left + weak_um**2), SEARCH_UM))


@dataclass(frozen=True)
class Sides:
    """Nuclei of both sides: the instrument's, in the Xenium frame, and the slide's, in its µm.

    `held_out` marks those of the instrument that no fit may see; `slide_um` is (width, height).
    """

    xenium_um: Points
    held_out: Mask
    he: HeNuclei
    slide_um: tuple[float, float]

    def found(self) -> Fit | None:
        """The best place; None where nowhere on the slide a few windows fit."""
        own = self.xenium_um[~self.held_out]
        fits = []
        for candidates in self._searches(own):
            fit = self._best_of(own, candidates)
            if fit is not None:
                fits.append(fit)
                if fit.is_clear:
                    break
        return max(fits, key=lambda f: f.evidence.evidence, default=None)

    def _searches(self, own: Points) -> Iterator[list[Candidate]]:
        """Of the section at the stated scale, of what may be left of it, and at other scales."""
        yield find_candidates(own, self.he.um, self.slide_um, 1.0, _N_CANDIDATES)
        yield find_pieces(own, self.he.um, _N_OF_PIECE)
        scaled = [
            candidate
            for scale in SCALES
            for candidate in find_candidates(own, self.he.um, self.slide_um, scale, _N_CANDIDATES)
        ]
        yield sorted(scaled, key=lambda candidate: -candidate.correlation)[:_N_CANDIDATES]

    def _best_of(self, own: Points, candidates: list[Candidate]) -> Fit | None:
        """The fit at the candidate that most windows agree with."""
        best_n, best = 0, None
        for candidate in candidates:
            rough = candidate.he_um_from_xenium_um
            some = _some_squares(own[on_tissue(rough(own), self.he.tree)])
            shifts = find_shifts(some, rough(some), self.he, SEARCH_UM, FIRST_Z)
            if not _hold_a_place(shifts):
                continue
            moved = rough(shifts.xenium_um) + shifts.shift_um
            affine, off_um = fit_affine(shifts.xenium_um, moved, _PLACE_UM)
            n = int((off_um < _NEAR_PLACE_UM).sum())
            if n > best_n:
                best_n, best = n, affine
        return None if best is None else self.fitted(best)

    def fitted(self, rough: Affine) -> Fit | None:
        """The field around a rough place; None where hardly a window fits there."""
        own, held = self.xenium_um[~self.held_out], self.xenium_um[self.held_out]
        shifts = self._shifts(own, rough)
        if shifts is None:
            return None
        seen, shift_um = self._reached(rough, own, shifts)
        unseen = held[cKDTree(seen).query(held)[0] < _KNOWN_UM]
        field = None
        for radius_um, max_matches in _MATCHING:
            field = self._field(
                rough, seen, shift_um, radius_um, max_matches, within_um=self.xenium_um
            )
            if field is None:
                return None
            shift_um = field.at(seen)
        assert field is not None
        check = self._field(
            rough, unseen, field.at(unseen), *_MATCHING[-1], within_um=self.xenium_um
        )
        if check is None:
            return None
        evidence, local = weigh_evidence(
            held, rough(held) + field.at(held), self.he.tree, self.slide_um
        )
        return Fit(rough, field, check, evidence, local, self.he.tree)

    def _reached(self, rough: Affine, own: Points, shifts: Shifts) -> tuple[Points, Points]:
        """Nuclei that can be matched, and their shifts: those around windows, and on from these.

        Along thin and sparse parts, where no window fits, from nucleus to nucleus, as far as the
        field through the matches is sure.
        """
        away = shifts.away(own)
        seen, rest = own[away < _KNOWN_UM], own[away >= _KNOWN_UM]
        shift_um = trend_at(shifts, seen)
        while len(rest):
            field = self._field(rough, seen, shift_um, *_MATCHING[0], within_um=rest)
            if field is None:
                break
            near = field.sd_at(rest) < _NEAR_SD_UM
            if not near.any():
                break
            seen = np.concatenate([seen, rest[near]])
            shift_um = np.concatenate([shift_um, field.at(rest[near])])
            rest = rest[~near]
        return seen, shift_um

    def _shifts(self, own: Points, rough: Affine) -> Shifts | None:
        """Windows all over the section; None where hardly one fits.

        Where the trend of windows leads no further, that of the nuclei in them may.
        """
        base = rough(own)
        shifts, n_before = first_shifts(own, rough, self.he), 0
        for _ in range(_MAX_FIELDS):
            shifts = grow(own, base, self.he, shifts)
            if not _hold_a_place(shifts):
                return None
            here = own[open_ends(own, shifts)]
            if not len(here) or len(shifts) <= _GROWN * n_before:
                break
            seen = own[shifts.away(own) < _KNOWN_UM]
            trend = trend_at(shifts, seen)
            field = self._field(rough, seen, trend, *_MATCHING[0], within_um=here)
            if field is None:
                return None
            n_before = len(shifts)
            fresh = look_beside(own, base, field.at, self.he, shifts)
            shifts = agreeing(shifts.joined(fresh))
        return shifts

    def _field(
        self,
        rough: Affine,
        points_um: Points,
        shift_um: Points,
        radius_um: float,
        most: int,
        *,
        within_um: Points,
    ) -> Field | None:
        """The field through the matches of points that are expected at a shift; None of too few."""
        guess = rough(points_um) + shift_um
        i, j = mutual_matches(guess, self.he.tree, radius_um)
        if len(i) < _MIN_MATCHES:
            return None
        off = self.he.um[j] - guess[i]
        # In crowded places nuclei are found less exactly, and pale ones everywhere.
        n_near = [*range(1, min(_N_NOISE, len(i)) + 1)]
        _, near = cKDTree(points_um[i]).query(points_um[i], k=n_near)
        noise_um = 1.4826 * np.median(np.abs(off[near]), axis=(1, 2))
        weight = self.he.weight[j]
        noise_um = np.clip(noise_um * np.sqrt(np.median(weight) / weight), *_NOISE_UM)
        return solve_field(points_um[i], shift_um[i] + off, within_um, noise_um, most)


def _hold_a_place(shifts: Shifts) -> bool:
    """Whether there are enough windows, and not all along one line."""
    if len(shifts) < _MIN_WINDOWS:
        return False
    variance_across = np.linalg.eigvalsh(np.cov(shifts.xenium_um.T))[0]
    return bool(np.sqrt(max(variance_across, 0.0)) >= _ACROSS_UM)


def _some_squares(points_um: Points) -> Points:
    """Points of every nth square of the plane, so that some thousands are left."""
    n = -(-len(points_um) // _COMPARED_NUCLEI)
    column, row = np.floor(points_um / _SQUARE_UM).astype(np.int64).T
    # Steps of a knight: no n puts all squares on one line.
    some: Points = points_um[(column + 2 * row) % n == 0]
    return some
