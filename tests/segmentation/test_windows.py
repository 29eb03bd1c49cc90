"""The grid of windows: it covers, it blends, and what is stored comes back."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pairing.slide import open_slide
from segmentation.stain import (
    Normalisation,
    haematoxylin,
    optical_density,
    percentile_scale,
    percentiles_of,
)
from segmentation.windows import (
    N_CHANNELS,
    Output,
    Rgb,
    SlideSource,
    WindowGrid,
    blended,
    plan_windows,
    read_field,
    read_group_facts,
    run_groups,
)
from shards.errors import BadInput

GLASS = Normalisation(kind="optical_density")

grids = st.builds(
    lambda width, height, stride, half: WindowGrid.over(
        (width, height), 0.5, stride + 2 * half, 2 * half
    ),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(20, 120),
    st.integers(0, 10),
)


@given(grids, st.integers(-30, 300), st.integers(-30, 300), st.integers(1, 200))
def test_windows_that_touch_a_box_are_those_that_do(
    grid: WindowGrid, x: int, y: int, n: int
) -> None:
    box = (x, y, x + n, y + n // 2 + 1)
    expected = []
    for row, column in product(*(range(k) for k in grid.shown.shape)):
        wx0, wy0, wx1, wy1 = grid.box(row, column)
        if wx0 < box[2] and box[0] < wx1 and wy0 < box[3] and box[1] < wy1:
            expected.append((row, column))
    assert grid.touching(box) == expected


@given(grids)
def test_every_pixel_of_the_slide_lies_in_a_window_and_every_window_in_one_group(
    grid: WindowGrid,
) -> None:
    width, height = grid.size_px
    seen = np.zeros((height, width), bool)
    for window in np.argwhere(grid.shown).tolist():
        x0, y0, x1, y1 = grid.box(*window)
        seen[max(0, y0) : y1, max(0, x0) : x1] = True
    assert seen.all()
    groups = grid.groups()
    grouped = [window for group in groups for window in group.windows]
    assert sorted(grouped) == [tuple(w) for w in np.argwhere(grid.shown).tolist()]
    for window in grouped:
        near = set(grid.touching(grid.box(*window)))
        assert grid.groups_of(grid.box(*window)) == {g for g in groups if near & set(g.windows)}


@given(grids, st.integers(0, 200), st.integers(0, 200))
def test_blending_windows_that_agree_changes_nothing(grid: WindowGrid, dx: int, dy: int) -> None:
    """Each channel is a plane over the slide; any box reads the plane."""

    def plane(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.stack([x, y, x + y, x - y]).astype(np.float32)

    def output_of(window: tuple[int, int]) -> Output:
        x0, y0, x1, y1 = grid.box(*window)
        y, x = np.mgrid[y0:y1, x0:x1]
        return plane(x, y).astype(np.float16)

    width, height = grid.size_px
    box = (dx - 20, dy - 20, dx + 40, dy + 30)
    field = blended(grid, box, output_of)
    y, x = np.mgrid[box[1] : box[3], box[0] : box[2]]
    inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
    expected = plane(x, y)
    np.testing.assert_allclose(field.flow_2YX[:, inside], expected[:2, inside] / 5, atol=1e-4)
    np.testing.assert_allclose(field.logit_YX[inside], expected[2, inside], atol=1e-3)
    np.testing.assert_allclose(field.haematoxylin_YX[inside], expected[3, inside], atol=1e-3)
    assert (field.logit_YX[~inside] < -100).all()


def test_any_box_reads_the_same_bits() -> None:
    grid = WindowGrid.over((150, 130), 0.5, 64, 16)
    rng = np.random.default_rng(1)
    outputs = {
        tuple(w): rng.standard_normal((N_CHANNELS, 64, 64)).astype(np.float16)
        for w in np.argwhere(grid.shown).tolist()
    }
    whole = blended(grid, (-20, -20, 180, 160), lambda w: outputs[w])
    for x0, y0 in ((-20, -20), (7, 11), (90, 60)):
        part = blended(grid, (x0, y0, x0 + 61, y0 + 47), lambda w: outputs[w])
        cut = np.s_[y0 + 20 : y0 + 67, x0 + 20 : x0 + 81]
        assert np.array_equal(part.flow_2YX, whole.flow_2YX[:, *cut])
        assert np.array_equal(part.logit_YX, whole.logit_YX[cut])


def test_only_windows_with_tissue_are_run_and_glass_is_empty() -> None:
    grid = WindowGrid.over((1000, 600), 0.5, 128, 32)
    tissue = np.zeros((38, 63), bool)
    tissue[20, 50] = True  # 8 µm: pixels 800 … 816, 320 … 336 of the grid
    planned = plan_windows(grid, tissue, 8.0)
    shown = [grid.box(*w) for w in np.argwhere(planned.shown).tolist()]
    expected = [
        grid.box(r, c)
        for r, c in product(*(range(k) for k in grid.shown.shape))
        if grid.box(r, c)[0] < 816 and grid.box(r, c)[2] > 800
        and grid.box(r, c)[1] < 336 and grid.box(r, c)[3] > 320
    ]  # fmt: skip
    assert shown == expected
    ones = np.ones((N_CHANNELS, 128, 128), np.float16)
    field = blended(planned, (0, 0, 1000, 600), lambda w: ones)
    assert field.logit_YX[328, 808] == 1
    assert field.logit_YX[50, 50] < -100
    inside = np.zeros((600, 1000), bool)
    for x0, y0, x1, y1 in shown:
        inside[y0:y1, x0:x1] = True
    np.testing.assert_array_equal(field.logit_YX > 0, inside)


class Echo:
    """A network that gives back what it sees."""

    device = "cpu float32"

    def predict(self, rgb_BYXC: Rgb, normalisation: Normalisation) -> Output:
        return normalisation(rgb_BYXC).transpose(0, 3, 1, 2).astype(np.float16)


def test_what_is_stored_is_what_the_network_said_of_the_slide(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rgb = rng.integers(100, 255, (150, 210, 3), dtype=np.uint8)
    slide = tmp_path / "he.png"
    Image.fromarray(rgb).save(slide)
    grid = WindowGrid.over((210, 150), 0.5, 64, 16)
    kept = tmp_path / "kept"
    kept.mkdir()
    source = SlideSource(slide, 0.5)
    groups = grid.groups()
    assert read_group_facts(kept, groups[0]) is None
    done = run_groups(
        groups, kept=kept, source=source, grid=grid, normalisation=GLASS, network=Echo()
    )
    assert [group for group, _ in done] == groups
    assert all(read_group_facts(kept, group) == facts for group, facts in done)
    field = read_field(kept, grid, (0, 0, 210, 150))
    density = optical_density(rgb)
    np.testing.assert_allclose(field.flow_2YX[0] * 5, density[..., 0], atol=1e-3)
    np.testing.assert_allclose(field.logit_YX, density[..., 2], atol=1e-3)
    with open_slide(slide, mpp=0.5) as opened:
        amount = haematoxylin(rgb, opened.background)
    np.testing.assert_allclose(field.haematoxylin_YX, amount, atol=2e-3)


def test_density_of_white_is_zero_and_of_a_tenth_is_one() -> None:
    rgb = np.array([[[255, 26, 0]]], np.uint8)
    density = optical_density(rgb)[0, 0]
    assert density == pytest.approx([0.0, np.log10(255 / 26), np.log10(255)], abs=1e-6)


def test_haematoxylin_is_told_from_eosin_and_glass() -> None:
    glass = np.array([240, 238, 242], np.uint8)
    vectors = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    colours = glass * 10.0 ** -np.stack([0.0 * vectors[0], 0.5 * vectors[0], 0.5 * vectors[1]])
    amount = haematoxylin(np.rint(colours)[None].astype(np.uint8), glass)
    assert amount[0] == pytest.approx([0.0, 0.5, 0.0], abs=0.02)


def test_percentiles_become_zero_and_one() -> None:
    rgb = np.stack([np.arange(101), 2 * np.arange(101), 100 + np.arange(101)], -1).astype(np.uint8)
    scale = percentiles_of(rgb, "a picture")
    assert scale.low == pytest.approx((1, 2, 101))
    assert scale.high == pytest.approx((99, 198, 199))
    assert scale(rgb[[1, 99, 50]]) == pytest.approx(np.array([[0] * 3, [1] * 3, [0.5] * 3]))
    with pytest.raises(BadInput, match="more than one colour"):
        percentiles_of(np.full((10, 3), 7, np.uint8), "a picture")


def test_the_scale_of_a_slide_is_that_of_its_tissue(tmp_path: Path) -> None:
    """Half glass, half of two colours: the glass is in no percentile."""
    rgb = np.full((800, 1600, 3), 245, np.uint8)
    rgb[:, 800:] = (180, 120, 170)
    rgb[:400, 800:] = (90, 60, 140)
    path = tmp_path / "he.png"
    Image.fromarray(rgb).save(path)
    tissue = np.zeros((50, 100), bool)
    tissue[:, 52:] = True
    with open_slide(path, mpp=0.5) as slide:
        scale = percentile_scale(slide, tissue, 8.0)
    assert scale.low == pytest.approx((90, 60, 140), abs=1)
    assert scale.high == pytest.approx((180, 120, 170), abs=1)
