"""Label, macro and thumbnail pictures are never read: they carry names and barcodes of patients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from pairing.geometry import Affine
from pairing.patches import write_patches
from pairing.registration.gates import density_correlations
from pairing.registration.he_nuclei import find_he_nuclei
from pairing.slide import open_slide
from segmentation.blocks import tissue_mask
from shards.errors import BadInput
from shards.schema import PatchSpec
from tests.pairing.slides import MPP, RGB, TILED, aperio, halved, tissue

# What labels and macro pictures of these files show; no slide does.
POISON = np.tile(np.array([[(0, 255, 1), (1, 0, 255)]], np.uint8), (40, 30, 1))
IMAGE = tissue(512, 640)
QUARTER = halved(halved(IMAGE))


def svs(path: Path) -> None:
    described = "Aperio Image Library v12.0.15 \r\n640x512 |AppMag = 40|MPP = 0.2500|Left = 1.0"
    options: dict[str, Any] = {"photometric": "rgb", "metadata": None, "compression": "deflate"}
    with tifffile.TiffWriter(path) as out:
        out.write(IMAGE, tile=(64, 64), description=described, **options)
        out.write(POISON, description="Aperio thumbnail", **options)
        out.write(QUARTER, tile=(64, 64), description="Aperio", **options)
        out.write(POISON, description="Aperio\r\nlabel 60x40", subfiletype=1, **options)
        out.write(POISON, description="Aperio\r\nmacro 60x40", subfiletype=9, **options)


def svs_without_thumbnail(path: Path) -> None:
    described = "Aperio Image Library v12.0.15 \r\n640x512 |AppMag = 40|MPP = 0.2500|Left = 1.0"
    options: dict[str, Any] = {"photometric": "rgb", "metadata": None, "compression": "deflate"}
    with tifffile.TiffWriter(path) as out:
        out.write(IMAGE, tile=(64, 64), description=described, **options)
        out.write(POISON, description="Aperio\r\nlabel 60x40", subfiletype=1, **options)
        out.write(POISON, description="Aperio\r\nmacro 60x40", subfiletype=9, **options)


def ome_tiff(names: tuple[str, ...], path: Path, *, large: bool = False) -> None:
    """The slide after pictures of these names, as converters of vendors' formats leave them."""
    options: dict[str, Any] = {"photometric": "rgb", "compression": "deflate"}
    sizes = {"axes": "YXS", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
    poison = np.tile(POISON, (20, 20, 1)) if large else POISON
    with tifffile.TiffWriter(path, ome=True) as out:
        for name in names:
            out.write(poison, metadata={**sizes, "Name": name}, **options)
        out.write(IMAGE, tile=(64, 64), subifds=1, metadata={**sizes, "Name": "section"}, **options)
        out.write(QUARTER, tile=(64, 64), subfiletype=1, metadata=None, **options)
        out.write(poison, metadata={**sizes, "Name": "macro image"}, **options)


FILES: dict[str, Callable[[Path], None]] = {
    "svs": svs,
    "svs without thumbnail": svs_without_thumbnail,
    "ome, label after": partial(ome_tiff, ()),
    "ome, label before": partial(ome_tiff, ("label image",)),
    "ome, all before": partial(ome_tiff, ("Label", "Macro image", "thumbnail", "slide_label")),
    "ome, label larger than the slide": partial(ome_tiff, ("overview",), large=True),
}


@pytest.mark.parametrize("spoiled", [False, True], ids=["readable", "garbage"])
@pytest.mark.parametrize("name", FILES)
def test_nothing_that_uses_a_slide_sees_its_label(name: str, spoiled: bool, tmp_path: Path) -> None:
    """Nothing shows the label's pixels; nor is it decoded: garbage there disturbs nobody."""
    path = tmp_path / ("a.svs" if name.startswith("svs") else "a.ome.tif")
    FILES[name](path)
    if spoiled:
        spoil_pages(path, lambda page: page.shape[:2] not in {(512, 640), (128, 160)})
    with open_slide(path) as slide:
        assert slide.mpp == 0.25
        assert slide.notes == ()
        sizes = [level.size_px for level in slide.levels]
        assert sizes == [(640, 512)] + [(160, 128)] * ("without" not in name)
        np.testing.assert_array_equal(slide.read((0, 0, 640, 512)), IMAGE)
        for mpp in (0.25, 0.6, 1.0, 8.0, 16.0):
            n = round(0.25 / mpp * 512)
            colours = slide.read_at((0, 0, n, n), mpp).reshape(-1, 3)
            assert colours.min() > 20
            assert colours.max() < 230
        assert slide.background.tolist() == [255, 255, 255]
        assert tissue_mask(slide).all()
        cells_um = np.random.default_rng(0).uniform(5, 120, (300, 2))
        assert density_correlations(slide, cells_um, Affine.scale(1 / 0.25), 0.2125).keys()
    assert (find_he_nuclei(partial(open_slide, path)).px < (640, 512)).all()
    spec = PatchSpec(image="he", fov_um=16.0, size_px=64, center="cell", jpeg_quality=95)
    out = tmp_path / "patches"
    out.mkdir()
    (tmp_path / "blocks").mkdir()
    order = np.arange(300)
    summary = write_patches(
        out, tmp_path / "blocks", partial(open_slide, path), cells_um * 4, order, spec, map
    ).summary
    assert (summary["n_cut"], summary["n_damaged_tiles"]) == (300, 0)


def spoil_pages(path: Path, which: Callable[[Any], bool]) -> None:
    with tifffile.TiffFile(path) as file:
        pages = [p for series in file.series for level in series.levels for p in level.pages]
        places = [
            place
            for page in pages
            if which(page)
            for place in zip(page.dataoffsets, page.databytecounts, strict=True)
        ]
    assert places
    with path.open("r+b") as file:
        for offset, count in places:
            file.seek(offset)
            file.write(b"\xff" * count)


def test_svs_levels_are_pages_and_labels_are_not(tmp_path: Path) -> None:
    image, quarter = aperio(tmp_path / "a.svs")
    with open_slide(tmp_path / "a.svs") as slide:
        assert slide.mpp == 0.252
        assert [level.downsample for level in slide.levels] == [1, 4]
        np.testing.assert_array_equal(slide.read((0, 0, 384, 256)), image)
        np.testing.assert_array_equal(slide.read((0, 0, 96, 64), 1), quarter)


def test_svs_of_jpeg_2000_in_ycbcr_is_read_by_openslide(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    described = "Aperio Image Library v12.0.15 \r\n640x512 |AppMag = 40|MPP = 0.2500|Left = 1.0"
    stored = np.asarray(Image.fromarray(IMAGE).convert("YCbCr"))
    options: dict[str, Any] = {"photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path) as out:
        out.write(
            stored, tile=(64, 64), compression="aperio_jp2000_ycbc", description=described,
            **options,
        )  # fmt: skip
        out.write(POISON, description="Aperio\r\nlabel 60x40", subfiletype=1, **options)
    with open_slide(path) as slide:
        assert slide.mpp == 0.25
        got = slide.read((0, 0, 640, 512)).astype(int)
        assert np.abs(got - IMAGE).max() <= 3


def test_a_file_of_labels_alone_is_no_slide(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as out:
        for name in ("label image", "macro image"):
            metadata = {"axes": "YXS", "Name": name}
            out.write(RGB, photometric="rgb", metadata=metadata, **TILED)
    with (
        pytest.raises(BadInput, match=r"only label image, macro image(?s:.)*never read"),
        open_slide(path, mpp=0.25),
    ):
        pass
