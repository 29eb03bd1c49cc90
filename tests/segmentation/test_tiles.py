"""Real labelled tiles: their pixel size by convention, their groups, their resampling."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.nuclei_groups import stain_groups
from benchmarks.nuclei_scores import matched, otsu_watershed
from segmentation.tiles import (
    LabelledTile,
    content_sha256,
    mpp_by_convention,
    read_tiles,
    resampled,
)
from segmentation.train_compact import stain_group_of_tile
from shards.errors import BadInput


def disc(radius_px: float, size_px: int = 64) -> np.ndarray:
    y, x = np.mgrid[:size_px, :size_px] + 0.5
    inside = np.hypot(x - size_px / 2, y - size_px / 2) < radius_px
    return inside.astype(np.int32)


def test_the_median_nucleus_is_8_um_wide() -> None:
    labels = np.concatenate([disc(6), 2 * disc(10), 3 * disc(25)])
    assert mpp_by_convention(labels) == pytest.approx(0.4, rel=0.02)


def test_resampling_keeps_lengths() -> None:
    rgb = np.full((64, 64, 3), 200, np.uint8)
    tile = LabelledTile("a", rgb, disc(10), 0.4)
    there = resampled(tile, 0.5)
    assert there.rgb.shape == (51, 51, 3)
    assert mpp_by_convention(there.labels) == pytest.approx(0.5, rel=0.03)


def test_groups_are_those_that_were_committed(shared_data: Path) -> None:
    tiles = read_tiles(shared_data / "nuclei")
    assert stain_groups(tiles) == stain_group_of_tile()
    sizes = collections.Counter(stain_group_of_tile().values())
    assert sizes == {0: 26, 1: 20, 2: 11, 3: 2}


def test_tiles_are_hashed_by_content(tmp_path: Path) -> None:
    tile = LabelledTile("a", np.full((64, 64, 3), 200, np.uint8), disc(10), 0.4)
    moved = LabelledTile("a", tile.rgb.copy(), tile.labels.copy(), 0.4)
    other = LabelledTile("a", tile.rgb, np.roll(tile.labels, 1), 0.4)
    assert content_sha256([tile]) == content_sha256([moved]) != content_sha256([other])


def test_a_folder_without_tiles_or_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"_he\.png"):
        read_tiles(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a_he.png")
    with pytest.raises(BadInput, match=r"a_labels\.png"):
        read_tiles(tmp_path)


def test_matching_is_one_to_one() -> None:
    truth = np.zeros((20, 40), np.int32)
    truth[5:15, 5:15], truth[5:15, 20:30] = 1, 2
    halves = truth.copy()
    halves[5:10, 5:15] = 3  # each half has IoU 0.5 with the first nucleus
    counts = matched(truth, halves)
    assert (counts.true, counts.false, counts.missed) == (2, 1, 0)
    assert (counts.f1, counts.ap) == (0.8, 2 / 3)
    strict = matched(truth, halves, 0.75)
    assert (strict.true, strict.false, strict.missed) == (1, 2, 1)
    nothing = matched(truth, np.zeros_like(truth))
    assert (nothing.true, nothing.false, nothing.missed) == (0, 0, 2)


def test_the_baseline_parts_two_touching_nuclei() -> None:
    y, x = np.mgrid[:64, :64] + 0.5
    left, right = np.hypot(x - 22, y - 32) < 10, np.hypot(x - 40, y - 32) < 10
    rgb = np.full((64, 64, 3), 235, np.uint8)
    rgb[left | right] = (90, 60, 140)
    found = otsu_watershed(rgb, 0.5)
    truth = np.where(left, 1, np.where(right, 2, 0)).astype(np.int32)
    assert matched(truth, found).true == 2
