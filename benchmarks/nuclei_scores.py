"""Found nuclei against true ones, and the classical method beside the network."""
# mypy: disable-error-code=no-untyped-call
# scikit-image has no types.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from cellpose.metrics import average_precision
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import gaussian, threshold_otsu
from skimage.measure import label
from skimage.morphology import remove_small_objects
from skimage.segmentation import watershed

from segmentation.nuclei import MIN_NUCLEUS_UM2
from segmentation.stain import optical_density
from segmentation.tiles import LabelledTile, Labels, Rgb

IOU = 0.5
STRICT_IOU = 0.75


@dataclass(frozen=True, slots=True)
class Counts:
    """Matched, found in vain and missed, pooled over tiles."""

    true: int = 0
    false: int = 0
    missed: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.true + other.true, self.false + other.false, self.missed + other.missed)

    @property
    def f1(self) -> float:
        return 2 * self.true / (2 * self.true + self.false + self.missed)

    @property
    def ap(self) -> float:
        """What Cellpose calls average precision at one IoU."""
        return self.true / (self.true + self.false + self.missed)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: the network at two IoUs, and Otsu + watershed at the first."""

    n_tiles: int = 0
    n_nuclei: int = 0
    compact: Counts = Counts()
    strict: Counts = Counts()
    otsu: Counts = Counts()

    def __add__(self, other: Row) -> Row:
        return Row(
            self.n_tiles + other.n_tiles,
            self.n_nuclei + other.n_nuclei,
            self.compact + other.compact,
            self.strict + other.strict,
            self.otsu + other.otsu,
        )

    def __str__(self) -> str:
        ours, theirs = self.compact.f1, self.otsu.f1
        return (
            f"{self.n_tiles} | {self.n_nuclei} | {ours:.3f} | {self.compact.ap:.3f} | "
            f"{self.strict.ap:.3f} | {theirs:.3f} | {ours - theirs:+.3f}"
        )


def matched(truth: Labels, found: Labels, iou: float = IOU) -> Counts:
    """One-to-one matches at an IoU or above (Cellpose's own metric: an optimal assignment)."""
    if found.max() == 0 or truth.max() == 0:
        return Counts(0, len(np.unique(found)) - 1, len(np.unique(truth)) - 1)
    _, true, false, missed = average_precision([truth], [found], threshold=[iou])
    return Counts(int(true[0, 0]), int(false[0, 0]), int(missed[0, 0]))


def scored(tile: LabelledTile, find: Callable[[Rgb], Labels]) -> Row:
    """A network and Otsu + watershed on a tile at the network's pixel size."""
    found = find(tile.rgb)
    return Row(
        1,
        tile.n_nuclei,
        matched(tile.labels, found),
        matched(tile.labels, found, STRICT_IOU),
        matched(tile.labels, otsu_watershed(tile.rgb, tile.mpp)),
    )


def otsu_watershed(rgb: Rgb, mpp: float) -> Labels:
    """Nuclei as the classical method finds them: Otsu on the red optical density, then a watershed.

    Red light is absorbed by haematoxylin and hardly by eosin. Lengths are in µm, the smallest
    nucleus is the network's.
    """
    red = gaussian(optical_density(rgb)[..., 0], 0.5 / mpp)
    smallest_px = round(MIN_NUCLEUS_UM2 / mpp**2)
    inside = ndimage.binary_fill_holes(red > threshold_otsu(red))
    inside = remove_small_objects(inside, max_size=smallest_px - 1)
    depth = gaussian(ndimage.distance_transform_edt(inside), 0.5 / mpp)
    peaks = peak_local_max(depth, min_distance=round(2.0 / mpp), labels=label(inside))
    seeds = np.zeros(inside.shape, np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    found: Labels = watershed(-depth, seeds, mask=inside).astype(np.int32)
    return found


def labels_like(path: Path, rgb: Rgb) -> Labels:
    """A label image at the pixels of a picture, by the nearest."""
    labels = tifffile.imread(path)
    y, x = (
        ((np.arange(to) + 0.5) * of / to).astype(np.int64)
        for of, to in zip(labels.shape, rgb.shape[:2], strict=True)
    )
    return labels[np.ix_(y, x)].astype(np.int32)


def large_enough(labels: Labels, mpp: float) -> Labels:
    """Numbered from 1 again, without what is below the smallest nucleus: rims under others."""
    ids, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    keep = (ids > 0) & (counts * mpp**2 >= MIN_NUCLEUS_UM2)
    return np.asarray(np.where(keep, np.cumsum(keep), 0)[inverse], np.int32).reshape(labels.shape)
