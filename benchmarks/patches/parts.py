"""What no way of cutting patches can do without, each alone; and crops that are cut one by one."""
# mypy: disable-error-code=no-untyped-call
# zarr and spatialdata have few types.

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import dask.array
import numpy as np
import simplejpeg
import spatialdata
import tifffile
import zarr
from spatialdata.models import Image2DModel

from benchmarks.patches.slides import MPP, SPEC, Rgb
from pairing.geometry import Points

SIDE_PX = SPEC.fov_um / MPP


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of processor time."""

    decode_s: float
    resize_s: float
    encode_s: float

    @property
    def total_s(self) -> float:
        return self.decode_s + self.resize_s + self.encode_s


def parts_alone(path: Path, image: Rgb, centres_px: Points) -> tuple[Parts, int]:
    """Every tile under a patch decoded once, every patch resized once by OpenCV, encoded once.

    The pixels to resize lie in memory. Also the number of the tiles.
    """
    cv2.setNumThreads(1)
    started = time.process_time()
    n_tiles = decode_tiles(path, centres_px)
    decode_s = time.process_time() - started
    resize_s = encode_s = 0.0
    for x, y in (centres_px - SIDE_PX / 2).round().astype(int).tolist():
        crop = crop_of(image, x, y)
        started = time.process_time()
        patch = resized(crop)
        between = time.process_time()
        encoded(patch)
        encode_s += time.process_time() - between
        resize_s += between - started
    return Parts(decode_s, resize_s, encode_s), n_tiles


def decode_tiles(path: Path, centres_px: Points) -> int:
    """Decode the tiles of level 0 that patches lie on by tifffile's own decoder, once each."""
    with tifffile.TiffFile(path) as file:
        page = file.series[0].levels[0].keyframe
        tile_px = (page.tilewidth, page.tilelength)
        across = -(-page.imagewidth // page.tilewidth)
        touched = set()
        last = np.array([page.imagewidth, page.imagelength]) - 1
        for dx in (-1, 0, 1):
            for dy in (-1, 0, 1):
                points = (centres_px + np.array([dx, dy]) * SIDE_PX / 2).clip(0, last)
                column, row = (points // tile_px).astype(int).T
                touched |= set((row * across + column).tolist())
        for index in sorted(touched):
            file.filehandle.seek(page.dataoffsets[index])
            data = file.filehandle.read(page.databytecounts[index])
            page.decode(data, index, jpegtables=page.jpegtables)
    return len(touched)


def crop_of(source: Any, x: int, y: int) -> Any:
    n = round(SIDE_PX)
    return source[max(y, 0) : y + n, max(x, 0) : x + n]


def resized(crop: Any) -> Rgb:
    size = (SPEC.size_px, SPEC.size_px)
    patch: Rgb = cv2.resize(crop, size, interpolation=cv2.INTER_CUBIC)
    return patch


def encoded(patch: Rgb) -> bytes:
    jpeg: bytes = simplejpeg.encode_jpeg(
        patch, quality=SPEC.jpeg_quality, colorspace="RGB", colorsubsampling="420"
    )
    return jpeg


def by_tifffile(path: Path, centres_px: Points) -> float:
    """Milliseconds a patch: a region of tifffile's zarr store, resized and encoded."""
    with tifffile.imread(path, aszarr=True, series=0, level=0) as store:
        level = zarr.open(store, mode="r")
        return _each(lambda x, y: np.asarray(crop_of(level, x, y)), centres_px)


def by_spatialdata(path: Path, centres_px: Points) -> float:
    """Milliseconds a patch: a bounding box query of the image, lazily of its tiles."""
    with tifffile.imread(path, aszarr=True, series=0, level=0) as store:
        lazy = dask.array.from_zarr(zarr.open(store, mode="r"))
        image = Image2DModel.parse(dask.array.moveaxis(lazy, 2, 0), dims=("c", "y", "x"))

        def crop(x: int, y: int) -> Any:
            n = round(SIDE_PX)
            found = spatialdata.bounding_box_query(
                image, axes=("x", "y"), min_coordinate=[max(x, 0), max(y, 0)],
                max_coordinate=[x + n, y + n], target_coordinate_system="global",
            )  # fmt: skip
            return np.ascontiguousarray(np.moveaxis(found.data.compute(), 0, 2))

        return _each(crop, centres_px)


def _each(crop: Any, centres_px: Points) -> float:
    started = time.perf_counter()
    for x, y in (centres_px - SIDE_PX / 2).round().astype(int).tolist():
        encoded(resized(crop(x, y)))
    return (time.perf_counter() - started) / len(centres_px) * 1000
