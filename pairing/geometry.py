"""Frames and the affines between them.

Positions are continuous: pixel i covers [i, i + 1) and its centre is i + 0.5, in every pixel frame
(slide level 0, morphology). Points are `(n, 2)` float64 arrays of (x, y). A transform is named
`dst_from_src` and maps src points to dst points; transforms compose with `@`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
# `dst_from_src`: an affine, or what only maps points.
Transform = Callable[[npt.ArrayLike], Points]
Box = tuple[int, int, int, int]
Row = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Affine:
    """A 3 x 3 affine on (x, y, 1) columns; the last row is (0, 0, 1)."""

    matrix: tuple[Row, Row, Row]

    @classmethod
    def of(cls, matrix: npt.ArrayLike) -> Affine:
        """From a (3, 3) array. Raises ValueError where it is not a finite, invertible affine."""
        m = np.asarray(matrix, dtype=np.float64)
        if m.shape != (3, 3) or not np.isfinite(m).all():
            raise ValueError(f"an affine is 3 x 3 finite numbers, not {m.shape}: {m.tolist()}")
        if not np.allclose(m[2], (0.0, 0.0, 1.0), rtol=0, atol=1e-9):
            raise ValueError(f"the last row of an affine is 0, 0, 1, not {m[2].tolist()}")
        if abs(np.linalg.det(m[:2, :2])) < 1e-12:
            raise ValueError(f"the affine is singular: {m.tolist()}")
        rows = [tuple(float(v) for v in row) for row in m]
        return cls((rows[0], rows[1], rows[2]))  # type: ignore[arg-type]  # rows are triples

    @classmethod
    def scale(cls, factor: float) -> Affine:
        return cls.of(np.diag([factor, factor, 1.0]))

    @classmethod
    def similarity(
        cls, scale: float, angle_rad: float, shift: tuple[float, float], *, mirror: bool = False
    ) -> Affine:
        """Mirror x (optional), turn by `angle_rad`, scale, then shift."""
        c, s = scale * np.cos(angle_rad), scale * np.sin(angle_rad)
        f = -1.0 if mirror else 1.0
        return cls.of([[c * f, -s, shift[0]], [s * f, c, shift[1]], [0, 0, 1]])

    @property
    def array(self) -> npt.NDArray[np.float64]:
        return np.array(self.matrix, dtype=np.float64)

    @property
    def inverse(self) -> Affine:
        return Affine.of(np.linalg.inv(self.array))

    @property
    def area_scale(self) -> float:
        """|det| of the linear part: dst area per src area."""
        return float(abs(np.linalg.det(self.array[:2, :2])))

    def __matmul__(self, other: Affine) -> Affine:
        return Affine.of(self.array @ other.array)

    def __call__(self, points: npt.ArrayLike) -> Points:
        p = np.asarray(points, dtype=np.float64)
        m = self.array
        result: Points = p @ m[:2, :2].T + m[:2, 2]
        return result
