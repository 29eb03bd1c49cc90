"""Small slides of every shape, written for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

WIDTH, HEIGHT = 150, 97
MPP = 0.25


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
    """An OME-TIFF that states its pixel size."""
    sizes = {"PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
    metadata = {"axes": axes, **sizes, **options.pop("metadata", {})}
    tifffile.imwrite(path, data, ome=True, metadata=metadata, **options)
    return path


RGB = picture()
GREY: dict[str, Any] = {"photometric": "minisblack"}
TILED: dict[str, Any] = {"tile": (32, 48)}
RESOLUTION: dict[str, Any] = {"resolution": (1e4 / MPP, 1e4 / MPP), "resolutionunit": "CENTIMETER"}


def plain(path: Path, data: Any, **options: Any) -> Path:
    """A TIFF that states its pixel size by its resolution alone."""
    tifffile.imwrite(path, data, metadata=None, **RESOLUTION, **options)
    return path


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


def tissue(height: int, width: int, seed: int = 0) -> Any:
    """(Y, X, 3) uint8 as dark and as varied as stained tissue; nowhere black, nowhere glass."""
    return (picture(height, width, seed=seed) * 0.6 + 40).astype(np.uint8)


def place_of(path: Path, tile: int, level: int = 0) -> tuple[int, int]:
    """Offset and number of bytes of a tile, by its number in the level."""
    with tifffile.TiffFile(path) as file:
        page = file.series[0].levels[level].pages[0]
        return page.dataoffsets[tile], page.databytecounts[tile]


def spoil(path: Path, tile: int, level: int = 0) -> None:
    """Write garbage over the bytes of a tile."""
    offset, count = place_of(path, tile, level)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff\x00" * (count // 2))


def repoint(path: Path, tile: int, place: tuple[int, int]) -> None:
    """Let the file's table say that a tile of level 0 lies elsewhere; (0, 0) leaves it out."""
    with tifffile.TiffFile(path, mode="r+b") as file:
        for code, value in zip((324, 325), place, strict=True):
            tag = file.pages.first.tags[code]
            values = list(tag.value)
            values[tile] = value
            tag.overwrite(values)


def repeat(path: Path, tile: int, of: int) -> None:
    """Put a second copy of another tile's bytes where a tile was: as faulty writers do."""
    offset, count = place_of(path, of)
    data = path.read_bytes()[offset : offset + count]
    with path.open("ab") as file:
        end = file.tell()
        file.write(data)
    repoint(path, tile, (end, count))
