"""What other tools and people look at: GeoJSON for QuPath, and a picture of slide and nuclei."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from PIL import Image, ImageDraw

from pairing.slide import Slide

_OVERVIEW_PX = 1200
_ZOOM_UM = 120.0
_ZOOM_PX = 480
_GAP_PX = 8
_OUTLINE_RGB = (0, 230, 60)
_FRAME_RGB = (255, 200, 0)
_MEASURED = ["nucleus_id", "area_um2", "eccentricity", "haematoxylin", "score"]


def write_geojson(out: Path, nuclei: Path) -> None:
    """A GeoJSON FeatureCollection of outlines in level-0 pixels, as QuPath imports detections.

    `nuclei` is a table in NUCLEI_SCHEMA, read and written piece by piece.
    """
    with out.open("w", encoding="utf-8") as file, pq.ParquetFile(nuclei) as table:
        file.write('{"type": "FeatureCollection", "features": [')
        between = "\n"
        for batch in table.iter_batches():
            for feature in _features(batch):
                file.write(between + json.dumps(feature))
                between = ",\n"
        file.write("\n]}\n")


def _features(nuclei: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    polygons = shapely.from_wkb(nuclei["polygon_px"].to_pylist())
    for row, polygon in zip(nuclei.select(_MEASURED).to_pylist(), polygons, strict=True):
        yield {
            "type": "Feature",
            "geometry": {
                "type": "Polygon",
                "coordinates": [np.round(shapely.get_coordinates(polygon), 2).tolist()],
            },
            "properties": {
                "objectType": "detection",
                "classification": {"name": "Nucleus", "color": list(_OUTLINE_RGB)},
                "measurements": row,
            },
        }


def overview_picture(slide: Slide, nuclei: Path) -> Image.Image:
    """The slide with all outlines, and beside it three places in detail, with and without.

    `nuclei` is a table in NUCLEI_SCHEMA. The places are squares of 120 µm where nuclei are very
    dense, dense and of middling density.
    """
    width, height = slide.size_px
    overview_mpp = max(width, height) * slide.mpp / _OVERVIEW_PX
    size_um = (width * slide.mpp, height * slide.mpp)
    overview = _outlined(slide, nuclei, (0.0, 0.0), size_um, overview_mpp)
    places = _places_um(slide, nuclei)
    zoom_mpp = _ZOOM_UM / _ZOOM_PX
    draw = ImageDraw.Draw(overview)
    for x_um, y_um in places:
        box_um = np.array([x_um, y_um, x_um + _ZOOM_UM, y_um + _ZOOM_UM])
        draw.rectangle([float(v) for v in box_um / overview_mpp], outline=_FRAME_RGB, width=2)
    column_px = 2 * _ZOOM_PX + _GAP_PX
    page = Image.new(
        "RGB",
        (
            overview.width + _GAP_PX + column_px,
            max(overview.height, len(places) * (_ZOOM_PX + _GAP_PX)),
        ),
        "white",
    )
    page.paste(overview, (0, 0))
    for i, place in enumerate(places):
        y, x = i * (_ZOOM_PX + _GAP_PX), overview.width + _GAP_PX
        size_um = (_ZOOM_UM, _ZOOM_UM)
        page.paste(_outlined(slide, None, place, size_um, zoom_mpp), (x, y))
        page.paste(_outlined(slide, nuclei, place, size_um, zoom_mpp), (x + _ZOOM_PX + _GAP_PX, y))
    return page


def _outlined(
    slide: Slide,
    nuclei: Path | None,
    origin_um: tuple[float, float],
    size_um: tuple[float, float],
    mpp: float,
) -> Image.Image:
    x0, y0 = (round(v / mpp) for v in origin_um)
    width, height = (max(1, round(v / mpp)) for v in size_um)
    picture = Image.fromarray(slide.read_at((x0, y0, x0 + width, y0 + height), mpp))
    draw = ImageDraw.Draw(picture)
    scale = slide.mpp / mpp
    corner, far = np.array([x0, y0]) / scale, np.array([x0 + width, y0 + height]) / scale
    line_px = 1 if mpp > 0.5 else 2
    for polygons in _polygons_between(nuclei, corner, far) if nuclei else ():
        for polygon in polygons:
            ring = shapely.get_coordinates(polygon) * scale - (x0, y0)
            draw.line([(float(x), float(y)) for x, y in ring], fill=_OUTLINE_RGB, width=line_px)
    return picture


def _polygons_between(
    nuclei: Path, corner_px: npt.NDArray[np.float64], far_px: npt.NDArray[np.float64]
) -> Iterator[npt.NDArray[np.object_]]:
    """Outlines that reach into a box, some at a time."""
    seen = shapely.box(*corner_px, *far_px)
    with pq.ParquetFile(nuclei) as table:
        for batch in table.iter_batches(columns=["polygon_px"]):
            polygons = shapely.from_wkb(batch["polygon_px"].to_pylist())
            yield polygons[shapely.intersects(polygons, seen)]


def _places_um(slide: Slide, nuclei: Path) -> list[tuple[float, float]]:
    """Upper left corners of squares at the 95th, 75th and 50th percentile of nuclei a square."""
    table = pq.read_table(nuclei, columns=["x_px", "y_px"])
    x_um, y_um = (table[name].to_numpy() * slide.mpp for name in ("x_px", "y_px"))
    cells = np.column_stack([x_um // _ZOOM_UM, y_um // _ZOOM_UM]).astype(np.int64)
    corners, n_nuclei = np.unique(cells, axis=0, return_counts=True)
    order = np.argsort(n_nuclei, kind="stable")
    ranks = sorted({round(q * (len(order) - 1)) for q in (0.95, 0.75, 0.5)} if len(order) else [])
    return [
        (float(corners[order[r], 0] * _ZOOM_UM), float(corners[order[r], 1] * _ZOOM_UM))
        for r in reversed(ranks)
    ]
