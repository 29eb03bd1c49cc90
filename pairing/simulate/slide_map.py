"""How a section lies on its slide: turned, mirrored, stretched, torn, folded, robbed of a piece.

Forward, from tissue to slide, every point has one place: stretch, tear, fold, then the affine.
Backward, a place on the slide shows nothing (in a tear), one point of the tissue, or three (in a
fold).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from pairing.geometry import Affine, Points
from pairing.simulate.fields import SmoothField
from pairing.simulate.params import SlideParams

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

# The stretch varies over this many times its size, and at least over WARP_WAVELENGTH_UM, so that
# the tissue never folds over by it.
WARP_WAVELENGTH_UM = 700.0
_WARP_WAVELENGTHS = 25.0
# Bilinear between nodes this far apart: off by less than 0.02 µm at the largest stretch.
_GRID_UM = 4.0
# A tear closes along its length as a parabola, and its opening wears off into the tissue.
_TEAR_LENGTH = 12.0  # half length, of the opening
_TEAR_REACH = 6.0
_EDGE_UM = 12.0  # cells this near to a tear or a missing piece are told as torn


@dataclass(frozen=True, slots=True)
class Warp:
    """A smooth displacement: a point `s` of the stretched tissue, in µm, came from `s - e(s)`."""

    dx: SmoothField
    dy: SmoothField
    scale_x: float
    scale_y: float

    @classmethod
    def draw(
        cls, rng: np.random.Generator, size_um: tuple[float, float], largest_um: float
    ) -> Warp:
        """With the given largest displacement along either axis over the section."""
        wavelength = max(WARP_WAVELENGTH_UM, _WARP_WAVELENGTHS * largest_um)
        dx, dy = (SmoothField.draw(rng, wavelength) for _ in range(2))
        x, y = (np.arange(0, size, 20.0) for size in size_um)
        scales = [largest_um / float(np.abs(field.grid(x, y)).max()) for field in (dx, dy)]
        return cls(dx, dy, *scales)

    def at(self, points: Points) -> Points:
        return np.stack([self.scale_x * self.dx.at(points), self.scale_y * self.dy.at(points)], 1)

    def stretch(self, points: Points) -> Points:
        """Tissue to stretched tissue: the fixed point of s = p + e(s)."""
        moved = points
        for _ in range(12):
            moved = points + self.at(moved)
        return moved


@dataclass(frozen=True, slots=True)
class Line:
    """A line over the section: `a` runs along it and `b` across, from a point on it."""

    x_um: float
    y_um: float
    angle: float

    def local(self, x: npt.NDArray[np.floating], y: npt.NDArray[np.floating]) -> tuple[F64, F64]:
        c, s = np.cos(self.angle), np.sin(self.angle)
        dx, dy = x - self.x_um, y - self.y_um
        return dx * c + dy * s, dy * c - dx * s

    def shifted(
        self, x: npt.NDArray[np.floating], y: npt.NDArray[np.floating], across: F64
    ) -> tuple[F64, F64]:
        """The points moved by `across` along b."""
        return x - across * np.sin(self.angle), y + across * np.cos(self.angle)


@dataclass(frozen=True, slots=True)
class View:
    """Pixels that show the tissue: µm of their centres (Y, X), float32, and which of them do."""

    x_um: F32
    y_um: F32
    shown: Mask | None  # None: all


@dataclass(frozen=True, slots=True)
class SlideMap:
    """One section on one slide. µm are those of the section's own (Xenium) frame."""

    um_from_px: Affine  # without the deformations
    warp: Warp | None
    tear: Line | None
    tear_um: float
    fold: Line | None
    fold_um: float
    hole: tuple[float, float, float] | None  # centre and radius of the missing piece

    @classmethod
    def flat(cls, um_from_px: Affine) -> SlideMap:
        """Nothing but an affine."""
        return cls(um_from_px, None, None, 0.0, None, 0.0, None)

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        params: SlideParams,
        um_from_px: Affine,
        centres_um: Points,
        size_um: tuple[float, float],
    ) -> SlideMap:
        """Deformations as `params` ask for, each somewhere on the tissue."""

        def line() -> Line:
            x, y = centres_um[int(rng.integers(len(centres_um)))]
            return Line(float(x), float(y), float(rng.uniform(0, 2 * np.pi)))

        warp = Warp.draw(rng, size_um, params.warp_um) if params.warp_um else None
        tear = line() if params.tear_um else None
        fold = line() if params.fold_um else None
        hole = None
        if params.missing_um:
            x, y = centres_um[int(rng.integers(len(centres_um)))]
            hole = (float(x), float(y), params.missing_um / 2)
        return cls(um_from_px, warp, tear, params.tear_um, fold, params.fold_um, hole)

    @property
    def mpp(self) -> float:
        return float(np.sqrt(self.um_from_px.area_scale))

    @property
    def is_affine(self) -> bool:
        return self.warp is None and self.tear is None and self.fold is None

    def px_from_um(self, points_um: Points) -> Points:
        """Where points of the tissue lie on the slide, exactly, missing or not."""
        p = np.asarray(points_um, np.float64)
        if self.warp is not None:
            p = self.warp.stretch(p)
        if self.tear is not None:
            p = self._torn_apart(self.tear, p)
        if self.fold is not None:
            _, b = self.fold.local(p[:, 0], p[:, 1])
            w = self.fold_um
            back = np.select([b > 2 * w, b > w], [-2 * w, 2 * (w - b)], 0.0)
            p = np.stack(self.fold.shifted(p[:, 0], p[:, 1], back), axis=1)
        return self.um_from_px.inverse(p)

    def flags(self, points_um: Points) -> dict[str, Mask]:
        """`folded`, `torn` (beside a tear or the missing piece) and `missing` of tissue points."""
        p = np.asarray(points_um, np.float64)
        stretched = p if self.warp is None else self.warp.stretch(p)
        none = np.zeros(len(p), bool)
        folded, torn, missing = none, none, none
        if self.tear is not None:
            a, b = self.tear.local(stretched[:, 0], stretched[:, 1])
            torn = (np.abs(b) < _EDGE_UM) & (self._opening(a) > 0)
            stretched = self._torn_apart(self.tear, stretched)
        if self.fold is not None:
            _, b = self.fold.local(stretched[:, 0], stretched[:, 1])
            folded = (b > 0) & (b < 3 * self.fold_um)
        if self.hole is not None:
            outside = np.hypot(p[:, 0] - self.hole[0], p[:, 1] - self.hole[1]) - self.hole[2]
            missing = outside < 0
            torn = torn | ((outside >= 0) & (outside < _EDGE_UM))
        return {"folded": folded, "torn": torn, "missing": missing}

    def views(self, x0: int, y0: int, width: int, height: int) -> list[View]:
        """What of the tissue a box of slide pixels shows: one view, or three where it is folded."""
        m = self.um_from_px.array
        x = (np.arange(x0, x0 + width) + 0.5)[None, :]
        y = (np.arange(y0, y0 + height) + 0.5)[:, None]
        slide_x, slide_y = m[0, 0] * x + m[0, 1] * y + m[0, 2], m[1, 0] * x + m[1, 1] * y + m[1, 2]
        layers: list[tuple[F64, F64, Mask | None]] = [(slide_x, slide_y, None)]
        if self.fold is not None:
            _, b = self.fold.local(slide_x, slide_y)
            w = self.fold_um
            doubled = (b > 0) & (b < w)
            layers = [(*self.fold.shifted(slide_x, slide_y, np.where(b > w, 2 * w, 0.0)), None)]
            if doubled.any():
                for across in (2 * (w - b), np.full_like(b, 2 * w)):
                    layers.append((*self.fold.shifted(slide_x, slide_y, across), doubled))
        return [self._unwarped(*self._closed(*layer)) for layer in layers]

    def _torn_apart(self, tear: Line, points: Points) -> Points:
        """Stretched tissue to torn: what lies beyond the tear moves away from it."""
        x, y = points.T
        a, b = tear.local(x, y)
        opened = np.where(b > 0, self._opening(a) * np.exp(-b / self._tear_reach), 0.0)
        return np.stack(tear.shifted(x, y, opened), axis=1)

    def _closed(self, x: F64, y: F64, shown: Mask | None) -> tuple[F64, F64, Mask | None]:
        """Before the tear."""
        if self.tear is None:
            return x, y, shown
        a, b = self.tear.local(x, y)
        opening = self._opening(a)
        if not (opening > 0).any() or b.max() < 0 or b.min() > 12 * self._tear_reach:
            return x, y, shown
        # Newton for t + opening · exp(-t / reach) = b.
        t = np.maximum(b - opening, 0)
        for _ in range(6):
            worn = opening * np.exp(-t / self._tear_reach)
            t = np.maximum(t - (t + worn - b) / (1 - worn / self._tear_reach), 0)
        gap = (b > 0) & (b < opening)
        closed = self.tear.shifted(x, y, np.where(b > 0, t - b, 0.0))
        return (*closed, ~gap if shown is None else shown & ~gap)

    def _unwarped(self, x: F64, y: F64, shown: Mask | None) -> View:
        if self.warp is not None:
            low_x, low_y = x.min() - _GRID_UM, y.min() - _GRID_UM
            grid_x = np.arange(low_x, x.max() + 2 * _GRID_UM, _GRID_UM)
            grid_y = np.arange(low_y, y.max() + 2 * _GRID_UM, _GRID_UM)
            at_x = ((x - low_x) / _GRID_UM).astype(np.float32)
            at_y = ((y - low_y) / _GRID_UM).astype(np.float32)
            field_x, field_y = self.warp.dx.grid(grid_x, grid_y), self.warp.dy.grid(grid_x, grid_y)
            x = x - self.warp.scale_x * cv2.remap(field_x, at_x, at_y, cv2.INTER_LINEAR)
            y = y - self.warp.scale_y * cv2.remap(field_y, at_x, at_y, cv2.INTER_LINEAR)
        if self.hole is not None:
            here = np.hypot(x - self.hole[0], y - self.hole[1]) > self.hole[2]
            shown = here if shown is None else shown & here
        return View(x.astype(np.float32), y.astype(np.float32), shown)

    @property
    def _tear_reach(self) -> float:
        return _TEAR_REACH * self.tear_um

    def _opening(self, a: F64) -> F64:
        return np.asarray(
            self.tear_um * np.clip(1 - (a / (_TEAR_LENGTH * self.tear_um)) ** 2, 0, None)
        )
