"""A slide as large as its cells need, of real tissue, in the tiles of scanners and of writers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from pairing.geometry import Points
from shards.schema import PatchSpec

Rgb = npt.NDArray[np.uint8]

REAL = Path("slides") / "CMU-1-Small-Region.svs"
# As 10x Genomics' H&E of Xenium sections has them: 0.2738 µm a pixel, tiles of 1024 px.
MPP = 0.2738
SPEC = PatchSpec(image="he", fov_um=56, size_px=224, center="nucleus", jpeg_quality=95)
# Cells a mm²; of Xenium sections of tumours it is 3,000 to 6,000.
DENSITY_PER_MM2 = 3200

WRITERS: dict[str, dict[str, Any]] = {
    "JPEG, tiles of 256": {
        "tile": (256, 256), "compression": "jpeg", "compressionargs": {"level": 85},
    },
    "JPEG-2000, tiles of 1024": {
        "tile": (1024, 1024), "compression": "jpeg2000",
        "compressionargs": {"level": 40, "reversible": False},
    },
}  # fmt: skip


def side_px(n_cells: int) -> int:
    """Of a square slide of so many cells, in whole tiles of 1024."""
    return round(math.sqrt(n_cells / DENSITY_PER_MM2) * 1000 / MPP / 1024) * 1024


def centres(n_cells: int) -> Points:
    """(n, 2) centres in pixels, some of them at the borders."""
    return np.random.default_rng(1).uniform(0, side_px(n_cells), (n_cells, 2))


def picture(shared_data: Path, n_cells: int) -> Rgb:
    """The real region, mirrored at its borders as often as the slide is larger."""
    region = np.asarray(tifffile.imread(shared_data / REAL, key=0), np.uint8)
    side = side_px(n_cells)
    pad = [(0, max(side - n, 0)) for n in region.shape[:2]]
    return np.pad(region, (*pad, (0, 0)), mode="symmetric")[:side, :side]


def write_slide(path: Path, image: Rgb, options: dict[str, Any]) -> Path:
    """An OME-TIFF with a pyramid of quarters, unless it is there."""
    if path.exists():
        return path
    sizes = {"PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
    levels = [image[::4, ::4], image[::16, ::16]]
    aside = path.with_suffix(".partial")
    with tifffile.TiffWriter(aside, ome=True, bigtiff=True) as out:
        out.write(image, subifds=2, metadata={"axes": "YXS", **sizes}, photometric="rgb", **options)
        for level in levels:
            out.write(level, subfiletype=1, metadata=None, photometric="rgb", **options)
    aside.rename(path)
    return path
