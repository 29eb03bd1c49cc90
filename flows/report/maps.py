"""How nuclei of H&E and instrument fit from place to place: squares over the section, and maps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from matplotlib.figure import Figure

from flows.report import charts
from flows.report.embed import chart_uri
from pairing.geometry import Points, Transform
from pairing.match_rate import REGION_COLUMNS, REGION_UM, far_below

# A square holds about this many cells, where that makes no more squares across than are legible.
_CELLS_A_SQUARE = 25
_MAX_ACROSS = 40
# A median or a share of fewer says nothing; the square is left empty.
MIN_IN_SQUARE = 8
_NICE_STEPS = (1, 1.5, 2, 3, 5, 7.5, 10)
_MAX_LISTED = 10
# The places in between are what is told in words: single squares at a border stand out by chance.
_TOLD_PERCENTILES = (5, 95)

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Squares:
    """Squares over the section and the one that each cell lies in; positions in µm on the slide."""

    edge_um: float
    left_um: float
    top_um: float
    n_across: int
    n_down: int
    of_cell: npt.NDArray[np.int64]  # row by row from the upper left

    def medians(self, values: Values) -> Values:
        """(n_down, n_across, k) medians of the cells' `values`, (n, k); NaN values are no cells'.

        A square with fewer than MIN_IN_SQUARE cells is NaN.
        """
        known = np.isfinite(values).all(axis=1)
        by_square = pd.DataFrame(values[known]).groupby(self.of_cell[known])
        enough = by_square.median()[(by_square.size() >= MIN_IN_SQUARE).to_numpy()]
        result = np.full((self.n_down * self.n_across, values.shape[1]), np.nan)
        result[enough.index.to_numpy()] = enough.to_numpy()
        return result.reshape(self.n_down, self.n_across, -1)

    def shares(self, held: npt.NDArray[np.bool_]) -> Values:
        """(n_down, n_across) shares of the cells for which `held`; NaN in squares of too few."""
        n_squares = self.n_down * self.n_across
        n_cells = np.bincount(self.of_cell, minlength=n_squares)
        n_held = np.bincount(self.of_cell[held], minlength=n_squares)
        share = np.full(n_squares, np.nan)
        enough = n_cells >= MIN_IN_SQUARE
        share[enough] = n_held[enough] / n_cells[enough]
        return share.reshape(self.n_down, self.n_across)


def squares_over(positions_um: Points) -> Squares:
    """Squares over all positions, (n, 2) with n > 0; edges of a round number of µm."""
    left, top = positions_um.min(axis=0)
    width, height = np.ptp(positions_um, axis=0)
    wanted_um = max(
        max(width, height) / _MAX_ACROSS,
        np.sqrt(width * height * _CELLS_A_SQUARE / len(positions_um)),
        1.0,
    )
    power = 10.0 ** np.floor(np.log10(wanted_um))
    edge_um = float(min(s * power for s in _NICE_STEPS if s * power >= wanted_um))
    column, row = np.floor((positions_um - (left, top)) / edge_um).astype(np.int64).T
    n_across, n_down = int(column.max()) + 1, int(row.max()) + 1
    return Squares(edge_um, float(left), float(top), n_across, n_down, row * n_across + column)


def displacements_um(
    table: pd.DataFrame,
    nuclei: pd.DataFrame,
    he_centroids_px: pd.DataFrame,
    he_px_from_xenium_um: Transform,
    slide_mpp: float,
) -> Values:
    """From each cell's instrument nucleus to its H&E nucleus: (n, 2) µm along the slide's x and y.

    `table` is of the cells artifact, `nuclei` of the bundle, `he_centroids_px` (x, y by nucleus
    id) of the nuclei artifact. NaN for a cell without an H&E nucleus or whose H&E nucleus went
    with a donor, and for one with several nuclei, of which the table does not tell the matched one.
    """
    single = nuclei[nuclei["cell_index"] >= 0].drop_duplicates("cell_index", keep=False)
    has_match = table["he_nucleus_id"].notna().to_numpy()
    single = single[has_match[single["cell_index"].to_numpy()]]
    cell = single["cell_index"].to_numpy()
    # Of the outlines, as the match measures its distance; the table's centre is the mask's.
    centroid_um = shapely.get_coordinates(shapely.centroid(single["polygon"].to_numpy(object)))
    he_px = he_centroids_px.reindex(table["he_nucleus_id"].to_numpy()[cell]).to_numpy()
    result = np.full((len(table), 2), np.nan)
    result[cell] = (he_px - he_px_from_xenium_um(centroid_um)) * slide_mpp
    return result


@dataclass(frozen=True, slots=True)
class MatchRegion:
    """A square of REGION_UM: its corner on the slide, the nuclei in it, and their match rates."""

    x_um: float
    y_um: float
    n_nuclei: int
    found: float
    predicted: float
    by_chance: float


@dataclass(frozen=True, slots=True)
class FitMaps:
    """Maps as data URIs, and what they show in figures.

    Squares of fewer than `min_in_square` cells are empty; `n_measured` cells have a displacement.
    `shift_um` is the median displacement (x, y) over the section; a range holds the squares
    between the 5th and 95th percentile, None where no square holds enough cells. `far_below` are
    the worst of the `n_far_below` squares of `region_um` in which far fewer nuclei match than the
    registration's error predicts.
    """

    edge_um: float
    min_in_square: int
    n_measured: int
    shift_um: tuple[float, float] | None
    distance_range_um: tuple[float, float] | None
    match_range: tuple[float, float] | None
    region_um: float
    far_below: list[MatchRegion]
    n_far_below: int
    charts: dict[str, str]

    @property
    def shift_in_words(self) -> str:
        """As "0.2 µm to the right and 0.3 µm up"; "not measured" without a measured cell."""
        if self.shift_um is None:
            return "not measured"
        x_um, y_um = self.shift_um
        return (
            f"{abs(x_um):.1f} µm to the {'left' if x_um < 0 else 'right'} and "
            f"{abs(y_um):.1f} µm {'up' if y_um < 0 else 'down'}"
        )


def fit_maps(
    positions_um: Points, table: pd.DataFrame, moved_um: Values, regions: pd.DataFrame
) -> FitMaps:
    """Residuals, distances and match rate over the section, and the match rate predicted.

    `positions_um` are the cells on the slide, (n, 2) with n > 0; `moved_um` as `displacements_um`;
    `regions` of the cells artifact has `match_rate.REGION_COLUMNS`.
    """
    squares = squares_over(positions_um)
    distance = squares.medians(table[["he_distance_um"]].to_numpy(np.float64))[:, :, 0]
    residual = squares.medians(moved_um)
    matched = squares.shares(table["he_nucleus_id"].notna().to_numpy())
    measured = np.isfinite(moved_um[:, 0])
    shift = np.median(moved_um[measured], axis=0).tolist() if measured.any() else None
    corner_um, edge_um = (squares.left_um, squares.top_um), squares.edge_um
    figures = {}
    if np.isfinite(residual).any():
        figures["residual"] = charts.arrow_map(residual, corner_um, edge_um, "median shift, µm")
    if np.isfinite(distance).any():
        limits = (0.0, max(1.0, float(np.nanmax(distance))))
        label = "median distance, µm"
        figures["distance"] = charts.square_map(distance, corner_um, edge_um, label, limits)
    if np.isfinite(matched).any():
        label = "cells with an H&E nucleus, %"
        figures["matched"] = charts.square_map(
            100 * matched, corner_um, edge_um, label, (0.0, 100.0)
        )
    far = far_below(*(regions[name].to_numpy() for name in ("found", "predicted", "by_chance")))
    if regions["predicted"].notna().any():
        label = "nuclei that may have one, %"
        figures["predicted"] = _map_of_regions(regions, label)
    return FitMaps(
        edge_um=edge_um,
        min_in_square=MIN_IN_SQUARE,
        n_measured=int(measured.sum()),
        shift_um=tuple(shift) if shift is not None else None,
        distance_range_um=_range(distance),
        match_range=_range(matched),
        region_um=REGION_UM,
        far_below=_worst(regions[far]),
        n_far_below=int(far.sum()),
        charts={name: chart_uri(figure) for name, figure in figures.items()},
    )


def _map_of_regions(regions: pd.DataFrame, label: str) -> Figure:
    at = (regions[["x_um", "y_um"]].to_numpy() / REGION_UM).round().astype(np.int64)
    first = at.min(axis=0)
    column, row = (at - first).T
    squares = np.full((row.max() + 1, column.max() + 1), np.nan)
    squares[row, column] = 100 * regions["predicted"].to_numpy()
    left_um, top_um = (first * REGION_UM).tolist()
    return charts.square_map(squares, (left_um, top_um), REGION_UM, label, (0.0, 100.0))


def _worst(far: pd.DataFrame) -> list[MatchRegion]:
    """Those that fall short by most of their nuclei."""
    short = far["n_nuclei"] * (far["predicted"] - far["found"])
    order = short.sort_values(ascending=False, kind="stable").index[:_MAX_LISTED]
    rows = far.loc[order, list(REGION_COLUMNS)].itertuples(index=False)
    return [MatchRegion(*row) for row in rows]


def _range(squares: Values) -> tuple[float, float] | None:
    known = squares[np.isfinite(squares)]
    if not len(known):
        return None
    low, high = np.percentile(known, _TOLD_PERCENTILES)
    return float(low), float(high)
