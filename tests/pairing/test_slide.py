"""Slides: the pixels, levels and pixel sizes that files of every shape give."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pairing.slide import DamagedTile, Slide, open_plane, open_slide
from shards.errors import BadInput

WIDTH, HEIGHT = 150, 97
MPP = 0.25

# An open slide is read many times in one test.
many_boxes = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def picture(height: int = HEIGHT, width: int = WIDTH, channels: int = 3, seed: int = 0) -> Any:
    """(Y, X, C) uint8, smooth enough for lossy codecs and nowhere the same."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (height // 8 + 2, width // 8 + 2, channels), dtype=np.uint8)
    planes = [
        np.asarray(
            Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC)
        )
        for c in range(channels)
    ]
    return np.stack(planes, axis=-1)


def ome(path: Path, data: Any, axes: str, **options: Any) -> Path:
    sizes = {"PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
    metadata = {"axes": axes, **sizes, **options.pop("metadata", {})}
    tifffile.imwrite(path, data, ome=True, metadata=metadata, **options)
    return path


RGB = picture()
TILED: dict[str, Any] = {"tile": (32, 48)}
RESOLUTION: dict[str, Any] = {"resolution": (1e4 / MPP, 1e4 / MPP), "resolutionunit": "CENTIMETER"}
WRITERS: dict[str, Callable[[Path], Path]] = {
    "ome YXS deflate": lambda f: ome(
        f / "a.ome.tif", RGB, "YXS", photometric="rgb", compression="deflate", **TILED
    ),
    "ome YXS jpeg-2000": lambda f: ome(
        f / "a.ome.tif", RGB, "YXS", photometric="rgb", compression="jpeg2000", **TILED
    ),
    "ome CYX lzw": lambda f: ome(
        f / "a.ome.tif", np.moveaxis(RGB, 2, 0), "CYX", photometric="minisblack",
        compression="lzw", **TILED,
    ),
    "ome planar SYX": lambda f: ome(
        f / "a.ome.tif", np.moveaxis(RGB, 2, 0), "SYX", photometric="rgb",
        planarconfig="separate", **TILED,
    ),
    "ome with one time point": lambda f: ome(
        f / "a.ome.tif", RGB[None], "TYXS", photometric="rgb", **TILED
    ),
    "ome in strips": lambda f: ome(
        f / "a.ome.tif", RGB, "YXS", photometric="rgb", rowsperstrip=17, compression="deflate"
    ),
    "plain tiled": lambda f: plain(f / "a.tif", RGB, photometric="rgb", **TILED),
    "plain planar": lambda f: plain(
        f / "a.tif", np.moveaxis(RGB, 2, 0), photometric="rgb", planarconfig="separate", **TILED
    ),
    "plain RGBA": lambda f: plain(
        f / "a.tif", np.dstack([RGB, RGB[..., :1]]), photometric="rgb", extrasamples=["unassalpha"],
        **TILED,
    ),
    "bigtiff": lambda f: plain(f / "a.btf", RGB, photometric="rgb", bigtiff=True, **TILED),
}  # fmt: skip


def plain(path: Path, data: Any, **options: Any) -> Path:
    tifffile.imwrite(path, data, metadata=None, **RESOLUTION, **options)
    return path


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


@pytest.mark.parametrize("writer", WRITERS)
def test_a_box_is_the_slice_of_the_image(writer: str, tmp_path: Path) -> None:
    path = WRITERS[writer](tmp_path)
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


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"PhysicalSizeX": 0.2738, "PhysicalSizeY": 0.2738}, 0.2738),
        ({"PhysicalSizeX": 273.8, "PhysicalSizeXUnit": "nm",
          "PhysicalSizeY": 0.2738, "PhysicalSizeYUnit": "µm"}, 0.2738),
        ({"PhysicalSizeX": 0.0002738, "PhysicalSizeXUnit": "mm",
          "PhysicalSizeY": 0.0002738, "PhysicalSizeYUnit": "mm"}, 0.2738),
        ({"PhysicalSizeX": 0.27, "PhysicalSizeY": 0.272}, 0.271),
    ],
)  # fmt: skip
def test_pixel_size_of_ome(metadata: dict[str, Any], expected: float, tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", metadata={"axes": "YXS", **metadata})
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(expected)


def test_pixels_that_are_not_square_are_refused_unless_overruled(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.26}
    tifffile.imwrite(path, RGB, photometric="rgb", metadata=metadata)
    with pytest.raises(BadInput, match="square pixels"), open_slide(path):
        pass
    with open_slide(path, mpp=0.25) as slide:
        assert slide.mpp == 0.25


@pytest.mark.parametrize(
    "resolution",
    [
        {},
        {"resolution": (72, 72), "resolutionunit": "INCH"},
        {"resolution": (4e4, 4e4), "resolutionunit": 1},
    ],
    ids=["none", "a printer's", "without unit"],
)
def test_a_missing_pixel_size_names_the_option(resolution: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", metadata=None, **resolution)
    with pytest.raises(BadInput, match=r"(?s)pixel size.*mpp = .*--mpp"), open_slide(path):
        pass
    with open_slide(path, mpp=0.3) as slide:
        assert slide.mpp == 0.3


def test_a_picture_needs_a_pixel_size(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)
    with pytest.raises(BadInput, match="--mpp"), open_slide(path):
        pass
    with open_slide(path, mpp=0.4) as slide:
        np.testing.assert_array_equal(slide.read((0, 0, WIDTH, HEIGHT)), RGB)


@pytest.mark.parametrize("given", [0.0, -0.25, float("nan"), float("inf")])
def test_a_given_pixel_size_must_be_one(given: float, tmp_path: Path) -> None:
    path = WRITERS["plain tiled"](tmp_path)
    with pytest.raises(BadInput, match="positive number"), open_slide(path, mpp=given):
        pass


def halved(image: Any) -> Any:
    """Mean of 2 x 2, as scanners build pyramids; odd edges are left out."""
    h, w = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
    blocks = image[:h, :w].reshape(h // 2, 2, w // 2, 2, -1).astype(float)
    mean = blocks.mean(axis=(1, 3))
    return mean.round().astype(image.dtype).reshape(h // 2, w // 2, *image.shape[2:])


def pyramid(path: Path, image: Any, n_levels: int, **options: Any) -> list[Any]:
    """OME-TIFF with levels in SubIFDs; returns the levels."""
    levels = [image]
    for _ in range(n_levels - 1):
        levels.append(halved(levels[-1]))
    photometric = "rgb" if image.ndim == 3 else "minisblack"
    with tifffile.TiffWriter(path, ome=True) as out:
        metadata = {"axes": "YXS"[: image.ndim], "PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
        common = {"tile": (32, 32), "photometric": photometric, **options}
        out.write(image, subifds=n_levels - 1, metadata=metadata, **common)
        for level in levels[1:]:
            out.write(level, subfiletype=1, metadata=None, **common)
    return levels


def test_levels_in_subifds(tmp_path: Path) -> None:
    levels = pyramid(tmp_path / "a.ome.tif", picture(211, 387), 4)
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert [level.downsample for level in slide.levels] == [1, 2, 4, 8]
        assert [level.size_px for level in slide.levels] == [x.shape[1::-1] for x in levels]
        for i, level in enumerate(levels):
            h, w = level.shape[:2]
            np.testing.assert_array_equal(slide.read((0, 0, w, h), i), level)


def aperio(path: Path) -> tuple[Any, Any]:
    """An SVS as scanners write it: baseline, thumbnail, a level of a quarter, label and macro."""
    image = picture(256, 384)
    quarter = halved(halved(image))
    described = "Aperio Image Library v12.0.15 \r\n384x256 |AppMag = 40|MPP = 0.2520|Left = 1.0"
    options: dict[str, Any] = {"photometric": "rgb", "metadata": None, "compression": "deflate"}
    black = np.zeros((40, 60, 3), np.uint8)
    with tifffile.TiffWriter(path) as out:
        out.write(image, tile=(64, 64), description=described, **options)
        out.write(black, description="Aperio thumbnail", **options)
        out.write(quarter, tile=(64, 64), description="Aperio", **options)
        out.write(black, description="Aperio\r\nlabel 60x40", subfiletype=1, **options)
        out.write(black, description="Aperio\r\nmacro 60x40", subfiletype=9, **options)
    return image, quarter


def test_svs_levels_are_pages_and_labels_are_not(tmp_path: Path) -> None:
    image, quarter = aperio(tmp_path / "a.svs")
    with open_slide(tmp_path / "a.svs") as slide:
        assert slide.mpp == 0.252
        assert [level.downsample for level in slide.levels] == [1, 4]
        np.testing.assert_array_equal(slide.read((0, 0, 384, 256)), image)
        np.testing.assert_array_equal(slide.read((0, 0, 96, 64), 1), quarter)


def test_a_label_image_before_the_slide_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as out:
        sizes = {"axes": "YXS", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
        black = np.zeros((200, 300, 3), np.uint8)
        out.write(black, photometric="rgb", metadata={"axes": "YXS", "Name": "label image"})
        out.write(RGB, photometric="rgb", metadata={**sizes, "Name": "section"}, **TILED)
    with open_slide(path) as slide:
        assert slide.mpp == MPP
        np.testing.assert_array_equal(slide.read((0, 0, WIDTH, HEIGHT)), RGB)


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


@pytest.fixture(scope="module")
def pyramid_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pyramid") / "a.ome.tif"
    pyramid(path, picture(700, 900, seed=3), 4)
    return path


@many_boxes
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


def damage(path: Path, level: int, tile: int) -> None:
    with tifffile.TiffFile(path) as file:
        page = file.series[0].levels[level].pages[0]
        offset, count = page.dataoffsets[tile], page.databytecounts[tile]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff\x00" * (count // 2))


@pytest.mark.parametrize("compression", ["deflate", "lzw", "jpeg2000", "jpeg"])
def test_a_damaged_tile_is_named(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    pyramid(path, picture(211, 387), 2, compression=compression)
    with open_slide(path) as slide:
        good = slide.read((0, 0, 387, 211))
    damage(path, 1, 8)  # level 1 is 193 x 105 px in 7 x 4 tiles: the second row's second
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read((0, 0, 387, 211)), good)
        slide.read((64, 32, 193, 64), 1)
        with pytest.raises(DamagedTile) as caught:
            slide.read((40, 40, 50, 50), 1)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.path, error.level, error.box) == (path, 1, (32, 32, 64, 64))
    assert str(path) in str(error)
    assert "level 1" in str(error)


def test_a_file_cut_short_is_told(tmp_path: Path) -> None:
    path = WRITERS["plain tiled"](tmp_path)
    with tifffile.TiffFile(path) as file:
        last = file.pages.first.dataoffsets[-1]
    os.truncate(path, last + 100)
    with pytest.raises(BadInput, match=r"(?s)a whole TIFF file.*copied whole"), open_slide(path):
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
    path = WRITERS["ome YXS deflate"](tmp_path)
    renamed = path.rename(tmp_path / "Schnitt α 1.ome.tif")
    with open_slide(renamed) as slide:
        np.testing.assert_array_equal(slide.read((0, 0, WIDTH, HEIGHT)), RGB)
