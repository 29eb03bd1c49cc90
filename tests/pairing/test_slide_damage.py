"""Damaged tiles of slides: told by name, or read over and reported."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from pairing.slide import DamagedTile, open_slide
from tests.pairing.slides import picture, pyramid


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
