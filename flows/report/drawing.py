"""What views are drawn with: pixels of a slide, points and outlines on them, a scale bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import shapely

from flows.report.embed import Rgb, jpeg_uri
from pairing.geometry import Affine, Points
from pairing.patch_grid import as_rgb
from pairing.slide import Slide

_SUBPIXEL_BITS = 4

Colour = tuple[int, int, int]
Polygons = npt.NDArray[np.object_]


@dataclass(frozen=True, slots=True)
class View:
    """One picture: its data URI, what it shows, and a scale bar as a share of its width."""

    title: str
    caption: str
    src: str
    width_px: int
    height_px: int
    bar_um: float
    bar_percent: float


def read_window(
    slide: Slide,
    grey_scale: tuple[float, float] | None,
    centre_px: Points,
    width_um: float,
    width_px: int,
) -> tuple[Rgb, float, Affine, shapely.Polygon]:
    """A square around a place: pixels, their mpp, the way to them, its outline on the slide."""
    mpp = width_um / width_px
    x0, y0 = np.round(centre_px * slide.mpp / mpp - width_px / 2).astype(int).tolist()
    box = (x0, y0, x0 + width_px, y0 + width_px)
    rgb, view_px_from_slide_px = read_pixels(slide, grey_scale, box, mpp)
    return rgb, mpp, view_px_from_slide_px, shapely.box(*(np.array(box) * mpp / slide.mpp))


def read_pixels(
    slide: Slide,
    grey_scale: tuple[float, float] | None,
    box: tuple[int, int, int, int],
    mpp: float,
) -> tuple[Rgb, Affine]:
    """A copy of the `box` of the grid of `mpp`, to be drawn on, and the way to it.

    `grey_scale` holds the intensities that become black and white; None for RGB.
    """
    pixels = slide.read_at(box, mpp)
    moved = Affine.similarity(slide.mpp / mpp, 0.0, (-box[0], -box[1]))
    return np.array(as_rgb(pixels, grey_scale)), moved


def inside(polygons: shapely.STRtree, window: shapely.Polygon) -> Polygons:
    """The polygons that reach into a window, in their order."""
    found: Polygons = polygons.geometries[np.sort(polygons.query(window))]
    return found


def draw_outlines(
    rgb: Rgb,
    polygons: Sequence[shapely.Polygon | shapely.MultiPolygon] | Polygons,
    view_px_from_slide_px: Affine,
    colour: Colour,
    *,
    cased: bool = False,
) -> None:
    """Draw the outer rings of polygons of a slide; `cased` on a dark line."""
    rings = [
        _fixed_point(view_px_from_slide_px(shapely.get_coordinates(shapely.get_exterior_ring(p))))
        for p in shapely.get_parts(np.asarray(polygons, dtype=object))
    ]
    if cased:
        cv2.polylines(rgb, rings, True, (30, 30, 30), 6, cv2.LINE_AA, _SUBPIXEL_BITS)
    cv2.polylines(rgb, rings, True, colour, 2, cv2.LINE_AA, _SUBPIXEL_BITS)


def draw_points(rgb: Rgb, at_px: Points, colour: Colour) -> None:
    """Draw points of the view as dots; `at_px` is not empty."""
    # Dots of about a third of the distance between cells, so that dense tissue stays visible.
    radius_px = float(np.clip(0.3 * np.sqrt(rgb.shape[0] * rgb.shape[1] / len(at_px)), 0.8, 3.0))
    painted = rgb.copy()
    for x, y in _fixed_point(at_px).tolist():
        radius = round(radius_px * 2**_SUBPIXEL_BITS)
        cv2.circle(painted, (x, y), radius, colour, -1, cv2.LINE_AA, _SUBPIXEL_BITS)
    rgb[:] = cv2.addWeighted(painted, 0.75, rgb, 0.25, 0)


def _fixed_point(points_px: Points) -> npt.NDArray[np.int32]:
    # OpenCV's integer coordinates are pixel centres; ours are their upper left corners.
    fixed: npt.NDArray[np.int32] = np.round((points_px - 0.5) * 2**_SUBPIXEL_BITS).astype(np.int32)
    return fixed


def as_view(title: str, caption: str, rgb: Rgb, mpp: float) -> View:
    """The picture with a scale bar of about a quarter of its width."""
    width_um = rgb.shape[1] * mpp
    power = 10.0 ** np.floor(np.log10(width_um / 4))
    bar_um = float(max(step * power for step in (1, 2, 5) if step * power <= width_um / 4))
    return View(
        title=title,
        caption=caption,
        src=jpeg_uri(rgb),
        width_px=rgb.shape[1],
        height_px=rgb.shape[0],
        bar_um=bar_um,
        bar_percent=100 * bar_um / width_um,
    )
