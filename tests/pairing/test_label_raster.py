"""Masks and their growth, against definitions written out plainly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from pairing.label_raster import expanded, filled

corners = st.lists(
    st.tuples(st.floats(-6, 30, width=32), st.floats(-6, 30, width=32)), min_size=3, max_size=8
)


@settings(max_examples=60, deadline=None)
@given(st.lists(corners, max_size=4))
def test_a_pixel_is_of_the_first_polygon_that_its_centre_is_in(
    rings: list[list[tuple[float, float]]],
) -> None:
    polygons = [shapely.Polygon(np.array(ring) + 1e-3 * np.sqrt(2)) for ring in rings]
    polygons = [polygon for polygon in polygons if polygon.is_valid and polygon.area > 0]
    side = 24
    labels = filled(np.array(polygons, object), side)
    expected = np.full((side, side), -1)
    y, x = np.mgrid[:side, :side] + 0.5
    near_border = np.zeros((side, side), bool)
    for number in reversed(range(len(polygons))):
        expected[shapely.contains_xy(polygons[number], x, y)] = number
        near_border |= shapely.distance(polygons[number].exterior, shapely.points(x, y)) < 1e-9
    np.testing.assert_array_equal(labels[~near_border], expected[~near_border])


def test_holes_are_not_filled() -> None:
    ring = shapely.box(1, 1, 9, 9).difference(shapely.box(4, 4, 6, 6))
    labels = filled(np.array([ring], object), 10)
    assert (labels == 0).sum() == 64 - 4
    assert (labels[4:6, 4:6] == -1).all()


def brute(masks: npt.NDArray[np.int32], radius_px: float) -> npt.NDArray[np.int32]:
    reach = int(radius_px)
    height, width = masks.shape
    found = np.full((height - 2 * reach, width - 2 * reach), -1, np.int32)
    places = np.argwhere(masks >= 0)
    for y, x in np.ndindex(*found.shape):
        nearest = sorted(
            ((r - y - reach) ** 2 + (c - x - reach) ** 2, masks[r, c]) for r, c in places
        )
        if nearest and nearest[0][0] <= radius_px**2:
            found[y, x] = nearest[0][1]
    return found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    radius_px=st.sampled_from([0.5, 1.0, 1.5, 2.5, 4.4, 7.0]),
    share=st.floats(0, 0.3),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
def test_the_nearest_mask_has_a_pixel_and_of_two_the_first(
    seed: int, radius_px: float, share: float, size: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(n + 2 * int(radius_px) for n in size)
    masks = np.where(rng.random(shape) < share, rng.integers(0, 40, shape), -1).astype(np.int32)
    np.testing.assert_array_equal(expanded(masks, radius_px), brute(masks, radius_px))
