"""Open a whole-slide image; read regions by level or by mpp.

TIFF (OME-TIFF, plain tiled TIFF, SVS) goes through tifffile, other vendor formats through
OpenSlide, and PNG and JPEG pictures through Pillow. Of a file only its slide is read: label,
macro and thumbnail pictures never are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pairing.slide_damage import Damage
from pairing.slide_image import Slide
from pairing.slide_levels import Level, foreign_levels
from pairing.slide_sources import (
    ArrayLevel,
    DamagedTile,
    OpenSlideLevel,
    Source,
    open_vendor,
    vendor_mpp,
)
from pairing.slide_tiff import open_tiff
from shards.errors import BadInput

__all__ = ["Damage", "DamagedTile", "Level", "Slide", "open_plane", "open_slide"]

TIFF_SUFFIXES = {".tif", ".tiff", ".svs", ".btf", ".tf8"}
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg"}


@contextmanager
def open_slide(path: Path, *, mpp: float | None = None) -> Iterator[Slide]:
    """Open a slide for reading.

    `mpp` overrules knowingly what the file says about its pixel size. Raises BadInput where the
    file is missing, unreadable, not one slide, or says no usable pixel size and none is given.
    """
    path = Path(path)
    _check_exists(path)
    with _open_sources(path, want_mpp=mpp is None) as (sources, found):
        file = path.stat()
        foreign = partial(_foreign_levels, path.absolute(), file.st_size, file.st_mtime_ns)
        yield Slide(path, _checked_mpp(path, mpp, found), sources, find_foreign=foreign)


@contextmanager
def _open_sources(path: Path, *, want_mpp: bool) -> Iterator[tuple[Sequence[Source], float | None]]:
    with ExitStack() as stack:
        suffix = path.suffix.lower()
        if suffix in TIFF_SUFFIXES:
            tiff = stack.enter_context(open_tiff(path, want_mpp=want_mpp))
            if tiff is not None:
                yield tiff
                return
        elif suffix in PICTURE_SUFFIXES:
            yield [ArrayLevel(_read_picture(path))], None
            return
        file = stack.enter_context(open_vendor(path))
        levels = [OpenSlideLevel(path, i, file) for i in range(file.slide.level_count)]
        yield levels, vendor_mpp(path, file.slide) if want_mpp else None


@lru_cache(maxsize=256)
def _foreign_levels(path: Path, n_bytes: int, mtime_ns: int) -> dict[int, str]:
    """Levels of a file that show another picture; remembered, as slides open for every block."""
    with _open_sources(path, want_mpp=False) as (sources, _):
        return foreign_levels(sources)


@contextmanager
def open_plane(path: Path, *, mpp: float) -> Iterator[Slide]:
    """The one plane of a TIFF with its own pyramid, whatever its OME description says.

    For images that are spread over several files, each of which describes them all: read as OME,
    they have the channels but not the pyramid. Filled with 0 outside.
    """
    path = Path(path)
    _check_exists(path)
    with open_tiff(path, want_mpp=False, first_plane=True) as tiff:
        if tiff is None or tiff[0][0].n_channels != 1:
            raise BadInput(
                path,
                expected="a TIFF of one plane",
                found="a vendor's slide format" if tiff is None else "several planes",
                remedy="give the file that the instrument wrote",
            )
        yield Slide(path, mpp, tiff[0], fill=0)


def _read_picture(path: Path) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the file's
        raise BadInput(
            path,
            expected="a whole PNG or JPEG picture of at most some 180 million pixels",
            found=str(error),
            remedy="check that the file was copied whole; export large slides as OME-TIFF",
        ) from error


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise BadInput(
            path,
            expected="a slide: one file",
            found="a folder" if path.is_dir() else "nothing",
            remedy="check the path; formats of many files are opened by their main file",
        )


def _checked_mpp(path: Path, given: float | None, found: float | None) -> float:
    if given is not None and not (math.isfinite(given) and given > 0):
        raise BadInput(
            f"mpp for {path}",
            expected="a positive number of µm per pixel",
            found=str(given),
            remedy="look the pixel size up in the scanner's records",
        )
    mpp = given if given is not None else found
    if mpp is None:
        raise BadInput(
            path,
            expected="a pixel size in the file",
            found="none that is usable",
            remedy="give it in µm per level-0 pixel: `mpp = …` of the run in the config, or --mpp",
        )
    return mpp
