"""Damaged tiles of slides: told by name, or read over and reported."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairing.slide import Damage, DamagedTile, open_slide
from tests.pairing.slides import (
    MPP,
    ome,
    picture,
    place_of,
    plain,
    pyramid,
    repeat,
    repoint,
    spoil,
    tissue,
)


@pytest.mark.parametrize("compression", ["deflate", "lzw", "jpeg2000", "jpeg"])
def test_a_damaged_tile_is_named(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    pyramid(path, picture(211, 387), 2, compression=compression)
    with open_slide(path) as slide:
        good = slide.read((0, 0, 387, 211))
    spoil(path, 8, level=1)  # level 1 is 193 x 105 px in 7 x 4 tiles: the second row's second
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read((0, 0, 387, 211)), good)
        slide.read((64, 32, 193, 64), 1)
        with pytest.raises(DamagedTile) as caught:
            slide.read((40, 40, 50, 50), 1)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.path, error.level, error.box) == (path, 1, (32, 32, 64, 64))
    assert str(path) in str(error)
    assert "level 1" in str(error)


GLASS = (240, 238, 243)
NO_CELLS = np.zeros((0, 2))


def slide_with_glass() -> Any:
    """640 x 512 px, the left 64 px of it glass."""
    image = tissue(512, 640)
    image[:, :64] = GLASS
    return image


@pytest.mark.parametrize("compression", ["deflate", "lzw", "zstd", "jpeg2000", "jpeg", "webp"])
def test_a_tolerant_slide_reads_glass_where_a_tile_does_not_decode(
    compression: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.ome.tif"
    options: dict[str, Any] = {"tile": (64, 64), "compression": compression, "photometric": "rgb"}
    ome(path, slide_with_glass(), "YXS", **options)
    with open_slide(path) as slide:
        true, glass = slide.read((0, 0, 640, 512)), slide.background
    spoil(path, 3 * 10 + 4)  # the fourth row's fifth tile
    with open_slide(path) as slide:
        with pytest.raises(DamagedTile):
            slide.read((0, 0, 640, 512))
        tolerant, met = slide.tolerant()
        got = tolerant.read((0, 0, 640, 512))
        assert met == [Damage(kind="undecodable", box=(256, 192, 320, 256))]
        true[192:256, 256:320] = glass
        np.testing.assert_array_equal(got, true)
        # A slide is as strict as ever to those who didn't ask for tolerance.
        with pytest.raises(DamagedTile):
            slide.read((0, 0, 640, 512))
        tolerant.read((0, 0, 200, 192))
        assert len(met) == 1
        tolerant.read_at((70, 50, 75, 55), 4 * MPP)
        assert len(met) == 2


@pytest.fixture(scope="module")
def holes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A slide with black places, its picture, and which of them are holes."""
    image = slide_with_glass()
    holes = np.zeros((512, 640), bool)
    holes[128:192, 192:256] = True  # a tile
    holes[300:377, 401:477] = True  # across tiles, on no grid
    holes[448:512, 576:640] = True  # in the corner
    image[holes] = 0
    image[20:51, 100:300] = 0  # too narrow to be a hole: ink, a line
    path = tmp_path_factory.mktemp("holes") / "a.ome.tif"
    ome(path, image, "YXS", photometric="rgb", tile=(64, 64), compression="deflate")
    return path, image, holes


def test_black_holes_are_glass_and_reported_by_tile(holes: tuple[Path, Any, Any]) -> None:
    path, image, where = holes
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read((0, 0, 640, 512)), image)
        tolerant, met = slide.tolerant()
        got = tolerant.read((0, 0, 640, 512))
    assert met == [
        Damage(kind="black", box=box)
        for box in [
            (192, 128, 256, 192),
            (401, 300, 448, 320), (448, 300, 477, 320),
            (401, 320, 448, 377), (448, 320, 477, 377),
            (576, 448, 640, 512),
        ]
    ]  # fmt: skip
    expected = image.copy()
    expected[where] = GLASS
    np.testing.assert_array_equal(got, expected)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(-20, 600), st.integers(-20, 480), st.integers(1, 200), st.integers(1, 200)
)  # fmt: skip
def test_any_box_shows_the_same_of_a_hole(
    holes: tuple[Path, Any, Any], x: int, y: int, w: int, h: int
) -> None:
    path, image, where = holes
    whole = np.full((1024, 1024, 3), GLASS, np.uint8)
    whole[100 : 100 + 512, 100 : 100 + 640] = image
    whole[100 : 100 + 512, 100 : 100 + 640][where] = GLASS
    with open_slide(path) as slide:
        got = slide.tolerant()[0].read((x, y, x + w, y + h))
    np.testing.assert_array_equal(got, whole[100 + y : 100 + y + h, 100 + x : 100 + x + w])


def test_unscanned_black_of_fluorescence_is_no_damage(tmp_path: Path) -> None:
    image = np.zeros((256, 256), np.uint16)
    image[100:, 100:] = 900
    with open_slide(ome(tmp_path / "a.ome.tif", image, "YX", tile=(64, 64))) as slide:
        tolerant, met = slide.tolerant()
        np.testing.assert_array_equal(tolerant.read((0, 0, 256, 256))[..., 0], image)
        assert met == []


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "deflate"},
        {"compression": "jpeg"},
        {"compression": "jpeg2000"},
        {},
        {"compression": "lzw", "planarconfig": "separate"},
    ],
    ids=["deflate", "jpeg", "jpeg-2000", "none", "planar"],
)
def test_a_tile_that_stands_at_two_places_is_found_in_the_table(
    options: dict[str, Any], tmp_path: Path
) -> None:
    image = slide_with_glass()
    planar = "planarconfig" in options
    if planar:
        image = np.moveaxis(image, 2, 0)
    path = plain(tmp_path / "a.tif", image, photometric="rgb", tile=(64, 64), **options)
    for plane in range(3 if planar else 1):
        repeat(path, plane * 80 + 25, of=plane * 80 + 67)
        repoint(path, plane * 80 + 42, place_of(path, plane * 80 + 13))
    with open_slide(path) as slide:
        assert slide.find_damage(NO_CELLS) == [
            Damage(kind="duplicate", box=box)
            for box in [
                (192, 64, 256, 128), (320, 128, 384, 192), (128, 256, 192, 320),
                (448, 384, 512, 448),
            ]
        ]  # fmt: skip


def test_glass_may_repeat_and_so_may_one_plane(tmp_path: Path) -> None:
    grey = np.repeat(tissue(256, 320)[..., :1], 3, axis=2)
    grey[:128] = 255
    path = plain(
        tmp_path / "a.tif", np.moveaxis(grey, 2, 0), photometric="rgb", planarconfig="separate",
        tile=(64, 64),
    )  # fmt: skip
    with open_slide(path) as slide:
        assert slide.find_damage(NO_CELLS) == []


def test_a_tile_that_was_left_out_is_missing_only_where_a_cell_lies(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.tif", slide_with_glass(), photometric="rgb", tile=(64, 64))
    repoint(path, 0, (0, 0))
    repoint(path, 45, (0, 0))
    centres_px = np.array([[400.0, 300.0], [100.0, 100.0], [-5.0, 3.0], [9000.0, 3.0]])
    with open_slide(path) as slide:
        assert slide.find_damage(NO_CELLS) == []
        assert slide.find_damage(centres_px) == []
        centres_px[0] = (384 - 0.1, 256)
        assert slide.find_damage(centres_px) == [Damage(kind="missing", box=(320, 256, 384, 320))]


def test_glass_is_sampled_past_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    plain(path, slide_with_glass(), photometric="rgb", tile=(64, 64), compression="deflate")
    for tile in (0, 10, 20, 33, 34):
        spoil(path, tile)
    with open_slide(path) as slide:
        assert tuple(slide.background) == GLASS


def test_openslide_is_read_over_damage_too(tmp_path: Path) -> None:
    """OpenSlide serves nothing more after its first error: the file is opened again."""
    path = tmp_path / "a.bif"  # a suffix that tifffile is not asked for
    image = slide_with_glass()
    plain(path, image, photometric="rgb", tile=(64, 64), compression="deflate")
    spoil(path, 34)
    with open_slide(path, mpp=MPP) as slide:
        assert slide.tile_px == (64, 64)
        with pytest.raises(DamagedTile) as caught:
            slide.read((0, 0, 640, 512))
        pickle.loads(pickle.dumps(caught.value))
        tolerant, met = slide.tolerant()
        image[192:256, 256:320] = GLASS
        np.testing.assert_array_equal(tolerant.read((0, 0, 640, 512)), image)
        assert met == [Damage(kind="undecodable", box=(256, 192, 320, 256))]
        np.testing.assert_array_equal(slide.read((0, 0, 200, 150)), image[:150, :200])
