"""Local shifts between nuclei of the instrument and of the slide, by the votes of all pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy.ndimage import correlate1d, gaussian_filter
from scipy.spatial import cKDTree

from pairing.geometry import Points
from pairing.registration.nuclei import HeNuclei

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# Windows are 3 x 3 tiles of this side, weighed 1 2 1: some sixty nuclei. Where they are sparse or
# the slide shows few of them, wider ones, which strain blurs more.
TILE_UM, _WIDE_TILE_UM = 50.0, 100.0
_BLOCK_TILES = 12
_BIN_UM = 2.0
_MIN_NUCLEI = 12.0  # weighed
# A shift is found where its votes stand out of chance by so many standard deviations: with some
# thousand places to look at, chance alone reaches 4; beside known ones there are fewer.
FIRST_Z, NEXT_Z = 6.0, 5.0


@dataclass(frozen=True, slots=True)
class Shifts:
    """k windows in which the shift stood out: middle in the Xenium frame, shift, and z."""

    xenium_um: Points
    shift_um: Points
    z: F64

    def __len__(self) -> int:
        return len(self.z)

    def take(self, rows: Mask) -> Shifts:
        return Shifts(self.xenium_um[rows], self.shift_um[rows], self.z[rows])

    def away(self, points_um: Points) -> F64:
        """(n,) how far points are from the nearest window; infinite without any."""
        return np.asarray(cKDTree(self.xenium_um).query(points_um)[0])

    def joined(self, other: Shifts) -> Shifts:
        return Shifts(
            np.concatenate([self.xenium_um, other.xenium_um]),
            np.concatenate([self.shift_um, other.shift_um]),
            np.concatenate([self.z, other.z]),
        )


NONE = Shifts(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0))


def find_shifts(
    xenium_um: Points, guess_um: Points, he: HeNuclei, radius_um: float, min_z: float
) -> Shifts:
    """By how much the `guess_um`, (n, 2) on the slide, of the nuclei `xenium_um` must be moved.

    For each window the mode, within `radius_um`, of the differences of all pairs of its nuclei and
    the slide's: a cross-correlation of points, those of the slide weighed. Windows whose mode is
    less clear than `min_z` are left out; where there is none, wider ones are tried.
    """
    found = _of_tiles(TILE_UM, xenium_um, guess_um, he, radius_um, min_z)
    apart = found.away(xenium_um) > TILE_UM
    if not apart.any():
        return found
    near = cKDTree(xenium_um[apart]).query(xenium_um)[0] < 1.5 * _WIDE_TILE_UM
    wide = _of_tiles(_WIDE_TILE_UM, xenium_um[near], guess_um[near], he, radius_um, min_z)
    return found.joined(wide.take(found.away(wide.xenium_um) > TILE_UM))


def _of_tiles(
    tile_um: float,
    xenium_um: Points,
    guess_um: Points,
    he: HeNuclei,
    radius_um: float,
    min_z: float,
) -> Shifts:
    tile = np.floor(xenium_um / tile_um).astype(np.int64)
    search = partial(_shifts_of_block, he, radius_um, min_z)
    found = [
        search(xenium_um[near], guess_um[near], tile[near] - first + 1)
        for first, near in _blocks(tile)
    ]
    if not found:
        return NONE
    return Shifts(*(np.concatenate(side) for side in zip(*found, strict=True)))


def _blocks(tile: I64) -> Iterator[tuple[I64, I64]]:
    """First tile of each block that has nuclei, and the nuclei of it and of one tile around."""
    block = tile // _BLOCK_TILES
    for corner in np.unique(block, axis=0):
        first = corner * _BLOCK_TILES
        near = ((tile >= first - 1) & (tile <= first + _BLOCK_TILES)).all(axis=1)
        yield first, np.flatnonzero(near)


def _shifts_of_block(
    he: HeNuclei,
    radius_um: float,
    min_z: float,
    xenium_um: Points,
    guess_um: Points,
    tile: I64,
) -> tuple[Points, Points, F64]:
    """Middles, shifts and z of the windows around the inner tiles of a block; `tile` from 0."""
    n = _BLOCK_TILES + 2
    side = 2 * int(radius_um / _BIN_UM) + 1
    pairs = cKDTree(guess_um).query_ball_tree(he.tree, radius_um)
    own = np.repeat(np.arange(len(pairs)), [len(p) for p in pairs])
    other = np.concatenate([np.asarray(p, np.int64) for p in pairs])
    shift = he.um[other] - guess_um[own]
    column, row = np.floor(shift / _BIN_UM + side / 2).astype(np.int64).T
    inside = (column >= 0) & (row >= 0) & (column < side) & (row < side)
    where = tile[:, 1] * n + tile[:, 0]
    bins = (where[own] * side + row) * side + column
    counts = np.bincount(bins[inside], he.weight[other[inside]], n * n * side * side)
    votes = _over_windows(counts.astype(np.float32).reshape(n, n, side, side))
    nuclei = _over_windows(np.bincount(where, minlength=n * n).reshape(n, n).astype(np.float32))
    weighed = np.stack([np.bincount(where, guess, n * n).reshape(n, n) for guess in xenium_um.T])
    middle = np.stack([_over_windows(w) for w in weighed], axis=-1)

    enough = np.flatnonzero(nuclei[1:-1, 1:-1].ravel() >= _MIN_NUCLEI)
    if len(enough) == 0:
        return np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0)
    smooth = gaussian_filter(votes[1:-1, 1:-1].reshape(-1, side, side)[enough], (0, 1, 1))
    flat = smooth.reshape(len(enough), side * side)
    best = flat.argmax(axis=1)
    z = (flat.max(axis=1) - flat.mean(axis=1)) / (flat.std(axis=1) + 1e-9)
    clear = z >= min_z
    shifts = np.array(
        [
            _centroid(image, int(peak))
            for image, peak in zip(smooth[clear], best[clear], strict=True)
        ]
    ).reshape(-1, 2)
    middles = middle[1:-1, 1:-1].reshape(-1, 2) / nuclei[1:-1, 1:-1].reshape(-1, 1).clip(1e-9)
    return middles[enough][clear], (shifts - side // 2) * _BIN_UM, z[clear].astype(np.float64)


def _over_windows(tiles: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Sums over 3 x 3 tiles of the first two axes, weighed 1 2 1."""
    for axis in (0, 1):
        tiles = correlate1d(tiles, (0.5, 1.0, 0.5), axis=axis, mode="constant")
    return tiles


def _centroid(votes: npt.NDArray[np.float32], peak: int) -> tuple[float, float]:
    """(x, y) in bins of the middle of the votes around the fullest bin, above what is usual."""
    side = votes.shape[0]
    y, x = divmod(peak, side)
    ys = slice(max(y - 2, 0), min(y + 3, side))
    xs = slice(max(x - 2, 0), min(x + 3, side))
    part = np.clip(votes[ys, xs] - votes.mean(), 0, None)
    total = float(part.sum())
    return (
        float((part.sum(axis=0) * np.arange(xs.start, xs.stop)).sum()) / total,
        float((part.sum(axis=1) * np.arange(ys.start, ys.stop)).sum()) / total,
    )
