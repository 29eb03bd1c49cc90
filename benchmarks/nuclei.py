"""F1 of the compact network on real tiles of stains it never saw, beside Otsu + watershed.

`python -m benchmarks.nuclei --data DIR --folds DIR` trains what is missing of the four fold
networks (about ten CPU minutes each), scores each on the stain group it was trained without,
prints one table and, with `--record`, writes the scores into the metadata of the shipped weights.
"""
# mypy: disable-error-code=no-untyped-call
# scikit-image has no types.

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cellpose.metrics import average_precision
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import gaussian, threshold_otsu
from skimage.measure import label
from skimage.morphology import remove_small_objects
from skimage.segmentation import watershed

from segmentation.config import COMPACT_PATH
from segmentation.network import load_model, read_metadata
from segmentation.nuclei import MIN_NUCLEUS_UM2
from segmentation.stain import optical_density
from segmentation.tiles import LabelledTile, Labels, content_sha256, read_tiles, resampled
from segmentation.train_compact import MPP, stain_group_of_tile, train_and_save
from shards.errors import BadInput

IOU = 0.5
SEED = 0
Rgb = npt.NDArray[np.uint8]


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


def matched(truth: Labels, found: Labels) -> Counts:
    """One-to-one matches at IoU >= 0.5 (Cellpose's own metric: an optimal assignment)."""
    if found.max() == 0 or truth.max() == 0:
        return Counts(0, len(np.unique(found)) - 1, len(np.unique(truth)) - 1)
    _, true, false, missed = average_precision([truth], [found], threshold=[IOU])
    return Counts(int(true[0, 0]), int(false[0, 0]), int(missed[0, 0]))


def scored(tiles: list[LabelledTile], find: Callable[[Rgb], Labels]) -> Counts:
    return sum((matched(tile.labels, find(tile.rgb)) for tile in tiles), Counts())


def fold_weights(data: Path, folds: Path, group: int) -> Path:
    """Weights trained without a group, made where they are missing.

    Raises BadInput where a file is there that was trained on other tiles.
    """
    path = folds / f"fold-{group}.pt"
    if not path.is_file():
        train_and_save(data, path, SEED, group)
    metadata = read_metadata(path)
    groups = stain_group_of_tile()
    kept = [tile for tile in read_tiles(data) if groups[tile.tile_id] != group]
    if metadata.left_out_group != group or metadata.real_tiles_sha256 != content_sha256(kept):
        raise BadInput(
            path,
            expected=f"weights trained on the tiles of {data} without group {group}",
            found=metadata.command,
            remedy="remove it, to train it again",
        )
    return path


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    n_tiles: int
    n_nuclei: int
    compact: Counts
    otsu: Counts

    def __add__(self, other: Row) -> Row:
        return Row(
            self.n_tiles + other.n_tiles,
            self.n_nuclei + other.n_nuclei,
            self.compact + other.compact,
            self.otsu + other.otsu,
        )

    def __str__(self) -> str:
        ours, theirs = self.compact.f1, self.otsu.f1
        return (
            f"{self.n_tiles} | {self.n_nuclei} | {ours:.3f} | {theirs:.3f} | {ours - theirs:+.3f}"
        )


def scored_group(tiles: list[LabelledTile], weights: Path) -> Row:
    """Both methods on tiles at the network's pixel size."""
    network = load_model(str(weights), "cpu")
    return Row(
        len(tiles),
        sum(tile.n_nuclei for tile in tiles),
        scored(tiles, lambda rgb: network.find(rgb)[0]),
        scored(tiles, lambda rgb: otsu_watershed(rgb, network.mpp)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled tiles")
    parser.add_argument("--folds", type=Path, required=True, help="folder of fold networks")
    parser.add_argument(
        "--record", action="store_true", help="write the scores into the shipped weights' metadata"
    )
    given = parser.parse_args()
    group_of_tile = stain_group_of_tile()
    tiles = [resampled(tile, MPP) for tile in read_tiles(given.data)]
    rows: dict[str, Row] = {}
    for group in sorted(set(group_of_tile.values())):
        chosen = [tile for tile in tiles if group_of_tile[tile.tile_id] == group]
        rows[str(group)] = scored_group(chosen, fold_weights(given.data, given.folds, group))
    rows["all"] = sum(rows.values(), Row(0, 0, Counts(), Counts()))
    print("| stain group | tiles | nuclei | compact, out of fold | Otsu + watershed | difference |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row} |")
    if given.record:
        scores = {name: round(row.compact.f1, 4) for name, row in rows.items()}
        shipped = read_metadata(COMPACT_PATH).model_copy(update={"scores": scores})
        COMPACT_PATH.with_suffix(".json").write_text(shipped.model_dump_json(indent=1) + "\n")


if __name__ == "__main__":
    main()
