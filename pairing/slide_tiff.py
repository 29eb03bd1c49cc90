"""TIFF slides: which series of the file is the slide, its levels, and its pixel size."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

from tifffile import TiffFile, TiffFileError, TiffPage, TiffPageSeries

from pairing.slide_sources import TiffLevel, square_mpp
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
_NOT_THE_SLIDE = re.compile(r"(label|macro|thumbnail|overview)( image)?", re.IGNORECASE)
# Compressions and flavours that OpenSlide reads right and plain TIFF decoding doesn't: JPEG-2000
# whose YCbCr is not marked as such (Aperio 33003), and vendors' tile layouts.
_APERIO_YCBCR = 33003
_PHOTOMETRICS = {1: "grey", 2: "RGB", 6: "YCbCr"}


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Around the parsing of a TIFF: what is cut or broken becomes a BadInput that names it."""
    try:
        yield
    except TiffFileError as error:
        raise BadInput(
            path,
            expected="a whole TIFF file",
            found=str(error),
            remedy="check that the file was copied whole",
        ) from error


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
    with _whole(path), TiffFile(path, is_ome=is_ome) as file:
        page = file.pages.first
        if file.is_philips or file.is_bif or file.is_ndpi or file.is_scn:
            yield None
            return
        if page.compression == _APERIO_YCBCR:
            yield None
            return
        file.filehandle.set_lock(True)
        ome = _ome_images(path, file) if file.is_ome and not first_plane else []
        index = _index_of_slide(path, file)
        series = file.series[index]
        keyframe = series.keyframe
        if keyframe.photometric not in _PHOTOMETRICS:
            raise BadInput(
                path,
                expected=f"pixels as one of {', '.join(_PHOTOMETRICS.values())}",
                found=f"TIFF photometric {keyframe.photometric!r}",
                remedy="export the slide as RGB",
            )
        blank = 255 if keyframe.photometric != 1 else 0
        levels = [
            TiffLevel(path, i, _checked(path, level), blank)
            for i, level in enumerate(series.levels)
        ]
        mpp = None
        if want_mpp:
            mpp = _ome_mpp(path, ome[index]) if index < len(ome) else None
            if mpp is None and file.is_svs:
                mpp = _aperio_mpp(keyframe.description)
            if mpp is None:
                mpp = _resolution_mpp(path, keyframe)
        yield levels, mpp


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
    if order not in {"YX", "YXS", "SYX", "CYX", "IYX", "QYX"} or None in level.pages:
        raise BadInput(
            path,
            expected="one plane: YX, YXS, SYX or CYX",
            found=f"axes {level.axes} of size {'x'.join(map(str, level.shape))}",
            remedy="export one focal plane and one time point of the slide",
        )
    return level


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
