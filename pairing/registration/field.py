"""A smooth displacement from matched nuclei: Gaussian processes on overlapping blocks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy import linalg
from scipy.ndimage import map_coordinates
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from threadpoolctl import threadpool_limits

from pairing.geometry import Points

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

STEP_UM = 25.0
# Steps between the middles of blocks; each reaches to those of its neighbours.
_BLOCK_STEPS = 8
_HALO_UM = 100.0
# Candidates for the size and the reach of the displacement, by marginal likelihood in each block.
_AMPLITUDE_UM = (0.5, 2.0, 8.0, 32.0)
_LENGTH_UM = (160.0, 320.0, 640.0)
_LIKELIHOOD_MATCHES = 150
_FIRST = (8.0, 320.0)
# What a block may be shifted by, and so strained over a reach, before anything is known.
_TREND_UM, _TREND_REACH_UM = 40.0, 300.0
# Tukey's biweight at 80 % efficiency (Maronna et al., Robust Statistics, 2006): up to a fifth of
# the matches are chance. An outlier keeps a trace of weight.
_TUKEY, _LEAST_WEIGHT, _ROUNDS = 3.14, 1e-3, 3


@dataclass(frozen=True, slots=True)
class Field:
    """Displacements (rows, columns, 2) in µm and standard deviation of an axis (rows, columns).

    At nodes `STEP_UM` apart in the Xenium frame, the first at `origin_um`.
    """

    origin_um: tuple[float, float]
    shift_um: F64
    sd_um: F64

    def at(self, points_um: Points) -> Points:
        """(n, 2) by cubic splines; beyond the nodes as on their border."""
        return np.stack([self._at(self.shift_um[..., k], points_um, 3) for k in (0, 1)], axis=1)

    def sd_at(self, points_um: Points) -> F64:
        return self._at(self.sd_um, points_um, 1)

    def _at(self, values: F64, points_um: Points, order: int) -> F64:
        column, row = (points_um - self.origin_um).T / STEP_UM
        return np.asarray(map_coordinates(values, [row, column], order=order, mode="nearest"))


@dataclass(frozen=True, slots=True)
class _Matches:
    """Shifts (n, 2) measured at points, with the noise of an axis."""

    at_um: Points
    shift_um: Points
    noise_um: F64
    tree: cKDTree


@dataclass(frozen=True, slots=True)
class _Block:
    """Nodes around a middle that are in the grid: their rows and columns, and weights."""

    middle_um: Points
    rows: I64
    columns: I64
    weight: F64
    nodes_um: Points


def solve_field(
    at_um: Points,
    shift_um: Points,
    within_um: Points,
    noise_um: F64,
    max_matches: int,
) -> Field:
    """The smooth displacement that explains `shift_um`, (n, 2), measured at `at_um`.

    Wherever one of `within_um` lies. Matérn 5/2 and a linear trend (Rasmussen & Williams, 2006, eq.
    4.17 and 2.30) on blocks of 400 µm that overlap by half and are blended, each with its own
    length and amplitude; `noise_um`, (n,), of each along an axis, outliers weighed down by Tukey's
    biweight; of more than `max_matches` around a block as many are taken, from all over it.
    """
    low = np.floor(within_um.min(axis=0) / STEP_UM) - 1
    size = np.ceil(within_um.max(axis=0) / STEP_UM) + 2 - low
    n_columns, n_rows = (np.ceil(size / _BLOCK_STEPS) * _BLOCK_STEPS + 1).astype(int).tolist()
    shift = np.zeros((n_rows, n_columns, 2))
    variance, weight = np.zeros((2, n_rows, n_columns))
    matches = _Matches(at_um, shift_um, noise_um, cKDTree(at_um))
    blocks = list(_blocks(within_um, low, n_rows, n_columns))
    # One thread a block: libraries that share one out add up in an order of their own.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        solved = pool.map(partial(_solve, matches, max_matches), blocks)
        for block, (mean, var) in zip(blocks, solved, strict=True):
            at = np.ix_(block.rows, block.columns)
            shift[at] += block.weight[..., None] * mean.reshape(*block.weight.shape, 2)
            variance[at] += block.weight * var.reshape(block.weight.shape)
            weight[at] += block.weight
    known = weight > 0
    shift[known] /= weight[known][:, None]
    variance[known] /= weight[known]
    variance[~known] = _TREND_UM**2
    return Field((float(low[0] * STEP_UM), float(low[1] * STEP_UM)), shift, np.sqrt(variance))


def _blocks(within_um: Points, low: F64, n_rows: int, n_columns: int) -> Iterator[_Block]:
    """The blocks that some of `within_um` lie in, with tents for weights."""
    inside = cKDTree(within_um)
    steps = np.arange(-_BLOCK_STEPS + 1, _BLOCK_STEPS)
    tent = 1 - np.abs(steps) / _BLOCK_STEPS
    for j in range(0, n_rows, _BLOCK_STEPS):
        for i in range(0, n_columns, _BLOCK_STEPS):
            middle = (low + np.array([i, j])) * STEP_UM
            if inside.query(middle, p=np.inf)[0] > (_BLOCK_STEPS + 1) * STEP_UM:
                continue
            rows, columns = j + steps, i + steps
            y, x = (rows >= 0) & (rows < n_rows), (columns >= 0) & (columns < n_columns)
            rows, columns = rows[y], columns[x]
            nodes = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2) + low
            yield _Block(middle, rows, columns, np.outer(tent[y], tent[x]), nodes * STEP_UM)


def _solve(matches: _Matches, max_matches: int, block: _Block) -> tuple[Points, F64]:
    """Mean (m, 2) and variance (m,) at the nodes of a block."""
    nodes = block.nodes_um - block.middle_um
    trend = _TREND_UM**2 * (1 + (nodes**2).sum(axis=1) / _TREND_REACH_UM**2)
    reach = _BLOCK_STEPS * STEP_UM + _HALO_UM
    near = np.sort(matches.tree.query_ball_point(block.middle_um, reach, p=np.inf)).astype(int)
    if not len(near):
        return np.zeros((len(nodes), 2)), trend + _AMPLITUDE_UM[-1] ** 2
    if len(near) > max_matches:
        near = near[np.linspace(0, len(near) - 1, max_matches).astype(int)]
    at, shift = matches.at_um[near] - block.middle_um, matches.shift_um[near]
    noise = matches.noise_um[near]
    apart_um, line = cdist(at, at), _line(at, at)
    amplitude_um, length_um = _likeliest(apart_um, line, shift, noise)
    kernel = amplitude_um**2 * _matern(apart_um, length_um) + line
    factor, solved, _ = _robust(kernel, shift, noise)
    cross = amplitude_um**2 * _matern(cdist(nodes, at), length_um) + _line(nodes, at)
    explained = linalg.solve_triangular(factor, cross.T, lower=True)
    variance = np.maximum(trend + amplitude_um**2 - (explained**2).sum(axis=0), 0)
    return cross @ solved, variance


def _likeliest(apart_um: F64, line: F64, shift: Points, noise_um: F64) -> tuple[float, float]:
    """Amplitude and length by the marginal likelihood of some of the matches."""
    few = slice(None, None, -(-len(shift) // _LIKELIHOOD_MATCHES))
    apart_um, line, shift, noise_um = apart_um[few, few], line[few, few], shift[few], noise_um[few]
    # Outliers that count in full would call for shorter lengths.
    first = _FIRST[0] ** 2 * _matern(apart_um, _FIRST[1]) + line
    *_, weights = _robust(first, shift, noise_um)
    usual = noise_um / np.sqrt(weights)
    likelihood = {
        (amplitude, length): _log_likelihood(amplitude**2 * smooth + line, shift, usual)
        for length, smooth in ((ell, _matern(apart_um, ell)) for ell in _LENGTH_UM)
        for amplitude in _AMPLITUDE_UM
    }
    return max(likelihood, key=lambda size: likelihood[size])


def _matern(apart_um: F64, length_um: float) -> F64:
    """Covariance by distance, 1 at none: Matérn 5/2."""
    r = np.sqrt(5) / length_um * apart_um
    return np.asarray((1 + r + r**2 / 3) * np.exp(-r))


def _line(a: Points, b: Points) -> F64:
    """Covariance of the linear trend of a block."""
    return np.asarray(_TREND_UM**2 * (1 + a @ b.T / _TREND_REACH_UM**2))


def _robust(kernel: F64, shift: Points, noise_um: F64) -> tuple[F64, Points, F64]:
    """Cholesky factor, weighed shifts and weights, after rounds of weighing outliers down."""
    weights = np.ones(len(shift))
    for _ in range(_ROUNDS):
        # Unlike SciPy's it lets the other threads run.
        factor = np.asarray(np.linalg.cholesky(kernel + np.diag(noise_um**2 / weights)))
        solved = linalg.cho_solve((factor, True), shift)
        off = np.hypot(*(shift - kernel @ solved).T) / (np.sqrt(2) * _TUKEY * noise_um)
        weights = np.clip(1 - off**2, 0, None) ** 2 + _LEAST_WEIGHT
    return factor, solved, weights


def _log_likelihood(kernel: F64, shift: Points, noise_um: F64) -> float:
    """Log marginal likelihood of both axes, but for a constant."""
    factor = np.linalg.cholesky(kernel + np.diag(noise_um**2))
    solved = linalg.cho_solve((factor, True), shift)
    return float(-0.5 * (shift * solved).sum() - 2 * np.log(np.diag(factor)).sum())
