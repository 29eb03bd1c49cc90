"""Nuclei of both sides made as points, with the true place of each: fast, and nothing painted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from pairing.geometry import Affine, Points
from pairing.registration.nuclei import HeNuclei
from pairing.registration.place import Sides


@dataclass(frozen=True)
class PointPair:
    """`xenium_um` of the instrument, where they truly are on the slide, and what it shows.

    `weight` of what the slide shows; None: all count alike.
    """

    xenium_um: Points
    true_um: Points
    he_um: Points
    slide_um: tuple[float, float]
    weight: npt.NDArray[np.float64] | None = None

    @property
    def sides(self) -> Sides:
        held_out = np.arange(len(self.xenium_um)) % 3 == 0
        weight = np.ones(len(self.he_um)) if self.weight is None else self.weight
        he = HeNuclei(self.he_um, weight)
        return Sides(self.xenium_um, held_out, he, self.slide_um)


def section(rng: np.random.Generator, width_um: float = 1400.0) -> Points:
    """Nuclei of a lopsided piece with a hole, no two nearer than 6 µm, denser on one side."""
    points = rng.uniform(0, width_um, (round(6000 * (width_um / 1000) ** 2), 2))
    x, y = points.T / width_um
    glands = 0.55 + 0.45 * np.sin(9 * x + 4 * y) * np.cos(7 * y - 3 * x * x)
    inside = (y < 0.35 + 0.6 * x) & (np.hypot(x - 0.7, y - 0.3) > 0.1)
    points = points[inside & (rng.random(len(points)) < glands * (0.5 + 0.5 * x))]
    near = cKDTree(points).query_pairs(6.0, output_type="ndarray")
    return np.delete(points, near[:, 1], axis=0)


def wave(points_um: Points, largest_um: float) -> npt.NDArray[np.float64]:
    """A smooth displacement (n, 2) of about 1 mm wavelength."""
    x, y = points_um.T / 160.0
    return largest_um * np.stack([np.sin(x + 0.5 * y), np.cos(y - 0.7 * x)], axis=1)


def point_pair(
    seed: int,
    *,
    largest_um: float = 0.0,
    mirror: bool = False,
    scale: float = 1.0,
    lost: float = 0.3,
    strange: float = 0.2,
    noise_um: float = 0.6,
    width_um: float = 1400.0,
) -> PointPair:
    """A section anywhere on a slide: some nuclei lost, strange ones added, all found inexactly."""
    rng = np.random.default_rng(seed)
    xenium_um = section(rng, width_um)
    turn = Affine.similarity(scale, rng.uniform(0, 2 * np.pi), (0.0, 0.0), mirror=mirror)
    true_um = turn(xenium_um + wave(xenium_um, largest_um))
    true_um += 200 - true_um.min(axis=0)
    kept = true_um[rng.random(len(true_um)) > lost]
    low, high = true_um.min(axis=0), true_um.max(axis=0)
    others = rng.uniform(low, high, (round(strange * len(true_um)), 2))
    he_um = np.concatenate([kept + noise_um * rng.standard_normal(kept.shape), others])
    width, height = (true_um.max(axis=0) + 200).tolist()
    return PointPair(xenium_um, true_um, he_um, (width, height))


def sparse_pair(seed: int) -> PointPair:
    """Three of ten nuclei of a section stretched by 15 µm, of which the slide shows most.

    Beside them it shows four times as many pale blobs that are none.
    """
    whole = point_pair(seed, largest_um=15.0, width_um=2400.0)
    rng = np.random.default_rng([seed, 1])
    some = rng.random(len(whole.xenium_um)) < 0.3
    true_um = whole.true_um[some]
    shown = true_um[rng.random(len(true_um)) < 0.75]
    shown = shown + 0.7 * rng.standard_normal(shown.shape)
    tissue = whole.true_um[rng.integers(0, len(whole.true_um), 4 * len(true_um))]
    pale = tissue + rng.uniform(-40, 40, tissue.shape)
    weight = np.concatenate([rng.uniform(0.4, 1, len(shown)), rng.uniform(0.2, 0.6, len(pale))])
    he_um = np.concatenate([shown, pale])
    return PointPair(whole.xenium_um[some], true_um, he_um, whole.slide_um, weight)
