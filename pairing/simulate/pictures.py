"""OME-TIFF pyramids, smaller levels in SubIFDs, written a row of tiles at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np
import numpy.typing as npt
import tifffile

from pairing.simulate.section import Plane

_HE_TILE, _MORPHOLOGY_TILE = 512, 1024
_BIG_BYTES = 2**31  # of pixels: from here on TIFF's 32-bit offsets may not do


@dataclass(frozen=True, slots=True)
class ChannelFile:
    """One file of a picture whose channels are files of their own."""

    channel: str
    name: str  # of the file
    uuid: str


def write_he(
    path: Path,
    source: Plane,
    mpp: float,
    compression: Literal["jpeg", "jpeg2000"] = "jpeg",
    quality: int = 90,
) -> None:
    """(Y, X, 3) uint8 RGB as a scanner's slide: tiles of 512 px, pixel size in the OME-XML.

    `quality` is JPEG's from 1 to 100, or the peak signal-to-noise ratio in dB of JPEG-2000.
    """
    channels = ['<Channel ID="Channel:0:0" SamplesPerPixel="3"/>']
    description = _ome_xml(path.name, source, mpp, channels, n_samples=3)
    options = {
        "photometric": "rgb",
        "compression": compression,
        "compressionargs": {"level": quality},
    }
    _write_pyramids(path, [source], description, _HE_TILE, options)


def write_morphology(
    path: Path,
    planes: Sequence[Plane],
    mpp: float,
    *,
    z_step_um: float | None = None,
    files: Sequence[ChannelFile] = (),
) -> None:
    """(Y, X) uint16 as the instrument's morphology images: lossless JPEG-2000, tiles of 1024 px.

    One plane of DAPI, or a z-stack of it with its `z_step_um`. With `files`, the plane is that one
    of them with the name of `path`, and the OME-XML tells of all of them, as in every file of
    `morphology_focus/`: a reader that follows it finds every channel from any of the files.
    """
    names = [file.channel for file in files] or ["DAPI"]
    channels = [
        f'<Channel ID="Channel:{i}" Name={quoteattr(name)} SamplesPerPixel="1"/>'
        for i, name in enumerate(names)
    ]
    description = _ome_xml(
        path.name, planes[0], mpp, channels, n_z=len(planes), z_step_um=z_step_um, files=files
    )
    options = {
        "photometric": "minisblack",
        "compression": "jpeg2000",
        "compressionargs": {"reversible": True, "level": 0},
    }
    _write_pyramids(path, planes, description, _MORPHOLOGY_TILE, options)


def _write_pyramids(
    path: Path, planes: Sequence[Plane], description: str, tile: int, options: dict[str, Any]
) -> None:
    n_bytes = sum(int(np.prod(p.shape)) * np.dtype(p.dtype).itemsize for p in planes)
    with tifffile.TiffWriter(path, ome=False, bigtiff=n_bytes > _BIG_BYTES) as tiff:
        for number, plane in enumerate(planes):
            text = description.encode() if number == 0 else None
            _write_pyramid(tiff, path.parent, plane, text, tile, options)


def _write_pyramid(
    tiff: tifffile.TiffWriter,
    folder: Path,
    plane: Plane,
    description: bytes | None,
    tile: int,
    options: dict[str, Any],
) -> None:
    """Each level is halved into a scratch file in `folder` while it is written."""
    shapes = [plane.shape]
    while max(shapes[-1][:2]) > tile and min(shapes[-1][:2]) > 1:
        height, width = shapes[-1][:2]
        shapes.append((height // 2, width // 2, *plane.shape[2:]))
    with tempfile.TemporaryDirectory(prefix=".levels-", dir=folder) as scratch:
        level: Plane = plane
        for number, shape in enumerate(shapes):
            half: npt.NDArray[Any] | None = None
            if number + 1 < len(shapes):
                half = np.memmap(
                    Path(scratch) / str(number + 1), plane.dtype, "w+", shape=shapes[number + 1]
                )
            tiff.write(
                _tiles(level, tile, half),
                shape=shape,
                dtype=plane.dtype,
                tile=(tile, tile),
                metadata=None,
                description=description if number == 0 else None,
                subifds=len(shapes) - 1 if number == 0 else None,
                subfiletype=0 if number == 0 else 1,
                # The bytes are the same with any number of them.
                maxworkers=os.cpu_count(),
                buffersize=64 << 20,
                **options,
            )
            if half is not None:
                level = half


def _tiles(level: Plane, tile: int, half: npt.NDArray[Any] | None) -> Iterator[npt.NDArray[Any]]:
    """Whole tiles, row by row; fills `half` with the means of squares of four pixels."""
    height, width = level.shape[:2]
    # Beyond the border the last pixel goes on, as black would shine through JPEG's blocks.
    beyond = [(0, -height % tile), (0, -width % tile), (0, 0)][: len(level.shape)]
    for y in range(0, height, tile):
        band = np.asarray(level[y : y + tile])
        if half is not None:
            even = band[: len(band) // 2 * 2, : width // 2 * 2]
            size = (even.shape[1] // 2, even.shape[0] // 2)
            if size[1]:
                half[y // 2 : y // 2 + size[1]] = cv2.resize(
                    even, size, interpolation=cv2.INTER_AREA
                )
        padding = [(0, tile - len(band)), *beyond[1:]]
        padded = np.pad(band, padding, mode="edge")
        for x in range(0, width, tile):
            yield np.ascontiguousarray(padded[:, x : x + tile])


def _ome_xml(
    name: str,
    image: Plane,
    mpp: float,
    channels: Sequence[str],
    *,
    n_samples: int = 1,
    n_z: int = 1,
    z_step_um: float | None = None,
    files: Sequence[ChannelFile] = (),
) -> str:
    """Written here and not by tifffile, so that the same picture gives the same bytes."""
    height, width = image.shape[:2]
    n_channels = n_samples * len(channels)
    z = "" if z_step_um is None else f' PhysicalSizeZ="{z_step_um}" PhysicalSizeZUnit="µm"'
    own = "".join(f" UUID={quoteattr(f.uuid)}" for f in files if f.name == name)
    places = [
        f'<TiffData FirstZ="0" FirstT="0" FirstC="{i}" PlaneCount="1">'
        f"<UUID FileName={quoteattr(file.name)}>{file.uuid}</UUID></TiffData>"
        for i, file in enumerate(files)
    ] or [f'<TiffData IFD="0" PlaneCount="{n_z}"/>']
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"'
        ' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"'
        ' xsi:schemaLocation="http://www.openmicroscopy.org/Schemas/OME/2016-06'
        f' http://www.openmicroscopy.org/Schemas/OME/2016-06/ome.xsd"{own}>'
        f'<Image ID="Image:0" Name={quoteattr(name)}>'
        f'<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="{np.dtype(image.dtype).name}"'
        f' SizeX="{width}" SizeY="{height}" SizeZ="{n_z}" SizeC="{n_channels}" SizeT="1"'
        f' PhysicalSizeX="{mpp:.6g}" PhysicalSizeXUnit="µm"'
        f' PhysicalSizeY="{mpp:.6g}" PhysicalSizeYUnit="µm"{z}>'
        f"{''.join(channels)}{''.join(places)}</Pixels></Image></OME>"
    )
