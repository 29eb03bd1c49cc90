"""TIFF slides: which series of the file is the slide, its levels, and its pixel size."""

from __future__ import annotations

import logging
import math
import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from tifffile import (
    COMPRESSION,
    PHOTOMETRIC,
    TIFF,
    TiffFile,
    TiffFileError,
    TiffPage,
    TiffPageSeries,
)

from pairing.slide_sources import square_mpp
from pairing.slide_tiff_level import TiffLevel, is_alpha
from shards.errors import BadInput

# µm per unit; the units of OME's UnitsLength that a microscope's file may use.
_UM_PER = {
    "pm": 1e-6,
    "Å": 1e-4,
    "nm": 1e-3,
    "µm": 1.0,
    "μm": 1.0,  # Greek mu, as some writers spell it
    "um": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "in": 25400.0,
}
# TIFF's ResolutionUnit: 2 is inch, 3 is centimetre; 1 has no physical meaning.
_UM_PER_RESOLUTION_UNIT = {2: 25400.0, 3: 10000.0}
# XResolution is often a printer's (72 or 300 per inch: 353 and 85 µm) and is believed only where
# a microscope could have made it.
_PLAUSIBLE_MPP = (0.05, 20.0)
_NOT_THE_SLIDE = re.compile(
    r"(slide[ _-]?)?(label|macro|thumbnail|overview|barcode)([ _-]?(image|picture))?",
    re.IGNORECASE,
)
_PHOTOMETRICS = {
    PHOTOMETRIC.MINISBLACK: "grey",
    PHOTOMETRIC.RGB: "RGB",
    PHOTOMETRIC.YCBCR: "YCbCr by JPEG",
}
# Of these the decoder makes RGB; Aperio's 33005 is RGB whatever its photometric tag says.
_YCBCR_DECODED = {
    COMPRESSION.OJPEG,
    COMPRESSION.JPEG,
    COMPRESSION.JPEG_2000_LOSSY,
    COMPRESSION.APERIO_JP2000_RGB,
}
# A H&E of 16 bits shows glass near their upper end. One whose brightest pixel stays below a
# quarter of it holds 8 to 14 bits and doesn't say so.
_SHARE_OF_WHITE = 0.25


# What parsing raises where tags or descriptions are broken.
_PARSE_ERRORS = (
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    EOFError,
    RecursionError,
    struct.error,
    ElementTree.ParseError,
)

# Its warnings quote tags and descriptions, which hold names and dates of patients and scans; what
# is wrong with a slide is said by the errors here, which quote nothing.
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)


@contextmanager
def _parsed(path: Path) -> Iterator[None]:
    """Around the parsing of a TIFF: what is cut or broken becomes a BadInput that names it."""
    try:
        yield
    except BadInput:
        raise
    except TiffFileError as error:
        found = str(error)
    except _PARSE_ERRORS as error:
        found = f"tags or a description that cannot be read ({type(error).__name__})"
    else:
        return
    # Not with the error as its cause: that may quote what the tags say.
    raise BadInput(
        path,
        expected="a whole TIFF file",
        found=found,
        remedy="check that the file was copied whole",
    )


@contextmanager
def open_tiff(
    path: Path, *, want_mpp: bool, first_plane: bool = False
) -> Iterator[tuple[list[TiffLevel], float | None] | None]:
    """Levels of the slide in a TIFF, finest first, and its pixel size (None where not said).

    None where OpenSlide should read the file instead. `first_plane` believes no OME description.
    Raises BadInput on files that hold no single slide.
    """
    # With is_ome=None tifffile finds out for itself.
    is_ome = False if first_plane else None
    with ExitStack() as stack:
        with _parsed(path):
            file = stack.enter_context(TiffFile(path, is_ome=is_ome))
            found = _levels_and_mpp(path, file, want_mpp=want_mpp, first_plane=first_plane)
        yield found


def _levels_and_mpp(
    path: Path, file: TiffFile, *, want_mpp: bool, first_plane: bool
) -> tuple[list[TiffLevel], float | None] | None:
    page = file.pages.first
    if file.is_philips or file.is_bif or file.is_ndpi or file.is_scn:
        return None
    # JPEG-2000 whose YCbCr is not marked as such: OpenSlide knows, a plain decoder doesn't.
    if page.compression == COMPRESSION.APERIO_JP2000_YCBC:
        return None
    file.filehandle.set_lock(True)
    ome = _ome_images(path, file) if file.is_ome and not first_plane else []
    index = _index_of_slide(path, file)
    series = file.series[index]
    keyframe = series.keyframe
    _check_pixels(path, keyframe)
    white = None if first_plane else _white(ome[index] if index < len(ome) else None, series)
    levels = [
        TiffLevel(
            path,
            i,
            _checked(path, level),
            blank=_blank(keyframe, white),
            white=white,
            has_alpha=_has_alpha(series),
        )
        for i, level in enumerate(series.levels)
    ]
    if white is not None:
        _check_white(path, levels[-1], white)
    mpp = None
    if want_mpp:
        mpp = _ome_mpp(path, ome[index]) if index < len(ome) else None
        if mpp is None and file.is_svs:
            mpp = _aperio_mpp(keyframe.description)
        if mpp is None:
            mpp = _resolution_mpp(path, keyframe)
    return levels, mpp


def _index_of_slide(path: Path, file: TiffFile) -> int:
    """The first series that is not by name a label, macro or thumbnail picture."""
    for index, series in enumerate(file.series):
        if not _NOT_THE_SLIDE.fullmatch(series.name.strip()):
            return index
    raise BadInput(
        path,
        expected="a slide",
        found=f"only {', '.join(s.name for s in file.series)}",
        remedy="export the slide itself; label and macro pictures are never read",
    )


def _checked(path: Path, level: TiffPageSeries) -> TiffPageSeries:
    """The level, where it is one plane of pixels with channels; BadInput on stacks and series."""
    axes = [(a, n) for a, n in zip(level.axes, level.shape, strict=True) if a in "YX" or n > 1]
    order = "".join(a for a, _ in axes)
    orders = {"YX", "YXS", "SYX", "CYX", "IYX", "QYX"}
    if order not in orders or None in level.pages or 0 in level.shape:
        raise BadInput(
            path,
            expected="one plane: YX, YXS, SYX or CYX",
            found=f"axes {level.axes} of size {'x'.join(map(str, level.shape))}",
            remedy="export one focal plane and one time point of the slide",
        )
    return level


def _check_pixels(path: Path, page: TiffPage) -> None:
    """That pixels are ours to decode: otherwise every tile would look damaged, or wrong colours."""
    found = None
    if page.photometric not in _PHOTOMETRICS:
        found = f"photometric {getattr(page.photometric, 'name', page.photometric)}"
    elif page.photometric == PHOTOMETRIC.YCBCR and page.compression not in _YCBCR_DECODED:
        found = f"YCbCr by {getattr(page.compression, 'name', page.compression)}"
    elif page.compression != COMPRESSION.NONE and page.compression not in TIFF.DECOMPRESSORS:
        found = f"compression {page.compression!r}"
    elif page.dtype is None or np.dtype(page.dtype) not in (np.uint8, np.uint16):
        found = f"pixels of type {page.dtype}, {page.bitspersample} bits"
    if found is not None:
        raise BadInput(
            path,
            expected=f"8 or 16 bit pixels as one of {', '.join(_PHOTOMETRICS.values())}",
            found=found,
            remedy="export the slide as RGB of 8 bits, with JPEG, JPEG-2000, LZW or deflate",
        )


def _n_channels(series: TiffPageSeries) -> int:
    return len(series.pages) * int(series.keyframe.samplesperpixel)


def _has_alpha(series: TiffPageSeries) -> bool:
    key = series.keyframe
    return is_alpha(key.photometric, _n_channels(series), np.dtype(key.dtype))


def _white(pixels: ElementTree.Element | None, series: TiffPageSeries) -> int | None:
    """The value that becomes 255 where RGB of more than 8 bits is read as 8; None for the rest.

    It is the largest of OME's SignificantBits, where the file states them, else of TIFF's
    BitsPerSample: what the file says, never the picture's own maximum.
    """
    n_colours = _n_channels(series) - _has_alpha(series)
    if n_colours != 3 or np.dtype(series.keyframe.dtype) == np.uint8:
        return None
    stated = None if pixels is None else pixels.get("SignificantBits")
    n_bits = int(stated) if stated else int(series.keyframe.bitspersample)
    return (1 << n_bits) - 1


def _blank(page: TiffPage, white: int | None) -> int:
    """Tiles that are not in the file are white glass, black in fluorescence."""
    if white is not None:
        return white
    return 0 if page.photometric == PHOTOMETRIC.MINISBLACK else 255


def _check_white(path: Path, coarsest: TiffLevel, white: int) -> None:
    width, height = coarsest.size_px
    x, y = max(0, width // 2 - 1024), max(0, height // 2 - 1024)
    middle = coarsest.read_inside((x, y, min(x + 2048, width), min(y + 2048, height)), [])
    brightest = int(middle.max())
    if brightest < 255 * _SHARE_OF_WHITE:
        raise BadInput(
            path,
            expected=f"RGB that uses the {white.bit_length()} bits that the file states",
            found=f"nothing brighter than {brightest / 255:.1%} of them",
            remedy="export the slide with 8 bits, or with its true SignificantBits in the OME-XML",
        )


def _ome_images(path: Path, file: TiffFile) -> list[ElementTree.Element]:
    """The `Pixels` of every image that the OME description names."""
    images = ElementTree.fromstring(file.ome_metadata or "").findall("{*}Image/{*}Pixels")
    for image in images:
        files = {u.get("FileName") for u in image.findall("{*}TiffData/{*}UUID")} - {None}
        if len(files) > 1:
            raise BadInput(
                path,
                expected="a slide in one file",
                found=f"an image that is spread over {len(files)} files",
                remedy='for a Xenium morphology image give image = "morphology" instead of slide',
            )
    return images


def _ome_mpp(path: Path, pixels: ElementTree.Element) -> float | None:
    sizes = []
    for axis in ("X", "Y"):
        value = pixels.get(f"PhysicalSize{axis}")
        um_per_unit = _UM_PER.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        # Units like "pixel" and "reference frame" are no physical size.
        if value is None or um_per_unit is None or not float(value) > 0:
            return None
        sizes.append(float(value) * um_per_unit)
    return square_mpp(path, sizes[0], sizes[1])


def _aperio_mpp(description: str) -> float | None:
    found = re.search(r"\|\s*MPP\s*=\s*([0-9.]+)", description)
    return float(found.group(1)) if found and float(found.group(1)) > 0 else None


def _resolution_mpp(path: Path, page: TiffPage) -> float | None:
    unit = _UM_PER_RESOLUTION_UNIT.get(page.tags.valueof(296, 2))
    sizes = []
    for tag in (282, 283):  # XResolution, YResolution: pixels per unit, as a fraction
        numerator, denominator = page.tags.valueof(tag, (0, 1))
        if unit is None or numerator == 0 or denominator == 0:
            return None
        sizes.append(unit * denominator / numerator)
    low, high = _PLAUSIBLE_MPP
    if not all(math.isfinite(s) and low <= s <= high for s in sizes):
        return None
    return square_mpp(path, sizes[0], sizes[1])
