"""The pixel size of a slide: where files say it, and what happens where they don't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from pairing.slide import open_slide
from shards.errors import BadInput
from tests.pairing.slides import HEIGHT, RGB, TILED, WIDTH, plain


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
    path = plain(tmp_path / "a.tif", RGB, photometric="rgb", **TILED)
    with pytest.raises(BadInput, match="positive number"), open_slide(path, mpp=given):
        pass
