"""OME-TIFF pyramids: tiled, with the smaller levels in SubIFDs of the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np
import numpy.typing as npt
import tifffile

Image = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


def write_he(path: Path, image: npt.NDArray[np.uint8], mpp: float) -> None:
    """(Y, X, 3) RGB as a scanner's slide: JPEG tiles of 512 px, pixel size in the OME-XML."""
    channels = '<Channel ID="Channel:0:0" SamplesPerPixel="3"/>'
    description = _ome_xml(path.name, image, mpp, channels)
    options = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 90}}
    _write_pyramid(path, image, description, tile=512, options=options)


def write_morphology(path: Path, image: npt.NDArray[np.uint16], mpp: float) -> None:
    """(Y, X) DAPI as in `morphology_focus`: lossless JPEG-2000, tiles of 1024 px."""
    channels = '<Channel ID="Channel:0" Name="DAPI" SamplesPerPixel="1"/>'
    description = _ome_xml(path.name, image, mpp, channels)
    options = {
        "photometric": "minisblack",
        "compression": "jpeg2000",
        "compressionargs": {"reversible": True, "level": 0},
    }
    _write_pyramid(path, image, description, tile=1024, options=options)


def _write_pyramid(
    path: Path, image: Image, description: str, *, tile: int, options: dict[str, Any]
) -> None:
    levels = [image]
    while max(levels[-1].shape[:2]) > tile:
        height, width = levels[-1].shape[:2]
        half = cv2.resize(levels[-1], (width // 2, height // 2), interpolation=cv2.INTER_AREA)
        levels.append(half)  # type: ignore[arg-type]  # cv2 keeps the dtype
    with tifffile.TiffWriter(path, ome=False) as tiff:
        for number, level in enumerate(levels):
            tiff.write(
                level,
                tile=(tile, tile),
                metadata=None,
                description=description.encode() if number == 0 else None,
                subifds=len(levels) - 1 if number == 0 else None,
                subfiletype=0 if number == 0 else 1,
                **options,
            )


def _ome_xml(name: str, image: Image, mpp: float, channels: str) -> str:
    """Written here and not by tifffile, so that the same picture gives the same bytes."""
    height, width = image.shape[:2]
    n_channels = 1 if image.ndim == 2 else image.shape[2]
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"'
        ' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"'
        ' xsi:schemaLocation="http://www.openmicroscopy.org/Schemas/OME/2016-06'
        ' http://www.openmicroscopy.org/Schemas/OME/2016-06/ome.xsd">'
        f'<Image ID="Image:0" Name={quoteattr(name)}>'
        f'<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="{image.dtype.name}"'
        f' SizeX="{width}" SizeY="{height}" SizeZ="1" SizeC="{n_channels}" SizeT="1"'
        f' PhysicalSizeX="{mpp:.6g}" PhysicalSizeXUnit="µm"'
        f' PhysicalSizeY="{mpp:.6g}" PhysicalSizeYUnit="µm">'
        f'{channels}<TiffData IFD="0" PlaneCount="1"/></Pixels></Image></OME>'
    )
