"""Slides: the pixels, levels and pixel sizes that files of every shape give."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pairing.slide import Slide, open_plane, open_slide
from shards.errors import BadInput
from tests.pairing.slides import (
    GREY,
    HEIGHT,
    MPP,
    RESOLUTION,
    RGB,
    TILED,
    WIDTH,
    ome,
    picture,
    plain,
)

# An open slide is read many times in one test.
many_boxes = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


PLANAR = np.moveaxis(RGB, 2, 0)
RGBA = np.dstack([RGB, RGB[..., :1]])
# 16 bits that stand for RGB exactly, by all their bits or by the 12 of them that are significant.
RGB_16 = RGB.astype(np.uint16) * 257
RGB_12 = ((RGB.astype(np.uint32) * 4095 + 127) // 255).astype(np.uint16)

# name: writer, data, axes or None, options. All of them show RGB.
FILES: dict[str, tuple[Callable[..., Path], Any, str | None, dict[str, Any]]] = {
    "ome YXS deflate": (ome, RGB, "YXS", {"compression": "deflate", **TILED}),
    "ome YXS jpeg-2000": (ome, RGB, "YXS", {"compression": "jpeg2000", **TILED}),
    "ome YXS jpeg-2000 rgb of aperio": (
        ome, RGB, "YXS", {"compression": "aperio_jp2000_rgb", **TILED}
    ),
    "ome YXS zstd": (ome, RGB, "YXS", {"compression": "zstd", **TILED}),
    "ome YXS webp": (ome, RGB, "YXS", {"compression": "webp", **TILED}),
    "ome YXS lzw with predictor": (
        ome, RGB, "YXS", {"compression": "lzw", "predictor": True, **TILED}
    ),
    "ome CYX lzw": (ome, PLANAR, "CYX", {**GREY, "compression": "lzw", **TILED}),
    "ome planar SYX": (ome, PLANAR, "SYX", {"planarconfig": "separate", **TILED}),
    "ome 1YX3": (ome, RGB[None], "TYXS", TILED),
    "ome TCZYX": (ome, PLANAR[None, :, None], "TCZYX", {**GREY, **TILED}),
    "ome TCZYXS": (ome, RGB[None, None, None], "TCZYXS", TILED),
    "ome ZCYX": (ome, PLANAR[None], "ZCYX", {**GREY, **TILED}),
    "ome 4YX": (ome, np.moveaxis(RGBA, 2, 0), "CYX", {**GREY, **TILED}),
    "ome planar RGBA": (
        ome, np.moveaxis(RGBA, 2, 0), "SYX",
        {"planarconfig": "separate", "extrasamples": ["unassalpha"], **TILED},
    ),
    "ome in strips": (ome, RGB, "YXS", {"rowsperstrip": 17, "compression": "deflate"}),
    "ome 16 bits": (ome, RGB_16, "YXS", {"compression": "deflate", **TILED}),
    "ome 16 bits CYX": (ome, np.moveaxis(RGB_16, 2, 0), "CYX", {**GREY, **TILED}),
    "ome 12 significant bits": (
        ome, RGB_12, "YXS", {"metadata": {"SignificantBits": 12}, **TILED}
    ),
    "ome 16 bits big-endian": (ome, RGB_16, "YXS", {"byteorder": ">", **TILED}),
    "16 bits RGBA": (
        plain, RGBA.astype(np.uint16) * 257, None, {"extrasamples": ["unassalpha"], **TILED}
    ),
    "packed 12 bits": (plain, RGB_12, None, {"bitspersample": 12, **TILED}),
    "plain tiled": (plain, RGB, None, TILED),
    "plain planar": (plain, PLANAR, None, {"planarconfig": "separate", **TILED}),
    "plain planes": (plain, PLANAR, None, {**GREY, **TILED}),
    "plain RGBA": (plain, RGBA, None, {"extrasamples": ["unassalpha"], **TILED}),
    "one strip": (plain, RGB, None, {}),
    "one strip planar": (plain, PLANAR, None, {"planarconfig": "separate"}),
    "one strip of 16 bits big-endian": (plain, RGB_16, None, {"byteorder": ">"}),
    "one strip deflated": (
        plain, RGB, None, {"compression": "deflate", "rowsperstrip": HEIGHT}
    ),
    "bigtiff": (plain, RGB, None, {"bigtiff": True, **TILED}),
    "big-endian bigtiff": (
        plain, RGB, None, {"bigtiff": True, "byteorder": ">", "compression": "lzw", **TILED}
    ),
}  # fmt: skip


def written(name: str, folder: Path) -> Path:
    write, data, axes, options = FILES[name]
    options = {"photometric": "rgb", **options}
    if axes is None:
        return write(folder / "a.tif", data, **options)
    return write(folder / "a.ome.tif", data, axes, **options)


def sliced(image: Any, box: tuple[int, int, int, int], fill: Any) -> Any:
    """What `read` promises, by plain indexing."""
    x0, y0, x1, y1 = box
    out = np.empty((y1 - y0, x1 - x0, image.shape[2]), image.dtype)
    out[:] = fill
    for y in range(max(y0, 0), min(y1, image.shape[0])):
        a, b = max(x0, 0), min(x1, image.shape[1])
        if a < b:
            out[y - y0, a - x0 : b - x0] = image[y, a:b]
    return out


@pytest.mark.parametrize("name", FILES)
def test_a_box_is_the_slice_of_the_image(name: str, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    with open_slide(path) as slide:
        assert slide.size_px == (WIDTH, HEIGHT)
        assert slide.mpp == pytest.approx(MPP, rel=1e-6)
        assert (slide.n_channels, slide.dtype) == (3, np.uint8)

        @many_boxes
        @given(
            st.integers(-60, WIDTH + 20), st.integers(-60, HEIGHT + 20),
            st.integers(1, 120), st.integers(1, 120),
        )  # fmt: skip
        def holds(x: int, y: int, w: int, h: int) -> None:
            box = (x, y, x + w, y + h)
            np.testing.assert_array_equal(slide.read(box), sliced(RGB, box, slide.fill))

        holds()


def test_sixteen_bits_stay_and_are_filled_with_nothing(tmp_path: Path) -> None:
    image = (picture(channels=1).astype(np.uint16) * 200)[..., 0]
    with open_slide(ome(tmp_path / "a.ome.tif", image, "YX", **TILED)) as slide:
        assert (slide.n_channels, slide.dtype) == (1, np.uint16)
        got = slide.read((-10, -10, 70, 60))
        np.testing.assert_array_equal(got, sliced(image[..., None], (-10, -10, 70, 60), 0))
        assert slide.read_at((0, 0, 50, 30), 0.75).dtype == np.uint16


def test_tiles_that_a_file_leaves_out_are_blank(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.tif", RGB, photometric="rgb", **TILED)
    with tifffile.TiffFile(path, mode="r+b") as file:
        counts = file.pages.first.tags[325]
        counts.overwrite((0, *counts.value[1:]))
    with open_slide(path) as slide:
        got = slide.read((0, 0, 96, 64))
    assert (got[:32, :48] == 255).all()
    np.testing.assert_array_equal(got[32:], RGB[32:64, :96])


def test_real_svs(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "slides" / "CMU-1-Small-Region.svs"
    with openslide.OpenSlide(path) as other:
        truth = np.asarray(other.read_region((0, 0), 0, other.dimensions))[..., :3]
    with open_slide(path) as slide:
        assert slide.size_px == (2220, 2967)
        assert slide.mpp == 0.499
        assert slide.tile_px == (240, 240)
        assert len(slide.levels) == 1  # thumbnail, label and macro are no levels
        np.testing.assert_array_equal(slide.read((0, 0, 2220, 2967)), truth)
        np.testing.assert_array_equal(slide.read((333, 99, 700, 611)), truth[99:611, 333:700])
        glass = slide.fill
        assert (glass > 235).all()
        assert (glass < 255).all()
    # A suffix that tifffile is not asked for: the same pixels through OpenSlide.
    copy = tmp_path / "slide.bif"
    shutil.copyfile(path, copy)
    with open_slide(copy) as slide:
        assert slide.mpp == 0.499
        np.testing.assert_array_equal(slide.read((100, 200, 400, 500)), truth[200:500, 100:400])
        np.testing.assert_array_equal(slide.fill, glass)


def test_background_is_the_glass(tmp_path: Path) -> None:
    image = np.full((200, 300, 3), (238, 236, 241), np.uint8)
    image[40:160, 60:240] = (190, 120, 170)
    with open_slide(ome(tmp_path / "a.ome.tif", image, "YXS", photometric="rgb")) as slide:
        assert slide.background.tolist() == [238, 236, 241]
        assert slide.read((-2, -2, 4, 4))[0, 0].tolist() == [238, 236, 241]
    image[:] = (190, 120, 170)
    with open_slide(ome(tmp_path / "b.ome.tif", image, "YXS", photometric="rgb")) as slide:
        assert slide.background.tolist() == [255, 255, 255]


def test_a_file_cut_short_is_told(tmp_path: Path) -> None:
    path = written("plain tiled", tmp_path)
    with tifffile.TiffFile(path) as file:
        last = file.pages.first.dataoffsets[-1]
    os.truncate(path, last + 100)
    with pytest.raises(BadInput, match=r"(?s)a whole TIFF file.*copied whole"), open_slide(path):
        pass


@pytest.mark.parametrize(
    ("image", "axes", "options"),
    [
        (RGB, "YXS", {"compressionargs": {"level": 95}}),
        (RGB, "YXS", {"compressionargs": {"level": 95, "outcolorspace": "rgb"}}),
        (PLANAR, "SYX", {"compressionargs": {"level": 95}, "planarconfig": "separate"}),
    ],
    ids=["YCbCr", "RGB", "planes"],
)
def test_jpeg_comes_out_as_red_green_and_blue(
    image: Any, axes: str, options: dict[str, Any], tmp_path: Path
) -> None:
    options = {"compression": "jpeg", "photometric": "rgb", **TILED, **options}
    with open_slide(ome(tmp_path / "a.ome.tif", image, axes, **options)) as slide:
        assert slide.n_channels == 3
        got = slide.read((0, 0, WIDTH, HEIGHT)).astype(int)
        assert np.abs(got - RGB).mean() < 6
        assert np.abs((got - RGB).mean(axis=(0, 1))).max() < 1


def test_sixteen_bits_become_eight_by_what_the_file_states(tmp_path: Path) -> None:
    """Rounded to the nearest grey level; brighter than the stated white stays white."""
    row = np.array([0, 7, 8, 9, 24, 25, 2047, 2048, 4095, 5000], np.uint16)
    image = np.broadcast_to(row[None, :, None], (40, 10, 3)).copy()
    path = ome(
        tmp_path / "a.ome.tif", image, "YXS", photometric="rgb",
        metadata={"SignificantBits": 12},
    )  # fmt: skip
    with open_slide(path) as slide:
        assert slide.is_rgb
        got = slide.read((0, 0, 10, 1))[0, :, 0]
        assert got.tolist() == [0, 0, 0, 1, 1, 2, 127, 128, 255, 255]


def test_fewer_bits_than_stated_are_no_guess_of_ours(tmp_path: Path) -> None:
    path = ome(tmp_path / "a.ome.tif", RGB_12, "YXS", photometric="rgb", **TILED)
    with (
        pytest.raises(BadInput, match=r"(?s)uses the 16 bits.*brighter than 6.3%.*Significant"),
        open_slide(path),
    ):
        pass


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (RGB[..., 0], {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)},
         "photometric PALETTE"),
        (RGBA, {"photometric": "separated"}, "photometric SEPARATED"),
        (RGB[..., 0], {"photometric": "miniswhite"}, "photometric MINISWHITE"),
        (RGB, {"photometric": "cielab"}, "photometric CIELAB"),
        (RGB.astype(np.float32), {"photometric": "rgb"}, "pixels of type float32, 32 bits"),
        (RGB.astype(np.int16), {"photometric": "rgb"}, "pixels of type int16, 16 bits"),
        (RGB, {"photometric": "ycbcr", "compression": "deflate"}, "YCbCr by DEFLATE"),
        (RGB, {"photometric": "ycbcr", "compression": "jpeg2000"}, "YCbCr by JPEG2000"),
    ],
    ids=["palette", "CMYK", "white is zero", "Lab", "float", "signed", "YCbCr", "YCbCr J2K"],
)  # fmt: skip
def test_pixels_that_would_come_out_wrong_are_refused(
    data: Any, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = plain(tmp_path / "a.tif", data, **options, **TILED)
    with (
        pytest.raises(BadInput, match=rf"(?s)8 or 16 bit pixels as one of.*{words}.*as RGB"),
        open_slide(path),
    ):
        pass


def test_a_compression_that_nobody_knows_is_not_a_slide_of_damaged_tiles(tmp_path: Path) -> None:
    path = written("plain tiled", tmp_path)
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages.first.tags[259].overwrite(34999)
    with pytest.raises(BadInput, match="compression 34999"), open_slide(path):
        pass


def test_one_compressed_strip_of_a_whole_slide_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    height, width = 12000, 12000
    strip = imagecodecs.zlib_encode(b"\xff" * 1000)
    tifffile.imwrite(
        path, iter([strip]), shape=(height, width, 3), dtype=np.uint8, photometric="rgb",
        compression="deflate", rowsperstrip=height, metadata=None, **RESOLUTION,
    )  # fmt: skip
    with (
        pytest.raises(BadInput, match=r"(?s)12000 x 12000 px, compressed as one.*in tiles"),
        open_slide(path),
    ):
        pass


def test_what_is_no_slide_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "a.svs"
    text.write_text("no slide")
    for path, words in [
        (tmp_path / "none.svs", "nothing"),
        (tmp_path, "a folder"),
        (text, "TIFF"),
    ]:
        with pytest.raises(BadInput, match=words), open_slide(path):
            pass
    other = tmp_path / "a.ndpi"
    other.write_text("no slide")
    with pytest.raises(BadInput, match="OpenSlide"), open_slide(other):
        pass
    stack = ome(tmp_path / "z.ome.tif", np.zeros((4, 32, 32), np.uint16), "ZYX")
    with pytest.raises(BadInput, match="one plane"), open_slide(stack):
        pass


def test_one_channel_of_an_image_in_many_files(shared_data: Path) -> None:
    folder = shared_data / "xenium" / "mouse_ileum_tiny" / "morphology_focus"
    path = folder / "morphology_focus_0000.ome.tif"
    with pytest.raises(BadInput, match="4 files"), open_slide(path):
        pass
    with open_plane(path, mpp=0.2125) as slide:
        assert isinstance(slide, Slide)
        assert slide.size_px == (5789, 3522)
        assert [level.downsample for level in slide.levels] == [1, 2, 4, 8, 16]
        assert (slide.n_channels, slide.dtype, slide.fill.tolist()) == (1, np.uint16, [0])
        whole = tifffile.imread(path, is_ome=False)
        np.testing.assert_array_equal(slide.read((0, 0, 5789, 3522))[..., 0], whole)


def test_a_renamed_file_is_still_one_slide(tmp_path: Path) -> None:
    path = written("ome YXS deflate", tmp_path)
    renamed = path.rename(tmp_path / "Schnitt α 1.ome.tif")
    with open_slide(renamed) as slide:
        np.testing.assert_array_equal(slide.read((0, 0, WIDTH, HEIGHT)), RGB)
