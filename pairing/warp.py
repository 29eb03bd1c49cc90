"""An affine and a smooth field on top of it: what lies between two pictures of one section."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import map_coordinates, spline_filter

from pairing.geometry import Affine, Points
from shards.artifact import written_aside

_NEWTON_ROUNDS = 30
_CLOSE = 1e-6  # of a src unit


@dataclass(frozen=True)
class Warp:
    """`dst_from_src`: the affine, plus displacements in dst units at nodes of a grid in src.

    `shift` is (rows, columns, 2) at nodes `step` apart from `origin`, in src units; None: the
    affine alone. Between nodes a cubic spline, beyond them as on the border.
    """

    affine: Affine
    origin: tuple[float, float] = (0.0, 0.0)
    step: float = 1.0
    shift: npt.NDArray[np.floating[Any]] | None = None

    @cached_property
    def _coefficients(self) -> list[npt.NDArray[np.float64]]:
        assert self.shift is not None
        return [
            np.asarray(spline_filter(np.float64(self.shift[..., k]), order=3, mode="nearest"))
            for k in (0, 1)
        ]

    def __call__(self, points: npt.ArrayLike) -> Points:
        src = np.asarray(points, dtype=np.float64)
        if self.shift is None:
            return self.affine(src)
        column, row = (src - self.origin).T / self.step
        # Beyond the nodes the spline would be that of a mirror.
        column = np.clip(column, 0, self.shift.shape[1] - 1)
        row = np.clip(row, 0, self.shift.shape[0] - 1)
        shift = [
            map_coordinates(c, [row, column], order=3, mode="nearest", prefilter=False)
            for c in self._coefficients
        ]
        moved: Points = self.affine(src) + np.stack(shift, axis=-1)
        return moved

    def inverse(self, points: npt.ArrayLike) -> Points:
        """Src points of dst points: the fixed point of src = affine⁻¹(dst - shift(src)).

        Raises ValueError where the field folds over, so that it has none.
        """
        dst = np.asarray(points, dtype=np.float64)
        back = self.affine.inverse
        src = back(dst)
        if self.shift is None:
            return src
        linear = back.array[:2, :2].T
        for _ in range(_NEWTON_ROUNDS):
            off = (dst - self(src)) @ linear
            src = src + off
            if not len(off) or np.abs(off).max() < _CLOSE:
                return src
        raise ValueError("the field has no inverse here: it folds over")


def write_warp(path: Path, warp: Warp) -> None:
    """Store a transform for tasks, which would else carry megabytes of its field each."""
    shift = np.zeros((0, 0, 2)) if warp.shift is None else warp.shift
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez(file, matrix=warp.affine.array, origin=warp.origin, step=warp.step, shift=shift)


def read_warp(path: Path) -> Warp:
    with np.load(path, allow_pickle=False) as stored:
        x, y = stored["origin"].tolist()
        shift = stored["shift"] if stored["shift"].size else None
        return Warp(Affine.of(stored["matrix"]), (x, y), float(stored["step"]), shift)
