"""The grid that patches are cut from: where its pixels lie, and what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairing.patch_grid import PatchGrid, rows_of_grid
from pairing.slide import Slide
from pairing.slide_sources import ArrayLevel
from shards.schema import PatchSpec

MPP = 0.25
WIDTH, HEIGHT = 1500, 1300


def slide_of(image: Any) -> Slide:
    return Slide(Path("made up"), MPP, [ArrayLevel(image)], fill=0)


def cut(image: Any, centres_px: Any, step: float, size_px: int = 96) -> tuple[Any, Any, PatchGrid]:
    """Patches in the order of the centres, their corners, and the grid."""
    fov_um = step * MPP * size_px
    spec = PatchSpec(image="he", fov_um=fov_um, size_px=size_px, center="cell", jpeg_quality=95)
    slide = slide_of(image)
    grid = PatchGrid.of(slide, spec)
    corners = grid.corners(centres_px)
    every = {(x, y) for x in range(3) for y in range(3)}
    once, tiles = slide.decoding_once(every, np.zeros(3, np.uint8))
    rgb = {}
    for rows in rows_of_grid(once.tolerant()[0], tiles, grid, corners, None):
        rgb |= dict(zip(rows.numbers, rows.patches(size_px), strict=True))
    return np.stack([rgb[i] for i in range(len(centres_px))]), corners, grid


@given(st.floats(0, 1e5), st.floats(0, 1e5), st.floats(0.2, 5), st.sampled_from([1, 64, 95, 224]))
def test_the_middle_of_a_patch_is_its_cell_to_half_a_pixel(
    x: float, y: float, step: float, size_px: int
) -> None:
    grid = PatchGrid(step, size_px)
    centre = np.array([[x, y]])
    middle = (grid.corners(centre) + size_px / 2) * step
    assert (np.abs(middle - centre) <= step / 2 + 1e-9).all()


@pytest.fixture(scope="module")
def ramps() -> Any:
    """A slide that tells by its colours where it is: x / 8 in red, y / 8 in green."""
    image = np.full((HEIGHT, WIDTH, 3), 99, np.uint8)
    image[..., 0] = (np.arange(WIDTH) + 0.5) / 8 + 20
    image[..., 1] = ((np.arange(HEIGHT) + 0.5) / 8 + 20)[:, None]
    return image


@pytest.mark.parametrize("step", [0.5, 0.913, 1.0, 1.088, 1.7, 3.1])
def test_patches_show_what_lies_around_their_cells(ramps: Any, step: float) -> None:
    rng = np.random.default_rng(int(step * 1000))
    half = 48 * step + 20
    centres_px = rng.uniform(half, (WIDTH - half, HEIGHT - half), (40, 2))
    patches, _, _ = cut(ramps, centres_px, step)
    middle = patches[:, 47:49, 47:49].mean(axis=(1, 2))
    # Half a pixel of the patch, and the grey level that eight pixels of the slide share.
    error_px = np.abs((middle[:, :2] - 20) * 8 - centres_px)
    assert error_px.max() <= step / 2 + 8
    assert np.abs(((middle[:, :2] - 20) * 8 - centres_px).mean(axis=0) + 4).max() < 2.5
    assert (patches[..., 2] == 99).all()


@pytest.mark.parametrize("step", [0.7, 0.913, 1.088, 2.3])
def test_a_spot_is_where_its_cell_is(step: float) -> None:
    centre = np.array([612.3, 587.8])
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    spot = 200 * np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * 6**2))
    image = np.repeat((20 + spot).astype(np.uint8)[..., None], 3, axis=2)
    patches, corners, grid = cut(image, centre[None], step)
    light = patches[0, ..., 0].astype(float) - 20
    at = [(np.arange(96) + 0.5) @ light.sum(axis=axis) / light.sum() for axis in (0, 1)]
    np.testing.assert_allclose((corners[0] + at) * grid.step, centre, atol=0.1)
    assert np.abs(np.array(at) - 48).max() <= 0.6


def test_pixels_of_the_slides_own_size_are_the_slides(ramps: Any) -> None:
    centres_px = np.array([[100.0, 100.0], [700.4, 650.6], [5.0, 1290.0]])
    patches, corners, _ = cut(ramps, centres_px, 1.0)
    around = np.pad(ramps, ((96, 96), (96, 96), (0, 0)))
    for patch, (x, y) in zip(patches, corners, strict=True):
        np.testing.assert_array_equal(patch, around[y + 96 : y + 192, x + 96 : x + 192])


def test_tiles_of_the_grid_leave_no_seam() -> None:
    rng = np.random.default_rng(7)
    image = rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    centres_px = rng.uniform(100, (WIDTH - 100, HEIGHT - 100), (30, 2))
    patches, corners, grid = cut(image, centres_px, 1.3)
    slide = slide_of(image)
    for patch, (x, y) in zip(patches, corners.tolist(), strict=True):
        whole = slide.read_at((x, y, x + 96, y + 96), MPP * grid.step).astype(int)
        assert np.abs(whole - patch).max() <= 2
