"""The match rate of nuclei over the section, beside what the registration's error predicts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from scipy.optimize import brentq
from scipy.spatial import cKDTree

from pairing.geometry import Points, Transform
from pairing.match import one_to_one
from pairing.match_tiles import MIN_IOU
from shards.schema import Record

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# Squares on the slide; one of fewer nuclei says nothing.
REGION_UM, MIN_NUCLEI = 200.0, 50
REGION_COLUMNS = ("x_um", "y_um", "n_nuclei", "found", "predicted", "by_chance")
# Found is far below predicted where it lies nearer to chance than to what is predicted. Right
# registrations reach 0.8 and more of the way, those 4 µm off less than half of it
# (docs/registration.md).
FAR_BELOW = 0.5
# Where predicted and chance are nearer to each other, what is found tells nothing.
_MIN_ROOM = 0.1
# More of the nuclei than this in squares that are far below are told.
MAX_IN_FAR_SQUARES = 0.1
# Below this most nuclei have none, whatever the registration.
MIN_AVAILABLE = 0.5
# Nuclei are put aside by more than one of them is wide, to see how many match by chance.
_ASIDE_UM, _DIRECTIONS = 15.0, 4
_N_NEAR, _AT_A_TIME = 8, 50_000


@dataclass(frozen=True, slots=True)
class PlacedNuclei:
    """Nuclei on the slide: centroids (n, 2) in its µm, and areas (n,)."""

    um: Points
    area_um2: F64

    @classmethod
    def of_instrument(
        cls, nuclei: pd.DataFrame, he_px_from_xenium_um: Transform, mpp: float
    ) -> PlacedNuclei:
        """Those of a run, on a slide of `mpp`."""
        um = he_px_from_xenium_um(nuclei[["x_um", "y_um"]].to_numpy()) * mpp
        return cls(um, nuclei["area_um2"].to_numpy())

    @classmethod
    def of_he(cls, nuclei: pa.Table, mpp: float) -> PlacedNuclei:
        """Those found on a slide of `mpp`, in the table of `segmentation`."""
        um = np.stack([nuclei["x_px"], nuclei["y_px"]], axis=1) * mpp
        return cls(um, nuclei["area_um2"].to_numpy())

    @property
    def radius_um(self) -> F64:
        """(n,) of the disc of the same area."""
        return np.sqrt(self.area_um2 / np.pi)


class MatchRate(Record):
    """Shares of a run's nuclei, those of its cells: what was found, and what was to be expected.

    `found` have an H&E nucleus. `available` is the most that can have one, for want of nuclei
    found on the H&E; `predicted` the most that do at the registration's estimated error;
    `by_chance` as many would at a wrong place. `in_far_squares` lie in squares that are far below
    predicted, of those in squares of at least MIN_NUCLEI nuclei.
    """

    n_nuclei: int
    found: float
    available: float
    predicted: float
    by_chance: float
    in_far_squares: float

    @property
    def is_far_below(self) -> bool:
        """Whether the registration's error does not explain how few were found."""
        found, predicted, by_chance = np.array([[self.found], [self.predicted], [self.by_chance]])
        return self.n_nuclei >= MIN_NUCLEI and bool(far_below(found, predicted, by_chance)[0])

    @property
    def faults(self) -> tuple[str, ...]:
        """What is to be told, in words; empty for a run that matches as predicted."""
        told = []
        if self.is_far_below:
            told.append(
                f"{self.found:.0%} of {self.n_nuclei:,} nuclei have an H&E nucleus; a registration "
                f"as exact as this one is held to be gives up to {self.predicted:.0%}, chance "
                f"{self.by_chance:.0%}: the cells lie farther from their nuclei than that, or the "
                "nuclei found on the H&E are others"
            )
        elif self.in_far_squares > MAX_IN_FAR_SQUARES:
            told.append(
                f"{self.in_far_squares:.0%} of the nuclei lie in squares of {REGION_UM:g} µm "
                "where far fewer have an H&E nucleus than the registration's error predicts"
            )
        if self.available < MIN_AVAILABLE:
            told.append(
                f"at most {self.available:.0%} of {self.n_nuclei:,} nuclei can have an H&E "
                "nucleus, so few were found where the cells lie: most are not segmented, or the "
                "cells do not lie on the tissue"
            )
        return tuple(told)


def far_below(found: F64, predicted: F64, by_chance: F64) -> Mask:
    """Where `found` lies nearer to chance than to what is predicted; False where any is NaN."""
    room = predicted - by_chance
    return np.asarray((room >= _MIN_ROOM) & (found - by_chance < FAR_BELOW * room))


def iou_of_discs(distance: F64, radius: F64, other_radius: F64) -> F64:
    """IoU of two discs, by the area of their lens.

    The circular segments of both: https://mathworld.wolfram.com/Circle-CircleIntersection.html,
    eq. 14. Radii are positive.
    """
    small, large = np.minimum(radius, other_radius), np.maximum(radius, other_radius)
    # Within one another or apart the lens is the smaller disc, or nothing.
    d = np.clip(distance, np.maximum(large - small, 1e-9 * large), large + small)
    of_small = np.arccos(np.clip((d**2 + small**2 - large**2) / (2 * d * small), -1, 1))
    of_large = np.arccos(np.clip((d**2 + large**2 - small**2) / (2 * d * large), -1, 1))
    kite = (large + small - d) * (d + small - large) * (d - small + large) * (d + small + large)
    lens = small**2 * of_small + large**2 * of_large - np.sqrt(np.maximum(kite, 0)) / 2
    return np.asarray(lens / (np.pi * (small**2 + large**2) - lens))


@cache
def reach_per_radius() -> float:
    """How many radii apart two discs of one size are whose IoU is MIN_IOU: 1.41 for 0.1."""
    one = np.ones(1)
    return float(brentq(lambda d: iou_of_discs(d * one, one, one)[0] - MIN_IOU, 0, 2))


def chance_within_reach(radius_um: F64, error_um: F64) -> F64:
    """(n,) probability that a nucleus and its own picture overlap by MIN_IOU, as discs of one size.

    `error_um` is the root mean square of the distance between them (docs/registration.md). With
    the same normal error along both axes the distance d has Rayleigh's distribution,
    P(d <= t) = 1 - exp(-t² / error²). Where the error was not assessed (NaN) the alignment was
    taken as given, which is to say as right: 1.
    """
    reach = reach_per_radius() * radius_um
    times = np.full_like(reach, np.inf)
    with np.errstate(over="ignore"):  # infinitely many times an error next to nothing
        np.divide(reach, error_um, out=times, where=error_um > 0)
        return np.asarray(-np.expm1(-(times**2)))


def matches_by_chance(instrument: PlacedNuclei, he: PlacedNuclei) -> F64:
    """(n,) how often a nucleus matches when all are put aside, one to one, as discs.

    In four directions, by more than a nucleus is wide. On simulated sections discs match as often
    as outlines do, within 0.03.
    """
    matched = np.zeros(len(instrument.um))
    if not len(he.um):
        return matched
    tree = cKDTree(he.um)
    for angle in np.arange(_DIRECTIONS) * 2 * np.pi / _DIRECTIONS + 0.3:
        aside = instrument.um + _ASIDE_UM * np.array([np.cos(angle), np.sin(angle)])
        own, other, iou = _overlapping(aside, instrument.radius_um, tree, he.radius_um)
        matched[own[one_to_one(own, other, iou)]] += 1
    return matched / _DIRECTIONS


def _overlapping(
    um: Points, radius_um: F64, he_tree: cKDTree, he_radius_um: F64
) -> tuple[I64, I64, F64]:
    """Rows of both sides whose discs overlap by MIN_IOU, among the nearest of each, and the IoU."""
    drawn = np.flatnonzero(radius_um > 0)  # an outline may enclose nothing
    parts = []
    for some in np.split(drawn, range(_AT_A_TIME, len(drawn), _AT_A_TIME)):
        near = min(_N_NEAR, he_tree.n)
        distance, other = he_tree.query(um[some], k=np.arange(1, near + 1))
        # Rounded, so that pairs of one IoU are settled by row, not by a processor's last bits.
        iou = iou_of_discs(distance, radius_um[some, None], he_radius_um[other]).round(9)
        row, k = np.nonzero(iou >= MIN_IOU)
        parts.append((some[row], other[row, k], iou[row, k]))
    own, others, ious = (np.concatenate(column) for column in zip(*parts, strict=True))
    return own, others, ious


def match_rates(
    instrument: PlacedNuclei,
    he: PlacedNuclei,
    matched: Mask,
    error_um: F64,
    counted: Mask,
) -> tuple[MatchRate, pd.DataFrame] | None:
    """The match rate of a run and of each square of the slide; None where no nucleus counts.

    `matched`, `error_um` and `counted` are of the instrument's nuclei: which have an H&E nucleus,
    how far off they are estimated to lie, and which count; all stand for the density. Predicted
    is `available` × p + `by_chance` × (1 - p): of the nuclei that lie within reach of their own
    picture, a share p (`chance_within_reach`), those match that have one; the others match by
    chance. How many have one is bounded in each square: no more than its H&E nuclei.

    The table has REGION_COLUMNS, a row a square of REGION_UM with nuclei that count: its corner on
    the slide, their number, and the rates, NaN for fewer than MIN_NUCLEI.
    """
    if not counted.any():
        return None
    squares, of_nucleus, of_he = _squares(instrument.um, he.um)
    n_squares = len(squares)
    within_reach = chance_within_reach(instrument.radius_um, error_um)
    by_chance = matches_by_chance(instrument, he)
    n_all = np.bincount(of_nucleus, minlength=n_squares)
    available = np.minimum(1.0, np.bincount(of_he, minlength=n_squares) / n_all)
    predicted = available[of_nucleus] * within_reach + by_chance * (1 - within_reach)
    per_nucleus = pd.DataFrame(
        {
            "found": matched.astype(np.float64),
            "available": available[of_nucleus],
            "predicted": predicted,
            "by_chance": by_chance,
        }
    )[counted]
    by_square = per_nucleus.groupby(of_nucleus[counted])
    n_nuclei = by_square.size().to_numpy()
    table = by_square.mean()
    corners = squares[table.index.to_numpy()] * REGION_UM
    table = table.assign(x_um=corners[:, 0], y_um=corners[:, 1], n_nuclei=n_nuclei)
    rates = ["found", "predicted", "by_chance"]
    table.loc[n_nuclei < MIN_NUCLEI, rates] = np.nan
    far = far_below(*(table[name].to_numpy() for name in rates))
    n_assessed = int(n_nuclei[n_nuclei >= MIN_NUCLEI].sum())
    rate = MatchRate(
        n_nuclei=len(per_nucleus),
        **{str(name): float(share) for name, share in per_nucleus.mean().items()},
        in_far_squares=float(n_nuclei[far].sum() / n_assessed) if n_assessed else 0.0,
    )
    return rate, table[list(REGION_COLUMNS)].reset_index(drop=True)


def _squares(um: Points, he_um: Points) -> tuple[Points, I64, I64]:
    """Squares (k, 2) that hold a nucleus of the instrument, in steps of REGION_UM; the square of
    each of these, and of each H&E nucleus that lies in one."""
    squares, of_nucleus = np.unique(np.floor(um / REGION_UM), axis=0, return_inverse=True)
    index = pd.MultiIndex.from_arrays(list(squares.T))
    of_he = index.get_indexer(pd.MultiIndex.from_arrays(list(np.floor(he_um / REGION_UM).T)))
    return squares, of_nucleus.ravel(), of_he[of_he >= 0]
