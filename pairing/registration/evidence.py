"""Whether a transform is right, and where: told by nuclei that no fit has seen."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from pairing.geometry import Points
from shards.schema import Record

F64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

# A nucleus and its picture lie nearer than this; a cell whose neighbours' do is well placed.
MATCH_UM, NEAR_UM = 3.0, 2.0
# Tissue is where a nucleus of the slide is so near.
_TISSUE_UM = 30.0
# Where the same nuclei are put aside to see how many match by chance.
_ASIDE_UM = (15.0, 22.0, 30.0)
_DIRECTIONS = 4
# Local shares are means over this many held-out nuclei, weighed by a Gaussian of their distance:
# all around a point, and on one side of it, for six sides. One side alone varies more, and may
# have less of the support.
_N_LOCAL, _N_BESIDE, _SIDES, _ONE_SIDED = 40, 60, 6, 0.6
# A side with less of the weight is beyond the edge of the section.
_LEAST_SIDE = 0.25
# Points at a time, for memory.
_AT_A_TIME = 50_000


class Evidence(Record):
    """What nuclei held out of every fit say of the transform.

    Of `n_held_out` of the instrument's nuclei that the transform puts on the slide, `share` have
    a nucleus of the slide within 3 µm that is theirs mutually; shifted aside, `chance` of them.
    `evidence` is (share - chance) / (1 - chance): 1 where all match, 0 where the transform is no
    better than a wrong one; `z` the same in standard deviations of chance. `residual_um` is the
    median distance of those that match.
    """

    n_held_out: int
    n_he_nuclei: int
    share: float
    chance: float
    evidence: float
    z: float
    residual_um: float | None


def hold_out(cell_ids: Sequence[str]) -> Mask:
    """Which cells are kept from every fit: a third, by the CRC-32 of their id."""
    return np.array([zlib.crc32(cell_id.encode()) % 3 == 0 for cell_id in cell_ids], bool)


@dataclass(frozen=True, slots=True)
class LocalEvidence:
    """For each held-out nucleus: its place, whether its picture is near, and how often by chance.

    `usual` is the share that is near where all is well: the 80th percentile of the shares around
    those on tissue.
    """

    xenium_um: Points
    near: F64
    near_by_chance: F64
    usual: float

    def support_at(self, points_um: Points) -> F64:
        """(n,) 1 where as many nuclei are near their pictures as is usual, 0 where chance rules.

        Of the worst side of a point: those across a tear say nothing of it.
        """
        if not len(self.near):
            return np.zeros(len(points_um))
        tree = cKDTree(self.xenium_um)
        parts = [
            np.minimum(self._around(tree, part), self._worst_side(tree, part) / _ONE_SIDED)
            for part in np.split(points_um, range(_AT_A_TIME, len(points_um), _AT_A_TIME))
        ]
        return np.concatenate(parts)

    def _around(self, tree: cKDTree, points_um: Points) -> F64:
        return self._compared(*_weights(tree, points_um, _N_LOCAL))

    def _worst_side(self, tree: cKDTree, points_um: Points) -> F64:
        i, weight = _weights(tree, points_um, _N_BESIDE)
        away = self.xenium_um[i] - points_um[:, None]
        worst = np.full(len(points_um), np.inf)
        for angle in np.arange(_SIDES) * 2 * np.pi / _SIDES:
            ahead = away @ np.array([np.cos(angle), np.sin(angle)]) >= 0
            there = (weight * ahead).sum(axis=1) >= _LEAST_SIDE
            side = self._compared(i[there], (weight * ahead)[there])
            worst[there] = np.minimum(worst[there], side)
        return worst

    def _compared(self, i: npt.NDArray[np.int64], weight: F64) -> F64:
        """Means of nuclei i with weights, between chance and what is usual."""
        weight = weight / weight.sum(axis=1, keepdims=True)
        share, chance = ((weight * v[i]).sum(axis=1) for v in (self.near, self.near_by_chance))
        return np.asarray((share - chance) / np.maximum(self.usual - chance, 0.05))


def weigh_evidence(
    xenium_um: Points, he_um: Points, he_tree: cKDTree, slide_um: tuple[float, float]
) -> tuple[Evidence, LocalEvidence]:
    """Evidence of held-out nuclei: (n, 2) where they lie, and where the transform puts them.

    `he_tree` holds the nuclei found on the slide, of which `slide_um` is the width and height. A
    match is mutual: each is the other's nearest.
    """
    on_slide = ((he_um >= 0) & (he_um < slide_um)).all(axis=1)
    xenium_um, he_um = xenium_um[on_slide], he_um[on_slide]
    distance = _mutual_distance(he_um, he_tree)
    aside = np.array(
        [
            _mutual_distance(he_um + r * np.array([np.cos(a), np.sin(a)]), he_tree)
            for r in _ASIDE_UM
            for a in np.arange(_DIRECTIONS) * 2 * np.pi / _DIRECTIONS + r
        ]
    )
    near = (distance <= NEAR_UM).astype(np.float64)
    near_by_chance = (aside <= NEAR_UM).mean(axis=0)
    shown = on_tissue(he_um, he_tree)
    n = int(shown.sum())
    if n == 0:
        none = Evidence(
            n_held_out=0,
            n_he_nuclei=he_tree.n,
            share=0.0,
            chance=0.0,
            evidence=0.0,
            z=0.0,
            residual_um=None,
        )
        return none, LocalEvidence(xenium_um, near, near_by_chance, 0.0)
    matched = shown & (distance <= MATCH_UM)
    shares = (aside[:, shown] <= MATCH_UM).mean(axis=1)
    share, chance = float(matched.sum() / n), float(shares.mean())
    # Twelve shifts tell the spread badly where few nuclei are: not less than that of a coin.
    spread = max(float(shares.std()), np.sqrt(chance * (1 - chance) / n), 1e-3)
    i, weight = _weights(cKDTree(xenium_um), xenium_um[shown], _N_LOCAL)
    usual = np.quantile((weight * near[i]).sum(axis=1), 0.8)
    return Evidence(
        n_held_out=n,
        n_he_nuclei=he_tree.n,
        share=share,
        chance=chance,
        evidence=(share - chance) / (1 - chance) if chance < 1 else 0.0,
        z=(share - chance) / spread,
        residual_um=float(np.median(distance[matched])) if matched.any() else None,
    ), LocalEvidence(xenium_um, near, near_by_chance, float(usual))


def on_tissue(he_um: Points, he_tree: cKDTree) -> Mask:
    """(n,) which places on the slide have one of its nuclei within 30 µm."""
    return np.asarray(he_tree.query(he_um, distance_upper_bound=_TISSUE_UM)[0] <= _TISSUE_UM)


def mutual_matches(
    points_um: Points, he_tree: cKDTree, radius_um: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of points and of the tree's nuclei that are each other's nearest, within a radius."""
    distance, other = he_tree.query(points_um, distance_upper_bound=radius_um)
    own = np.flatnonzero(np.isfinite(distance))
    if not len(own):
        return own, own
    _, back = cKDTree(points_um).query(np.asarray(he_tree.data)[other[own]])
    own = own[back == own]
    return own, other[own]


def _mutual_distance(points_um: Points, he_tree: cKDTree) -> F64:
    """(n,) distance to the nucleus of the slide that is theirs mutually; infinite where none is."""
    own, other = mutual_matches(points_um, he_tree, MATCH_UM)
    distance = np.full(len(points_um), np.inf)
    distance[own] = np.hypot(*(points_um[own] - np.asarray(he_tree.data)[other]).T)
    return distance


def _weights(tree: cKDTree, points_um: Points, k: int) -> tuple[npt.NDArray[np.int64], F64]:
    """Rows of the nearest in the tree, (n, k), and their weights, which sum up to 1."""
    distance, i = tree.query(points_um, k=[*range(1, min(k, tree.n) + 1)])
    # Three sigma to the last of them: they are weighed alike wherever cells lie dense or sparse.
    sigma = np.maximum(distance[:, -1:] / 2, 1.0)
    weight = np.exp(-0.5 * (distance / sigma) ** 2)
    return i, np.asarray(weight / weight.sum(axis=1, keepdims=True))
