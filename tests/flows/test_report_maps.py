"""The maps of the fit: truth put in by hand comes out, square by square."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from flows.report.maps import (
    MIN_IN_SQUARE,
    FitMaps,
    displacements_um,
    fit_maps,
    squares_over,
)
from pairing.geometry import Affine
from pairing.match_rate import REGION_COLUMNS

# Cells on a lattice, 4 µm apart: 2,500 over 196 x 196 µm.
LATTICE_UM = np.stack(np.meshgrid(np.arange(50) * 4.0, np.arange(50) * 4.0), -1).reshape(-1, 2)


def a_table(n: int, distance_um: float = 1.0) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "he_nucleus_id": pd.array(range(1, n + 1), dtype="Int64"),
            "he_distance_um": np.full(n, distance_um),
        }
    )


def some_regions(*rates: tuple[float, float, float]) -> pd.DataFrame:
    """Squares of 200 µm side by side with (found, predicted, by_chance), of 100 nuclei each."""
    rows = [(1000 + 200.0 * i, 400.0, 100, *rate) for i, rate in enumerate(rates)]
    return pd.DataFrame(rows, columns=list(REGION_COLUMNS))


NONE_FAR = some_regions((0.8, 0.9, 0.3))


def test_squares_hold_every_cell_and_have_round_edges() -> None:
    squares = squares_over(LATTICE_UM + np.array([1000.0, 2000.0]))
    # 25 cells of one in 16 µm² would take 20 µm; 49 spacings across ask for a little less.
    assert squares.edge_um == 20
    assert (squares.left_um, squares.top_um) == (1000, 2000)
    assert (squares.n_across, squares.n_down) == (10, 10)
    assert np.bincount(squares.of_cell).tolist() == [25] * 100


@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=60),
)
def test_any_positions_get_squares(positions: list[tuple[float, float]]) -> None:
    points = np.array(positions)
    squares = squares_over(points)
    assert 1 <= squares.n_across <= 41
    assert 1 <= squares.n_down <= 41
    row, column = np.divmod(squares.of_cell, squares.n_across)
    corner = np.column_stack([column, row]) * squares.edge_um + (squares.left_um, squares.top_um)
    inside = points - corner
    assert (inside >= -1e-6).all()
    assert (inside <= squares.edge_um + 1e-6).all()
    assert row.max() < squares.n_down


def test_medians_and_shares_leave_squares_of_few_cells_empty() -> None:
    squares = squares_over(LATTICE_UM)
    column = squares.of_cell % squares.n_across
    value = np.where(column == 3, np.nan, column.astype(float))
    # The first square keeps one cell too few, the second just enough.
    for square, n_kept in ((0, MIN_IN_SQUARE - 1), (1, MIN_IN_SQUARE)):
        value[np.flatnonzero(squares.of_cell == square)[n_kept:]] = np.nan
    median = squares.medians(np.column_stack([value, -value]))
    assert median.shape == (10, 10, 2)
    assert np.isnan(median[0, 0]).all()
    assert median[0, 1].tolist() == [1, -1]
    assert np.isnan(median[:, 3]).all()
    assert (median[1:, 4:] == np.array([[c, -c] for c in range(4, 10)])).all()
    share = squares.shares(LATTICE_UM[:, 1] < 100)
    assert (share[:5] == 1).all()
    assert (share[5:] == 0).all()


def test_a_shift_and_a_place_without_matches_come_out() -> None:
    table = a_table(len(LATTICE_UM), distance_um=2.5)
    lost = LATTICE_UM[:, 0] < 20
    table.loc[lost, "he_nucleus_id"] = pd.NA
    table.loc[lost, "he_distance_um"] = np.nan
    moved = np.where(lost[:, None], np.nan, (-1.5, 2.0))
    fit = fit_maps(LATTICE_UM, table, moved, NONE_FAR)
    assert fit.edge_um == 20
    assert fit.n_measured == int((~lost).sum())
    assert fit.shift_um == (-1.5, 2.0)
    assert fit.shift_in_words == "1.5 µm to the left and 2.0 µm down"
    assert fit.distance_range_um == (2.5, 2.5)
    assert fit.match_range == (0, 1)
    assert set(fit.charts) == {"residual", "distance", "matched", "predicted"}
    assert all(uri.startswith("data:image/png;base64,") for uri in fit.charts.values())


@pytest.mark.parametrize("n_cells", [1, MIN_IN_SQUARE])
def test_few_cells_without_a_match_are_told_as_such(n_cells: int) -> None:
    table = a_table(n_cells)
    table["he_nucleus_id"] = pd.array([pd.NA] * n_cells, dtype="Int64")
    table["he_distance_um"] = np.nan
    no_rates = some_regions((np.nan, np.nan, np.nan))
    fit = fit_maps(np.zeros((n_cells, 2)), table, np.full((n_cells, 2), np.nan), no_rates)
    assert fit.shift_um is None
    assert fit.shift_in_words == "not measured"
    assert fit.distance_range_um is None
    assert set(fit.charts) == (set() if n_cells == 1 else {"matched"})
    assert fit.match_range == (None if n_cells == 1 else (0, 0))


def test_displacements_are_of_cells_with_one_nucleus_along_the_axes_of_the_slide() -> None:
    # Cell 0 has one nucleus, cell 1 two, cell 2 none, cell 3 one without an H&E nucleus.
    centre_um = np.array([[10.0, 10], [30, 10], [32, 10], [50, 50], [90, 90]])
    nuclei = pd.DataFrame(
        {
            "cell_index": [0, 1, 1, 3, -1],
            "polygon": [shapely.Point(xy).buffer(3) for xy in centre_um],
        }
    )
    table = pd.DataFrame({"he_nucleus_id": pd.array([7, 9, pd.NA, pd.NA], dtype="Int64")})
    mpp = 0.5
    # A quarter turn, so that the slide's axes are not the bundle's.
    he_px_from_xenium_um = Affine.similarity(1 / mpp, np.pi / 2, (500.0, 100.0))
    at_px = he_px_from_xenium_um(centre_um[:2])
    he = pd.DataFrame(at_px + np.array([4.0, -2.0]), index=[7, 9], columns=["x", "y"])
    moved = displacements_um(table, nuclei, he, he_px_from_xenium_um, mpp)
    assert moved[0] == pytest.approx((2.0, -1.0))
    assert np.isnan(moved[1:]).all()


def test_a_map_is_the_same_bytes_again() -> None:
    def charts() -> FitMaps:
        moved = np.tile((1.0, 0.5), (len(LATTICE_UM), 1))
        return fit_maps(LATTICE_UM, a_table(len(LATTICE_UM)), moved, NONE_FAR)

    assert charts() == charts()


def test_squares_far_below_are_listed_the_worst_first() -> None:
    rates = [(0.8, 0.9, 0.3), (0.5, 0.9, 0.3), (np.nan, np.nan, np.nan), (0.3, 0.9, 0.3)]
    regions = some_regions(*rates, *[(0.4, 0.9, 0.3)] * 10)
    moved = np.zeros((len(LATTICE_UM), 2))
    fit = fit_maps(LATTICE_UM, a_table(len(LATTICE_UM)), moved, regions)
    assert fit.n_far_below == 12
    assert len(fit.far_below) == 10
    worst = fit.far_below[0]
    assert (worst.x_um, worst.y_um, worst.n_nuclei) == (1600, 400, 100)
    assert (worst.found, worst.predicted, worst.by_chance) == (0.3, 0.9, 0.3)
    assert fit.far_below[1].x_um == 1800  # of equals the first
