"""Pyramids of slides, levels that are none, and resampling from the level that fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from pairing.slide import open_slide
from tests.pairing.slides import MPP, halved, picture, pyramid


def test_levels_in_subifds(tmp_path: Path) -> None:
    levels = pyramid(tmp_path / "a.ome.tif", picture(211, 387), 4)
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert [level.downsample for level in slide.levels] == [1, 2, 4, 8]
        assert [level.size_px for level in slide.levels] == [x.shape[1::-1] for x in levels]
        for i, level in enumerate(levels):
            h, w = level.shape[:2]
            np.testing.assert_array_equal(slide.read((0, 0, w, h), i), level)


def with_levels(path: Path, levels: list[Any]) -> Path:
    with tifffile.TiffWriter(path, ome=True) as out:
        metadata = {"axes": "YXS", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
        options: dict[str, Any] = {"tile": (32, 32), "photometric": "rgb"}
        out.write(levels[0], subifds=len(levels) - 1, metadata=metadata, **options)
        for level in levels[1:]:
            out.write(level, subfiletype=1, metadata=None, **options)
    return path


IMAGE = picture(512, 640)
GOOD = [IMAGE, halved(IMAGE), halved(halved(IMAGE)), halved(halved(halved(IMAGE)))]


@pytest.mark.parametrize(
    ("level", "wrong", "words"),
    [
        (1, GOOD[1][:200], "level 1 left out: 320 x 200 px are not 640 x 512 px by one factor"),
        (2, GOOD[1][:, ::2], "level 2 left out: 160 x 256 px are not 640 x 512 px by one factor"),
        (2, GOOD[1], "level 2 left out: 320 x 256 px are no smaller than the level before"),
        (1, picture(256, 320, seed=1), "level 1 left out: 320 x 256 px of another picture"),
        (2, GOOD[2][:, ::-1], "level 2 left out: 160 x 128 px of another picture"),
        (2, GOOD[2][::-1], "level 2 left out: 160 x 128 px of another picture"),
        (3, np.full_like(GOOD[3], 255), "level 3 left out: 80 x 64 px of another picture"),
        (1, np.zeros_like(GOOD[1]), "level 1 left out: 320 x 256 px of another picture"),
    ],
    ids=["cropped", "squeezed", "twice", "other", "mirrored", "upside down", "white", "black"],
)
def test_a_level_that_is_not_the_slide_made_smaller_is_left_out_and_told(
    level: int, wrong: Any, words: str, tmp_path: Path
) -> None:
    levels: list[Any] = list(GOOD)
    levels[level] = wrong
    with open_slide(with_levels(tmp_path / "a.ome.tif", levels)) as slide:
        assert slide.notes == (words,)
        kept = [levels[i] for i in range(4) if i != level]
        assert [x.size_px for x in slide.levels] == [x.shape[1::-1] for x in kept]
        for i, image in enumerate(kept):
            np.testing.assert_array_equal(slide.read((0, 0, *image.shape[1::-1]), i), image)
        # What that level would have served comes from a finer one.
        got = slide.read_at((20, 20, 60, 52), MPP * 2**level)
        true = GOOD[level][20:52, 20:60]
        assert np.abs(got.astype(int) - true).mean() < 6


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("size", [(512, 640), (511, 641), (487, 333)])
def test_levels_of_dropped_pixels_and_odd_sizes_are_kept(
    step: int, size: tuple[int, int], tmp_path: Path
) -> None:
    levels = [picture(*size)]
    for _ in range(2):
        levels.append(np.ascontiguousarray(levels[-1][::step, ::step]))
    with open_slide(with_levels(tmp_path / "a.ome.tif", levels)) as slide:
        assert slide.notes == ()
        assert [x.downsample for x in slide.levels] == [1, step, step**2]


def test_levels_of_a_slide_of_glass_are_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    glass = rng.normal(240, 1.5, (512, 640, 3)).round().astype(np.uint8)
    levels = [glass, glass[::2, ::2], glass[::4, ::4]]
    with open_slide(with_levels(tmp_path / "a.ome.tif", levels)) as slide:
        assert len(slide.levels) == 3


def test_a_level_is_judged_where_the_finer_one_is_whole(tmp_path: Path) -> None:
    levels: list[Any] = [x.copy() for x in GOOD]
    levels[0][:, :400] = 0
    with open_slide(with_levels(tmp_path / "a.ome.tif", levels)) as slide:
        assert len(slide.levels) == 4


@pytest.mark.parametrize("layout", [{"tile": (64, 64)}, {"rowsperstrip": 16}, {}])
def test_without_a_pyramid_every_mpp_is_read_from_full_resolution(
    layout: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pairing.slide_image._MAX_SOURCE_PX", 128 * 128)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, IMAGE, photometric="rgb", metadata=None, **layout)
    with open_slide(path, mpp=MPP) as slide:
        assert len(slide.levels) == 1
        for i, true in enumerate(GOOD):
            height, width = true.shape[:2]
            got = slide.read_at((0, 0, width, height), MPP * 2**i)
            inner = (slice(3, -3), slice(3, -3))
            assert np.abs(got[inner].astype(int) - true[inner]).mean() < 5


@pytest.fixture(scope="module")
def pyramid_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pyramid") / "a.ome.tif"
    pyramid(path, picture(700, 900, seed=3), 4)
    return path


@settings(max_examples=40, deadline=None)
@given(
    mpp=st.floats(0.2, 3.0),
    corner=st.tuples(st.integers(-40, 300), st.integers(-40, 300)),
    shift=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    size=st.integers(31, 80),
)
def test_boxes_that_overlap_agree(
    pyramid_path: Path, mpp: float, corner: tuple[int, int], shift: tuple[int, int], size: int
) -> None:
    (x, y), (dx, dy) = corner, shift
    with open_slide(pyramid_path) as slide:
        one = slide.read_at((x, y, x + size, y + size), mpp).astype(int)
        two = slide.read_at((x + dx, y + dy, x + dx + size, y + dy + size), mpp).astype(int)
    difference = one[dy:, dx:] - two[: size - dy, : size - dx]
    assert np.abs(difference).max() <= 2


@settings(max_examples=40, deadline=None)
@given(
    mpp=st.floats(0.2, 3.0),
    corner=st.tuples(st.integers(-40, 300), st.integers(-40, 300)),
    circle=st.tuples(st.floats(0, 700), st.floats(0, 700), st.floats(1, 300)),
)
def test_what_is_hidden_is_fill_and_nothing_else_is(
    pyramid_path: Path, mpp: float, corner: tuple[int, int], circle: tuple[float, float, float]
) -> None:
    (x, y), (cx, cy, radius) = corner, circle

    def is_hidden(at_px: Any) -> Any:
        return np.hypot(*(at_px - (cx, cy)).T) < radius

    with open_slide(pyramid_path) as slide:
        seen = slide.read_at((x, y, x + 60, y + 40), mpp)
        got = slide.without(is_hidden).read_at((x, y, x + 60, y + 40), mpp)
        fill = slide.fill
    row, column = np.indices(seen.shape[:2])
    at_px = np.stack([x + column + 0.5, y + row + 0.5], axis=-1) * (mpp / MPP)
    hidden = is_hidden(at_px.reshape(-1, 2)).reshape(row.shape)
    np.testing.assert_array_equal(got[~hidden], seen[~hidden])
    assert (got[hidden] == fill).all()
    assert got.dtype == seen.dtype


def ramp(height: int, width: int, per_px: float, dtype: Any) -> Any:
    row = np.round((np.arange(width) + 0.5) * per_px).astype(dtype)
    return np.broadcast_to(row, (height, width)).copy()


@pytest.mark.parametrize("mpp", [0.2125, 0.25, 0.3, 0.5, 0.61, 1.0, 1.37, 3.9])
@pytest.mark.parametrize("axis", ["x", "y"])
def test_positions_survive_resampling(mpp: float, axis: str, tmp_path: Path) -> None:
    """On a ramp the value of an output pixel tells where it was taken from, in level-0 pixels.

    The error is held to a tenth of a pixel of the coarser grid, output or slide.
    """
    per_px = 60.0
    image = ramp(800, 801, per_px, np.uint16)
    image = image if axis == "x" else image.T.copy()
    pyramid(tmp_path / "a.ome.tif", image, 4)
    n = int(150 / mpp)
    with open_slide(tmp_path / "a.ome.tif") as slide:
        # Away from the border, where the ramp meets the fill.
        got = slide.read_at((n // 4, n // 4, n, n), mpp)[..., 0].astype(float)
    got = got if axis == "x" else got.T
    expected = (np.arange(n // 4, n) + 0.5) * mpp / MPP
    assert np.abs(got / per_px - expected).max() < 0.1 * max(1.0, mpp / MPP)


def test_positions_survive_resampling_in_8_bits(tmp_path: Path) -> None:
    per_px = 0.5
    image = np.repeat(ramp(400, 500, per_px, np.uint8)[..., None], 3, axis=-1)
    pyramid(tmp_path / "a.ome.tif", image, 2)
    with open_slide(tmp_path / "a.ome.tif") as slide:
        for mpp in (0.25, 0.31, 0.5, 0.8):
            got = slide.read_at((20, 20, 120, 60), mpp).mean(axis=(0, 2))
            expected = (np.arange(20, 120) + 0.5) * mpp / MPP
            # Rounding to grey levels averages out along the ramp.
            assert abs((got / per_px - expected).mean()) < 0.1


def test_a_large_region_is_read_in_parts_that_fit(
    pyramid_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_slide(pyramid_path) as slide:
        whole = slide.read_at((-5, -5, 300, 240), 0.8)
        monkeypatch.setattr("pairing.slide_image._MAX_SOURCE_PX", 5000)
        parts = slide.read_at((-5, -5, 300, 240), 0.8)
    assert np.abs(whole.astype(int) - parts.astype(int)).max() <= 1
