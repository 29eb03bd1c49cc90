"""Cells on the image that the patches are cut from, at three zooms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely

from flows.report.drawing import (
    Colour,
    Polygons,
    View,
    as_view,
    draw_outlines,
    draw_points,
    inside,
    read_pixels,
    read_window,
)
from pairing.geometry import Points
from pairing.slide import Slide

OVERVIEW_PX, ZOOM_PX, CORNER_PX = 900, 840, 420
# A close view spans this many fields of view of a patch, a middle one four times as much.
_CLOSE_FOVS, _MID_CLOSES = 1.75, 4
# More points than this on an overview would only paint it over.
_MAX_POINTS = 20_000

# Told apart on pink and purple, on grey, and by most colour-blind readers.
INSTRUMENT: Colour = (0, 245, 255)
HE_NUCLEUS: Colour = (255, 225, 0)
HE_UNMATCHED: Colour = (255, 128, 0)
PATCH: Colour = (255, 255, 255)
DONOR: Colour = (255, 70, 200)
BEFORE: Colour = (255, 150, 0)


@dataclass(frozen=True, slots=True)
class Scene:
    """What is drawn on an open slide; everything in its level-0 pixels.

    `grey_scale` holds the intensities that become black and white; None for RGB. `cells_px` are
    the centres of all cells, `shown_px` those whose pairs are in the shards, of which the places
    of the close views are chosen. Nuclei are polygons: the instrument's, the H&E's that a cell has,
    and the H&E's that none has. `donors` are the outlines of donors where polygons tell them.
    """

    slide: Slide
    grey_scale: tuple[float, float] | None
    fov_um: float
    cells_px: Points
    shown_px: Points
    instrument_nuclei: shapely.STRtree
    he_matched: shapely.STRtree
    he_unmatched: shapely.STRtree
    donors: Sequence[shapely.Polygon | shapely.MultiPolygon]


def three_zooms(scene: Scene, *, with_patch: bool = True) -> tuple[list[View], list[View]]:
    """Overview, middle and close view around one place; and close views of four other places.

    `with_patch` draws the patch of the cell in the middle of the close view.
    """
    centre_px, others_px = chosen_places(scene.shown_px, _mid_um(scene) / scene.slide.mpp)
    close = _close(scene, centre_px, ZOOM_PX, "Close", _close_words(scene), with_patch=with_patch)
    main = [_overview(scene, centre_px), _middle(scene, centre_px), close]
    caption = f"{close_um(scene.fov_um):.0f} µm around one cell."
    corners = [
        _close(scene, place_px, CORNER_PX, name, caption, with_patch=False)
        for name, place_px in others_px.items()
    ]
    return main, corners


def side_by_side(slide: Slide, cells_um: Points) -> list[View]:
    """The slide, and beside it the cells of a bundle that has no place on it, at one scale."""
    slide_um, cells_across_um = np.array(slide.size_px) * slide.mpp, np.ptp(cells_um, axis=0)
    size_um = np.maximum(slide_um, cells_across_um)
    mpp = max(slide.mpp, float(size_um.max()) / OVERVIEW_PX)
    width, height = np.ceil(size_um / mpp).astype(int).tolist()
    x0, y0 = np.floor((slide_um - size_um) / 2 / mpp).astype(int).tolist()
    rgb, _ = read_pixels(slide, None, (x0, y0, x0 + width, y0 + height), mpp)
    dark = np.full_like(rgb, 40)
    corner_um = cells_um.min(axis=0) + (cells_across_um - size_um) / 2
    draw_points(dark, (_sampled(cells_um) - corner_um) / mpp, INSTRUMENT)
    return [
        as_view("The slide", "Is it the whole section of the bundle, stained by H&E?", rgb, mpp),
        as_view(
            "The cells of the bundle",
            "As the instrument sees them; on the slide they may be turned or mirrored. Is the "
            "outline that of the tissue, and as large?",
            dark,
            mpp,
        ),
    ]


def before_after(
    slide: Slide, fov_um: float, place_px: Points, before: Polygons, after: Polygons
) -> list[View]:
    """Close views of one place of an H&E with the same nuclei as two transforms put them.

    `before` and `after` are polygons on the slide; those beyond the views are cut off.
    """
    rgb, mpp, view_px_from_slide_px, _ = read_window(
        slide, None, place_px, close_um(fov_um), ZOOM_PX
    )
    views = []
    for title, polygons, colour in (("Before", before, BEFORE), ("After", after, INSTRUMENT)):
        drawn = rgb.copy()
        draw_outlines(drawn, polygons, view_px_from_slide_px, colour)
        views.append(as_view(title, "The same nuclei at the same place.", drawn, mpp))
    return views


def chosen_places(cells_px: Points, side_px: float) -> tuple[Points, dict[str, Points]]:
    """The cell in the middle of the fullest square of `side_px`, and one cell of each quarter.

    Each is the cell nearest the median of those of its square or quarter; quarters are parted at
    the median of all cells, and those without a cell are left out. `cells_px` is (n, 2), n > 0.
    """
    squares = np.floor(cells_px / side_px).astype(np.int64)
    _, of_cell, n_cells = np.unique(squares, axis=0, return_inverse=True, return_counts=True)
    fullest = cells_px[of_cell.ravel() == n_cells.argmax()]
    right, below = (cells_px >= np.median(cells_px, axis=0)).T
    quarters = {
        "Upper left": ~right & ~below,
        "Upper right": right & ~below,
        "Lower left": ~right & below,
        "Lower right": right & below,
    }
    return _most_central(fullest), {
        name: _most_central(cells_px[inside]) for name, inside in quarters.items() if inside.any()
    }


def _most_central(points: Points) -> Points:
    distance = np.linalg.norm(points - np.median(points, axis=0), axis=1)
    central: Points = points[distance.argmin()]
    return central


def close_um(fov_um: float) -> float:
    """The side of a close view."""
    return _CLOSE_FOVS * fov_um


def _mid_um(scene: Scene) -> float:
    return _MID_CLOSES * close_um(scene.fov_um)


def _overview(scene: Scene, centre_px: Points) -> View:
    slide = scene.slide
    width_px, height_px = slide.size_px
    # A small slide is shown at its own pixels, not magnified.
    mpp = slide.mpp * max(1.0, max(width_px, height_px) / OVERVIEW_PX)
    box = (
        0,
        0,
        int(np.ceil(width_px * slide.mpp / mpp)),
        int(np.ceil(height_px * slide.mpp / mpp)),
    )
    rgb, view_px_from_slide_px = read_pixels(slide, scene.grey_scale, box, mpp)
    n = len(scene.cells_px)
    draw_points(rgb, view_px_from_slide_px(_sampled(scene.cells_px)), INSTRUMENT)
    draw_outlines(rgb, scene.donors, view_px_from_slide_px, DONOR, cased=True)
    side_px = _mid_um(scene) / slide.mpp
    square = shapely.box(*(centre_px - side_px / 2), *(centre_px + side_px / 2))
    draw_outlines(rgb, [square], view_px_from_slide_px, PATCH, cased=True)
    told = f"{n:,} cells" if n <= _MAX_POINTS else f"{_MAX_POINTS:,} of {n:,} cells"
    caption = (
        f"The whole image with {told} as points. Good: points fill the tissue and end where it "
        "ends; a fold or a hole in the tissue is one in the points. The square is the next view."
        + (" Each donor's outline holds the cells of that donor." if len(scene.donors) else "")
    )
    return as_view("Whole", caption, rgb, mpp)


def _sampled(points: Points) -> Points:
    """As many of the points as a view can show, from all over them."""
    n = len(points)
    return points if n <= _MAX_POINTS else points[np.linspace(0, n - 1, _MAX_POINTS).astype(int)]


def _middle(scene: Scene, centre_px: Points) -> View:
    rgb, mpp, view_px_from_slide_px, window = read_window(
        scene.slide, scene.grey_scale, centre_px, _mid_um(scene), ZOOM_PX
    )
    draw_outlines(rgb, inside(scene.instrument_nuclei, window), view_px_from_slide_px, INSTRUMENT)
    side_px = close_um(scene.fov_um) / scene.slide.mpp
    square = shapely.box(*(centre_px - side_px / 2), *(centre_px + side_px / 2))
    draw_outlines(rgb, [square], view_px_from_slide_px, PATCH, cased=True)
    caption = (
        f"The instrument's nuclei, carried over. Good: outlines sit on {_nuclei_look(scene)} "
        "everywhere, not beside them by one steady step. The square is the next view."
    )
    return as_view("Middle", caption, rgb, mpp)


def _close(
    scene: Scene, centre_px: Points, width_px: int, title: str, caption: str, *, with_patch: bool
) -> View:
    rgb, mpp, view_px_from_slide_px, window = read_window(
        scene.slide, scene.grey_scale, centre_px, close_um(scene.fov_um), width_px
    )
    for nuclei, colour in (
        (scene.he_unmatched, HE_UNMATCHED),
        (scene.he_matched, HE_NUCLEUS),
        (scene.instrument_nuclei, INSTRUMENT),
    ):
        draw_outlines(rgb, inside(nuclei, window), view_px_from_slide_px, colour)
    if with_patch:
        side_px = scene.fov_um / scene.slide.mpp
        square = shapely.box(*(centre_px - side_px / 2), *(centre_px + side_px / 2))
        draw_outlines(rgb, [square], view_px_from_slide_px, PATCH, cased=True)
        caption += " The square is the patch of the cell in the middle."
    return as_view(title, caption, rgb, mpp)


def _close_words(scene: Scene) -> str:
    if len(scene.he_matched):
        return "Good: the two outlines of a nucleus lie on each other, to a micron or two."
    return f"Good: outlines sit on {_nuclei_look(scene)}."


def _nuclei_look(scene: Scene) -> str:
    return "dark nuclei" if scene.slide.is_rgb else "bright nuclei"
