"""Where on a slide a section lies, without a hint: density maps of nuclei, at every turn."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft
from scipy.ndimage import gaussian_filter, uniform_filter
from scipy.spatial import cKDTree

from pairing.geometry import Affine, Points

F32 = npt.NDArray[np.float32]

# Maps of 16 µm tell sections apart; larger sections are told at as many bins.
BIN_UM, _MAX_BINS = 16.0, 192
ANGLE_STEP_DEG = 3.0
_BLUR_BINS = 1.0
# The map counts as far beyond the cells as the instrument surely looked.
_BEYOND_UM = 60.0
_MAX_POINTS = 40_000
# Least share of a section that must lie on the slide.
_MIN_OVERLAP = 0.3
# Pieces of what is left of a section have little but the single nuclei to tell them by: finer
# maps of windows with this radius in bins, few enough that stretch does no harm.
_PIECE_BIN_UM, _MAX_PIECE_BINS, _PIECE_BINS = 5.0, 512, 28
_MAX_PIECES, _LEAST_PIECE = 4, 100
# Two candidates are one if they place the section within this of each other.
_SAME_TURN_DEG, _SAME_SHIFT_UM = 12.0, 200.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A rough place of the section: turned, mirrored, scaled, shifted; and how well it fits."""

    he_um_from_xenium_um: Affine
    correlation: float


def find_candidates(
    xenium_um: Points,
    he_um: Points,
    slide_um: tuple[float, float],
    scale: float,
    n: int,
    bin_um: float = BIN_UM,
    beyond_um: float = _BEYOND_UM,
) -> list[Candidate]:
    """The `n` best distinct places, best first, by correlation of the density of nuclei.

    `xenium_um` and `he_um` are (n, 2) nuclei in the Xenium frame and on the slide, `slide_um` its
    width and height; `scale` is µm of the slide per µm of Xenium. Masked normalised correlation
    (Padfield, IEEE TIP 2012;21:2706) at every 3 degrees, mirrored or not. Beside nuclei the
    instrument saw that there are none, up to `beyond_um`.
    """
    points = xenium_um[:: -(-len(xenium_um) // _MAX_POINTS)] * scale
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    reach = float(np.hypot(*(points - middle).T).max()) + beyond_um
    bin_um = max(bin_um, 2 * reach / _MAX_BINS)
    side = int(np.ceil(2 * reach / bin_um)) | 1
    shape = tuple(int(np.ceil(v / bin_um)) for v in slide_um[::-1])
    slide_map = _density(he_um, shape, bin_um)
    size = [fft.next_fast_len(n + side, real=True) for n in shape]
    correlator = _Correlator.of(slide_map, size)

    found: list[_Peak] = []
    for mirror in (False, True):
        for angle_deg in np.arange(0, 360, ANGLE_STEP_DEG).tolist():
            turn = Affine.similarity(1.0, np.deg2rad(angle_deg), (0.0, 0.0), mirror=mirror)
            section = _density(turn(points - middle) + side * bin_um / 2, (side, side), bin_um)
            scores = correlator.scores(section, _looked_at(section, beyond_um / bin_um))
            found += [
                _Peak(score, angle_deg, mirror, x * bin_um, y * bin_um)
                for score, y, x in _peaks(scores, shape, side, _SAME_SHIFT_UM / bin_um)
            ]
    found.sort(key=lambda peak: -peak.score)
    chosen: list[_Peak] = []
    for peak in found:
        if len(chosen) < n and not any(peak.is_near(other) for other in chosen):
            chosen.append(peak)
    candidates = []
    for peak in chosen:
        angle_rad = float(np.deg2rad(peak.angle_deg))
        turn = Affine.similarity(scale, angle_rad, (0.0, 0.0), mirror=peak.mirror)
        shift = np.array([peak.x_um, peak.y_um]) + side * bin_um / 2 - turn(middle / scale)
        whole = turn.array
        whole[:2, 2] = shift
        candidates.append(Candidate(Affine.of(whole), peak.score))
    return candidates


def find_pieces(xenium_um: Points, he_um: Points, n: int) -> list[Candidate]:
    """The `n` best places in the section of each of some round windows of the slide.

    The other way round than `find_candidates`: where most of a section is lost, what is left lies
    somewhere in the section, but the section as a whole nowhere on the slide.
    """
    low = xenium_um.min(axis=0)
    width_um, height_um = (xenium_um.max(axis=0) - low).tolist()
    bin_um = max(_PIECE_BIN_UM, max(width_um, height_um) / _MAX_PIECE_BINS)
    corner = Affine.similarity(1.0, 0.0, (float(low[0]), float(low[1])))
    return [
        Candidate((corner @ place.he_um_from_xenium_um).inverse, place.correlation)
        for window_um in _windows(he_um, _PIECE_BINS * bin_um)
        for place in find_candidates(
            window_um, xenium_um - low, (width_um, height_um), 1.0, n, bin_um, bin_um
        )
    ]


def _windows(he_um: Points, radius_um: float) -> Iterator[Points]:
    """Nuclei of windows in the thick of the tissue, those with most nuclei first."""
    tree = cKDTree(he_um)
    n_around = tree.query_ball_point(he_um, radius_um, return_length=True)
    free = np.ones(len(he_um), bool)
    for _ in range(_MAX_PIECES):
        middle = int(np.where(free, n_around, 0).argmax())
        if not free[middle] or n_around[middle] < _LEAST_PIECE:
            break
        inside = tree.query_ball_point(he_um[middle], radius_um)
        yield he_um[inside]
        free[inside] = False


@dataclass(frozen=True, slots=True)
class _Peak:
    """A section turned about its middle, and where the corner of its map lies on the slide."""

    score: float
    angle_deg: float
    mirror: bool
    x_um: float
    y_um: float

    def is_near(self, other: _Peak) -> bool:
        turn = abs((self.angle_deg - other.angle_deg + 180) % 360 - 180)
        shift = float(np.hypot(self.x_um - other.x_um, self.y_um - other.y_um))
        near = turn < _SAME_TURN_DEG and shift < _SAME_SHIFT_UM
        return near and self.mirror == other.mirror


@dataclass(frozen=True, slots=True)
class _Correlator:
    """A slide's map and its square, transformed once."""

    size: list[int]
    slide: npt.NDArray[np.complex64]
    square: npt.NDArray[np.complex64]

    @classmethod
    def of(cls, slide_map: F32, size: list[int]) -> _Correlator:
        return cls(size, _forward(slide_map, size), _forward(slide_map**2, size))

    def scores(self, section: F32, mask: F32) -> F32:
        """Correlation under the mask with the section's corner at each bin, wrapped around."""
        n = float(mask.sum())
        contrast = mask * (section - float((mask * section).sum()) / n)
        mask_t = np.conj(_forward(mask, self.size))
        cross, total, squares = (
            _back(a * b, self.size)
            for a, b in (
                (self.slide, np.conj(_forward(contrast, self.size))),
                (self.slide, mask_t),
                (self.square, mask_t),
            )
        )
        spread = np.sqrt(np.maximum(squares - total**2 / n, 0) * float((contrast**2).sum()))
        # Where the slide shows nothing under the mask, nothing correlates.
        return np.asarray(np.where(spread > 1e-3 * spread.max(), cross / (spread + 1e-12), 0))


def _forward(image: F32, size: list[int]) -> npt.NDArray[np.complex64]:
    return np.asarray(fft.rfft2(image, size, workers=os.cpu_count() or 1))


def _back(spectrum: npt.NDArray[np.complex64], size: list[int]) -> F32:
    return np.asarray(fft.irfft2(spectrum, size, workers=os.cpu_count() or 1))


def _density(points: Points, shape: tuple[int, ...], bin_um: float) -> F32:
    """(Y, X) nuclei per bin, blurred; what lies outside is left out."""
    x, y = np.floor(points / bin_um).astype(np.int64).T
    inside = (x >= 0) & (y >= 0) & (x < shape[1]) & (y < shape[0])
    counts = np.bincount(y[inside] * shape[1] + x[inside], minlength=shape[0] * shape[1])
    return np.asarray(gaussian_filter(counts.reshape(shape).astype(np.float32), _BLUR_BINS))


def _looked_at(section: F32, beyond_bins: float) -> F32:
    """1 where cells are or are near, 0 elsewhere."""
    side = 2 * round(beyond_bins) + 1
    return np.asarray(uniform_filter(section, side) > 1e-4 * section.max(), dtype=np.float32)


def _peaks(
    scores: F32, shape: tuple[int, ...], side: int, apart: float
) -> list[tuple[float, int, int]]:
    """The three best (score, y, x) of the section's corner, apart from each other."""
    # Corners from -side to the slide's far edge; negative ones are wrapped around. At least a
    # share of the section must lie on the slide.
    least = int(side * (1 - _MIN_OVERLAP))
    rows = np.r_[0 : shape[0] - side + least + 1, scores.shape[0] - least : scores.shape[0]]
    columns = np.r_[0 : shape[1] - side + least + 1, scores.shape[1] - least : scores.shape[1]]
    part = scores[np.ix_(rows, columns)]
    y_of = np.where(rows >= shape[0], rows - scores.shape[0], rows)
    x_of = np.where(columns >= shape[1], columns - scores.shape[1], columns)
    best: list[tuple[float, int, int]] = []
    for _ in range(3):
        i, j = np.unravel_index(int(part.argmax()), part.shape)
        best.append((float(part[i, j]), int(y_of[i]), int(x_of[j])))
        near = (np.abs(y_of - y_of[i]) < apart)[:, None] & (np.abs(x_of - x_of[j]) < apart)[None]
        part = np.where(near, -1, part)
    return best
