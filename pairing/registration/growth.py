"""From a rough place to local shifts all over a section: found where it is clear, then grown."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from pairing.geometry import Affine, Points
from pairing.registration.nuclei import HeNuclei
from pairing.registration.votes import FIRST_Z, NEXT_Z, NONE, Shifts, find_shifts

Mask = npt.NDArray[np.bool_]

# As far as a rough place may be off: bins of the coarse maps, turn, and stretch.
SEARCH_UM = 60.0
# Beside what is known, by the local trend.
_NEXT_UM = 24.0
_SETTLED_UM, _NEXT_TO_UM = 50.0, 200.0
_MAX_ROUNDS = 200
# Windows agree with most of those around them within noise, and a strain over their distance.
_AGREE_UM, _STRAIN, _AROUND_UM, _N_AROUND = 6.0, 0.2, 300.0, 8
_N_TREND, _TREND_UM = 12, 100.0
_RIDGE = 0.02
_TUKEY = 4.685


def fit_affine(src: Points, dst: Points, scale_um: float) -> tuple[Affine, npt.NDArray[np.float64]]:
    """Robust least squares `dst_from_src`, and the (n,) distances that it leaves.

    Tukey's biweight, of the residuals' median absolute deviation but at least `scale_um`. Raises
    ValueError where the points do not span a plane.
    """
    design = np.column_stack([src, np.ones(len(src))])
    weight = np.ones(len(src))
    for _ in range(20):
        root = np.sqrt(weight)[:, None]
        solution = np.linalg.lstsq(design * root, dst * root, rcond=None)[0]
        distance = np.hypot(*(design @ solution - dst).T)
        sigma = max(1.4826 * float(np.median(distance)), scale_um)
        weight = np.clip(1 - (distance / (_TUKEY * sigma)) ** 2, 0, None) ** 2
    return Affine.of(np.vstack([solution.T, (0.0, 0.0, 1.0)])), distance


def first_shifts(xenium_um: Points, rough: Affine, he: HeNuclei) -> Shifts:
    """Shifts from a `rough` place of those windows that one wide search finds, and that agree."""
    return agreeing(find_shifts(xenium_um, rough(xenium_um), he, SEARCH_UM, FIRST_Z))


def grow(xenium_um: Points, base_um: Points, he: HeNuclei, known: Shifts) -> Shifts:
    """`known` shifts from `base_um`, and those of windows beside them, and beside these …

    Each is looked for where the local trend puts it, so that stretch, turn and the two sides of a
    tear are followed from window to window.
    """
    for _ in range(_MAX_ROUNDS):
        fresh = look_beside(xenium_um, base_um, partial(trend_at, known), he, known)
        n_before, known = len(known), agreeing(known.joined(fresh))
        if len(known) <= n_before:
            break
    # Once more, now that the trend around each window is known.
    for _ in range(2):
        if len(known):
            near = known.away(xenium_um) < _NEXT_TO_UM
            trend = partial(trend_at, known)
            known = agreeing(_look(xenium_um[near], base_um[near], trend, he))
    return known


def open_ends(xenium_um: Points, known: Shifts) -> Mask:
    """(n,) which nuclei are near known windows, and as near to some that are in none."""
    away = known.away(xenium_um)
    beside = xenium_um[(away > _SETTLED_UM) & (away < _NEXT_TO_UM)]
    if not len(beside):
        return np.zeros(len(xenium_um), bool)
    near = cKDTree(beside).query(xenium_um)[0] < _NEXT_TO_UM
    return np.asarray(near & (away < _NEXT_TO_UM))


def look_beside(
    xenium_um: Points,
    base_um: Points,
    guess_shift_um: Callable[[Points], Points],
    he: HeNuclei,
    known: Shifts,
) -> Shifts:
    """New windows beside `known` ones, by a guess of the shift from `base_um` at any point."""
    if not len(known):
        return known
    here = open_ends(xenium_um, known)
    found = _look(xenium_um[here], base_um[here], guess_shift_um, he)
    return found.take(known.away(found.xenium_um) > _SETTLED_UM / 2)


def _look(
    xenium_um: Points,
    base_um: Points,
    guess_shift_um: Callable[[Points], Points],
    he: HeNuclei,
) -> Shifts:
    if not len(xenium_um):
        return NONE
    guess_um = base_um + guess_shift_um(xenium_um)
    found = find_shifts(xenium_um, guess_um, he, _NEXT_UM, NEXT_Z)
    return Shifts(found.xenium_um, found.shift_um + guess_shift_um(found.xenium_um), found.z)


def agreeing(shifts: Shifts) -> Shifts:
    """Those that agree with at least half of the windows around them, and with two at least."""
    if len(shifts) <= 2:
        return shifts.take(np.zeros(len(shifts), bool))
    k = min(_N_AROUND + 1, len(shifts))
    distance, i = cKDTree(shifts.xenium_um).query(shifts.xenium_um, k=k)
    around = distance[:, 1:] < _AROUND_UM
    off = np.linalg.norm(shifts.shift_um[i[:, 1:]] - shifts.shift_um[:, None], axis=2)
    agree = ((off < _AGREE_UM + _STRAIN * distance[:, 1:]) & around).sum(axis=1)
    return shifts.take((agree >= 2) & (agree >= around.sum(axis=1) / 2))


def trend_at(shifts: Shifts, points_um: Points) -> Points:
    """(n, 2) shifts at points by the local linear trend of the nearest windows.

    Tricube weights (Cleveland, JASA 1979;74:829); a ridge on the slope, so that it levels out
    where windows are on one side only.
    """
    k = min(_N_TREND, len(shifts))
    distance, i = cKDTree(shifts.xenium_um).query(points_um, k=[*range(1, k + 1)])
    reach = np.maximum(distance[:, -1:], _TREND_UM)
    weight = np.clip(1 - (distance / (1.01 * reach)) ** 3, 0, None) ** 3
    away = (shifts.xenium_um[i] - points_um[:, None]) / reach[..., None]
    design = np.concatenate([np.ones((*away.shape[:2], 1)), away], axis=2)
    weighed = design * weight[..., None]
    normal = np.einsum("nki,nkj->nij", weighed, design) + np.diag([1e-6, _RIDGE, _RIDGE])
    right = np.einsum("nki,nkj->nij", weighed, shifts.shift_um[i])
    return np.asarray(np.linalg.solve(normal, right)[:, 0])
