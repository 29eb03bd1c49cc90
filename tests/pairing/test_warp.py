"""An affine and a field, there and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from pairing.geometry import Affine
from pairing.warp import Warp


def smooth(seed: int, largest: float) -> Warp:
    rng = np.random.default_rng(seed)
    shift = gaussian_filter(rng.standard_normal((40, 50, 2)), (4, 4, 0))
    shift *= largest / np.abs(shift).max()
    affine = Affine.similarity(
        rng.uniform(0.5, 4), rng.uniform(0, 6), (100.0, -30.0), mirror=bool(seed % 2)
    )
    return Warp(affine, (-50.0, 20.0), 25.0, shift)


@given(st.integers(0, 1000), st.floats(0, 20))
def test_back_again(seed: int, largest: float) -> None:
    warp = smooth(seed, largest)
    points = np.random.default_rng(seed).uniform(-200, 1500, (50, 2))
    assert np.abs(warp.inverse(warp(points)) - points).max() < 1e-5


def test_at_its_nodes_it_is_what_they_say_and_beyond_them_as_on_the_border() -> None:
    warp = smooth(3, 10.0)
    assert warp.shift is not None
    nodes = np.array([[-50.0, 20.0], [-25.0, 20.0], [1175.0, 995.0]])
    shift = warp(nodes) - warp.affine(nodes)
    assert shift == pytest.approx(warp.shift[[0, 0, 39], [0, 1, 49]], abs=1e-9)
    beyond = np.array([[-500.0, 20.0], [1175.0, 9000.0]])
    assert warp(beyond) - warp.affine(beyond) == pytest.approx(
        warp.shift[[0, 39], [0, 49]], abs=1e-9
    )


def test_without_a_field_it_is_the_affine() -> None:
    affine = Affine.similarity(2.0, 0.3, (5.0, 6.0))
    points = np.array([[1.0, 2.0], [30.0, 4.0]])
    assert np.array_equal(Warp(affine)(points), affine(points))
    assert Warp(affine).inverse(affine(points)) == pytest.approx(points)


def test_where_a_field_folds_over_it_is_an_error_or_exact() -> None:
    shift = np.zeros((20, 20, 2))
    shift[:, 10:, 0] = -300.0
    warp = Warp(Affine.scale(1.0), (0.0, 0.0), 25.0, shift)
    n_refused = 0
    for x in np.linspace(-100, 300, 81):
        try:
            src = warp.inverse(np.array([[x, 100.0]]))
        except ValueError:
            n_refused += 1
        else:
            assert warp(src) == pytest.approx(np.array([[x, 100.0]]), abs=1e-5)
    assert n_refused > 0
