"""What a page shows of a registration: errors from place to place, what it moved, its figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from flows.report import charts
from flows.report.drawing import View
from flows.report.embed import chart_uri
from flows.report.maps import MIN_IN_SQUARE, Squares
from flows.report.views import before_after, chosen_places, close_um
from pairing.geometry import Affine, Points
from pairing.registration.gates import on_slide
from pairing.registration.growth import SEARCH_UM
from pairing.registration.place import SURE_UM
from pairing.registration.record import Registration
from pairing.slide import Slide
from pairing.warp import Warp

REGION_UM = 500.0
_N_WORST = 10
# More points than this take long to draw and no longer show.
_MAX_POINTS = 100_000
# The histogram ends between these, or a few cells of large error would squeeze all others.
_ERROR_LIMITS_UM = (3.0, 6.0)
_TAIL_PERCENTILE = 99.5
# Of the displacements of the cells: before and after are shown where these are passed.
_MOVED_PERCENTILE = 90
_SEEN_UM = 0.1
_NUCLEUS_UM = 30.0

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TransformFigures:
    """The affine in words: a mirror image or not, then a turn, clockwise as the slide is seen.

    `stretch` is by how much one axis is scaled more than the other. `field_um` is what the field
    adds at the cells on the slide: median and largest; None without a field.
    """

    mirrored: bool
    turn_deg: float
    px_per_um: float
    stretch: float
    field_um: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Region:
    """A square of REGION_UM: its upper left corner on the slide, and what its cells say."""

    x_um: float
    y_um: float
    n_cells: int
    n_unsure: int
    median_um: float


@dataclass(frozen=True, slots=True)
class Regions:
    """The squares of at least `min_cells`, and those of them with most of their cells unsure."""

    edge_um: float
    min_cells: int
    n: int
    n_unsure: int  # more than half of whose cells are unsure
    worst: list[Region]


@dataclass(frozen=True, slots=True)
class RegistrationParts:
    """Figures, charts and views of one registration, over the cells that lie on the slide.

    `n_unsure` and `regions` are None where no error was assessed; an error of `unknown_um` says
    that nothing is known. `change` holds the views before and after, `change_um` the largest
    displacement between them in the section; `was` says what before is. No view where nothing
    moved.
    """

    registration: Registration
    transform: TransformFigures
    n_on_slide: int
    n_unsure: int | None
    unknown_um: float
    n_drawn: int
    regions: Regions | None
    charts: dict[str, str]
    was: str
    change: list[View]
    change_um: float


def registration_parts(
    registration: Registration,
    he_px_from_xenium_um: Warp,
    cells: pd.DataFrame,
    cells_um: Points,
    nuclei: pd.DataFrame,
    slide: Slide,
    given: Affine | None,
    fov_um: float,
) -> RegistrationParts:
    """All of it, for a registration with a transform.

    `cells` has the columns of `cells.parquet`, `cells_um` (n, 2) is where the bundle puts the same
    cells; `nuclei` is its table. `given` is the transform of the alignment file that was
    refined; None: what was before is the affine alone.
    """
    mpp = registration.slide_mpp
    seen = on_slide(cells[["x_px", "y_px"]].to_numpy(), slide.size_px)
    at_px, at_um = cells.loc[seen, ["x_px", "y_px"]].to_numpy(), cells_um[seen]
    error_um = cells.loc[seen, "error_um"].to_numpy(np.float64)
    before = he_px_from_xenium_um.affine if given is None else given
    moved_um = np.linalg.norm(at_px - before(at_um), axis=1) * mpp
    is_assessed = len(error_um) > 0 and not np.isnan(error_um).any()
    regions, region_chart = _regions(at_px * mpp, error_um) if is_assessed else (None, {})
    drawn = np.unique(np.linspace(0, len(at_px) - 1, _MAX_POINTS).astype(int))
    n_unsure = int((error_um > SURE_UM).sum()) if is_assessed else None
    views: list[View] = []
    if len(moved_um) and moved_um.max() > _SEEN_UM:
        place_px = _place_of_change(at_px, moved_um, error_um, close_um(fov_um) / mpp)
        near = _near(nuclei, before, he_px_from_xenium_um, place_px, close_um(fov_um) / mpp, mpp)
        views = before_after(
            slide,
            fov_um,
            place_px,
            shapely.transform(near, before),
            shapely.transform(near, he_px_from_xenium_um),
        )
    return RegistrationParts(
        registration=registration,
        transform=transform_figures(he_px_from_xenium_um, at_px, at_um, mpp),
        n_on_slide=len(at_px),
        n_unsure=n_unsure,
        unknown_um=SEARCH_UM,
        n_drawn=min(len(at_px), _MAX_POINTS),
        regions=regions,
        charts={
            **(_error_charts(at_px[drawn] * mpp, error_um, drawn) if is_assessed else {}),
            **region_chart,
            **keypoint_chart(registration),
        },
        was="the affine alone, without the field" if given is None else "the alignment as given",
        change=views,
        change_um=float(moved_um.max()) if views else 0.0,
    )


def stretch_of(affine: Affine) -> float:
    """By how much one axis is scaled more than the other; 0 for a similarity."""
    larger, smaller = np.linalg.svd(affine.array[:2, :2], compute_uv=False)
    return float(larger / smaller - 1)


def keypoint_chart(registration: Registration) -> dict[str, str]:
    """The residuals of keypoints, where they were given."""
    if registration.keypoints is None:
        return {}
    residuals_um = np.array(registration.keypoints.residuals_um)
    return {"keypoints": chart_uri(charts.bars(residuals_um, "keypoint", "residual, µm"))}


def transform_figures(
    he_px_from_xenium_um: Warp, at_px: Points, at_um: Points, mpp: float
) -> TransformFigures:
    """Of cells on the slide: where the transform puts them, and where they lie, (n, 2) each."""
    affine = he_px_from_xenium_um.affine
    m = affine.array[:2, :2]
    flip = -1.0 if np.linalg.det(m) < 0 else 1.0
    # The nearest similarity, as `Affine.similarity` puts it: mirror x, then turn.
    turn = np.arctan2(flip * m[1, 0] - m[0, 1], flip * m[0, 0] + m[1, 1])
    field_um = None
    if he_px_from_xenium_um.shift is not None and len(at_px):
        added_um = np.linalg.norm(at_px - affine(at_um), axis=1) * mpp
        field_um = (float(np.median(added_um)), float(added_um.max()))
    return TransformFigures(
        mirrored=flip < 0,
        turn_deg=float(np.rad2deg(turn)),
        px_per_um=float(np.sqrt(affine.area_scale)),
        stretch=stretch_of(affine),
        field_um=field_um,
    )


def _error_charts(at_um: Points, error_um: Values, drawn: npt.NDArray[np.int64]) -> dict[str, str]:
    n_unsure = int((error_um > SURE_UM).sum())
    tail_um = float(np.clip(np.percentile(error_um, _TAIL_PERCENTILE), *_ERROR_LIMITS_UM))
    figures = {
        "error_map": charts.cell_map(
            at_um,
            error_um[drawn],
            "estimated error, µm",
            SURE_UM,
            f"above {SURE_UM:g} µm: {n_unsure:,} cells",
        ),
        "error": charts.histogram(
            error_um,
            "estimated error of a cell, µm",
            limits=(0.0, tail_um),
            mark=(SURE_UM, f"{SURE_UM:g} µm"),
        ),
    }
    return {name: chart_uri(figure) for name, figure in figures.items()}


def _regions(at_um: Points, error_um: Values) -> tuple[Regions, dict[str, str]]:
    """Squares whose corners are whole multiples of REGION_UM on the slide, and their map."""
    column, row = np.floor(at_um / REGION_UM).astype(np.int64).T
    left, top, n_across = int(column.min()), int(row.min()), int(np.ptp(column)) + 1
    squares = Squares(
        edge_um=REGION_UM,
        left_um=left * REGION_UM,
        top_um=top * REGION_UM,
        n_across=n_across,
        n_down=int(np.ptp(row)) + 1,
        of_cell=(row - top) * n_across + column - left,
    )
    unsure = error_um > SURE_UM
    share = squares.shares(unsure)
    median_um = squares.medians(error_um[:, None])[:, :, 0]
    n_cells = np.bincount(squares.of_cell, minlength=share.size).reshape(share.shape)
    n_unsure = np.bincount(squares.of_cell[unsure], minlength=share.size).reshape(share.shape)
    # NaN, too few cells, comes last; ties as the slide is read.
    order = [divmod(int(i), n_across) for i in np.argsort(-share.ravel(), kind="stable")]
    worst = [
        Region(
            x_um=float((left + x) * REGION_UM),
            y_um=float((top + y) * REGION_UM),
            n_cells=int(n_cells[y, x]),
            n_unsure=int(n_unsure[y, x]),
            median_um=float(median_um[y, x]),
        )
        for y, x in order[:_N_WORST]
        if share[y, x] > 0
    ]
    regions = Regions(
        edge_um=REGION_UM,
        min_cells=MIN_IN_SQUARE,
        n=int(np.isfinite(share).sum()),
        n_unsure=int((share > 0.5).sum()),
        worst=worst,
    )
    if not regions.n:
        return regions, {}
    label = f"cells above {SURE_UM:g} µm, %"
    corner_um = (squares.left_um, squares.top_um)
    figure = charts.square_map(100 * share, corner_um, REGION_UM, label, (0.0, 100.0))
    return regions, {"regions": chart_uri(figure)}


def _place_of_change(at_px: Points, moved_um: Values, error_um: Values, side_px: float) -> Points:
    """Where cells are dense among those that moved far, of the sure ones if there are any."""
    sure = error_um <= SURE_UM
    among = sure if sure.any() else np.ones(len(at_px), bool)
    far = among & (moved_um >= np.percentile(moved_um[among], _MOVED_PERCENTILE))
    return chosen_places(at_px[far], side_px)[0]


def _near(
    nuclei: pd.DataFrame, before: Affine, after: Warp, place_px: Points, side_px: float, mpp: float
) -> npt.NDArray[np.object_]:
    """Outlines in the Xenium frame of the nuclei that either transform puts into a square."""
    centre_um = nuclei[["x_um", "y_um"]].to_numpy(np.float64)
    reach_px = side_px / 2 + _NUCLEUS_UM / mpp
    inside = np.zeros(len(nuclei), bool)
    for transform in (before, after):
        inside |= (np.abs(transform(centre_um) - place_px) < reach_px).all(axis=1)
    polygons: npt.NDArray[np.object_] = nuclei["polygon"].to_numpy(object)[inside]
    return polygons
