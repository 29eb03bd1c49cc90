"""What other tools and people look at: GeoJSON for QuPath, and a picture of slide and nuclei."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely
from PIL import Image, ImageDraw

from pairing.slide import Slide

_OVERVIEW_PX = 1200
_ZOOM_UM = 120.0
_ZOOM_PX = 480
_GAP_PX = 8
_OUTLINE_RGB = (0, 230, 60)
_FRAME_RGB = (255, 200, 0)


def nuclei_geojson(nuclei: pa.Table) -> str:
    """A GeoJSON FeatureCollection of outlines in level-0 pixels, as QuPath imports detections."""
    polygons = shapely.from_wkb(nuclei["polygon_px"].to_pylist())
    features = [
        {
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
        for row, polygon in zip(
            nuclei.select(["nucleus_id", "area_um2", "score"]).to_pylist(), polygons, strict=True
        )
    ]
    return json.dumps({"type": "FeatureCollection", "features": features})


def overview_picture(slide: Slide, nuclei: pa.Table) -> Image.Image:
    """The slide with all outlines, and beside it three places in detail, with and without.

    The places are squares of 120 µm where nuclei are very dense, dense and of middling density.
    """
    polygons = shapely.from_wkb(nuclei["polygon_px"].to_pylist())
    width, height = slide.size_px
    overview_mpp = max(width, height) * slide.mpp / _OVERVIEW_PX
    overview = _outlined(slide, polygons, (0.0, 0.0), (width * slide.mpp, height * slide.mpp),
                         overview_mpp)  # fmt: skip
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
        page.paste(_outlined(slide, polygons[:0], place, size_um, zoom_mpp), (x, y))
        page.paste(
            _outlined(slide, polygons, place, size_um, zoom_mpp), (x + _ZOOM_PX + _GAP_PX, y)
        )
    return page


def _outlined(
    slide: Slide,
    polygons_px: npt.NDArray[np.object_],
    origin_um: tuple[float, float],
    size_um: tuple[float, float],
    mpp: float,
) -> Image.Image:
    x0, y0 = (round(v / mpp) for v in origin_um)
    width, height = (round(v / mpp) for v in size_um)
    picture = Image.fromarray(slide.read_at((x0, y0, x0 + width, y0 + height), mpp))
    draw = ImageDraw.Draw(picture)
    scale = slide.mpp / mpp
    corner, far = np.array([x0, y0]) / scale, np.array([x0 + width, y0 + height]) / scale
    seen = shapely.box(corner[0], corner[1], far[0], far[1])
    for polygon in polygons_px[shapely.intersects(polygons_px, seen)]:
        ring = shapely.get_coordinates(polygon) * scale - (x0, y0)
        draw.line(
            [(float(x), float(y)) for x, y in ring], fill=_OUTLINE_RGB, width=1 if mpp > 0.5 else 2
        )
    return picture


def _places_um(slide: Slide, nuclei: pa.Table) -> list[tuple[float, float]]:
    """Upper left corners of squares at the 95th, 75th and 50th percentile of nuclei a square."""
    x_um = nuclei["x_px"].to_numpy() * slide.mpp
    y_um = nuclei["y_px"].to_numpy() * slide.mpp
    cells = np.column_stack([x_um // _ZOOM_UM, y_um // _ZOOM_UM]).astype(np.int64)
    corners, n_nuclei = np.unique(cells, axis=0, return_counts=True)
    order = np.argsort(n_nuclei, kind="stable")
    ranks = sorted({round(q * (len(order) - 1)) for q in (0.95, 0.75, 0.5)} if len(order) else [])
    return [
        (float(corners[order[r], 0] * _ZOOM_UM), float(corners[order[r], 1] * _ZOOM_UM))
        for r in reversed(ranks)
    ]
