"""Forward and backward maps of a deformed section are each other's inverse."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pairing.geometry import Affine
from pairing.simulate.params import SlideParams
from pairing.simulate.slide_map import SlideMap

SIZE_UM = (2000.0, 1500.0)


def _drawn(seed: int, params: SlideParams, mpp: float, turn: float, mirror: bool) -> SlideMap:
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, SIZE_UM, (200, 2))
    um_from_px = Affine.similarity(mpp, turn, (-300.0, 120.0), mirror=mirror)
    return SlideMap.draw(rng, params, um_from_px, centres, SIZE_UM)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    mpp=st.floats(0.2, 1.0),
    turn=st.floats(0, 6.28),
    mirror=st.booleans(),
    warp_um=st.sampled_from([0.0, 5.0, 20.0, 60.0]),
    tear_um=st.sampled_from([0.0, 10.0, 60.0]),
    fold_um=st.sampled_from([0.0, 10.0, 40.0]),
)
def test_every_point_is_seen_where_it_lies(
    seed: int, mpp: float, turn: float, mirror: bool, warp_um: float, tear_um: float, fold_um: float
) -> None:
    params = SlideParams(warp_um=warp_um, tear_um=tear_um, fold_um=fold_um)
    slide_map = _drawn(seed, params, mpp, turn, mirror)
    points = np.random.default_rng(seed + 1).uniform(0, SIZE_UM, (25, 2))
    for point, px in zip(points, slide_map.px_from_um(points), strict=True):
        corner = np.floor(px).astype(int) - 1
        offsets = []
        for view in slide_map.views(int(corner[0]), int(corner[1]), 3, 3):
            shown = np.ones((3, 3), bool) if view.shown is None else view.shown
            off = np.hypot(view.x_um - point[0], view.y_um - point[1])[shown]
            offsets.append(off.min(initial=np.inf))
        # The nearest of nine pixel centres is within 0.71 px of the point, stretched a little.
        assert min(offsets) < 0.75 * mpp * 1.5 + 0.05


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), warp_um=st.sampled_from([5.0, 20.0, 60.0]))
def test_a_stretch_is_as_large_as_asked_and_never_folds_over(seed: int, warp_um: float) -> None:
    slide_map = _drawn(seed, SlideParams(warp_um=warp_um), 0.5, 0.0, False)
    assert slide_map.warp is not None
    x, y = np.meshgrid(np.arange(0, SIZE_UM[0], 20.0), np.arange(0, SIZE_UM[1], 20.0))
    at = np.stack([x.ravel(), y.ravel()], axis=1)
    moved = slide_map.warp.at(at)
    np.testing.assert_allclose(np.abs(moved).max(axis=0), warp_um, rtol=1e-3)
    came_from = (at - moved).reshape(*x.shape, 2)
    across = np.diff(came_from, axis=1)[:-1]
    down = np.diff(came_from, axis=0)[:, :-1]
    turned = across[..., 0] * down[..., 1] - across[..., 1] * down[..., 0]
    assert (turned > 0).all()


def test_a_tear_shows_glass_and_a_fold_three_layers() -> None:
    torn = _drawn(1, SlideParams(tear_um=40), 0.5, 0.3, False)
    assert torn.tear is not None
    line = np.array([[torn.tear.x_um, torn.tear.y_um]])
    across = np.array([[-np.sin(torn.tear.angle), np.cos(torn.tear.angle)]])
    middle = torn.um_from_px.inverse(line + 20 * across)[0].astype(int)
    (view,) = torn.views(int(middle[0]), int(middle[1]), 4, 4)
    assert view.shown is not None
    assert not view.shown.any()

    folded = _drawn(1, SlideParams(fold_um=40), 0.5, 0.3, False)
    assert folded.fold is not None
    line = np.array([[folded.fold.x_um, folded.fold.y_um]])
    across = np.array([[-np.sin(folded.fold.angle), np.cos(folded.fold.angle)]])
    middle = folded.um_from_px.inverse(line + 15 * across)[0].astype(int)
    views = folded.views(int(middle[0]), int(middle[1]), 2, 2)
    assert len(views) == 3
    depth = [
        float(folded.fold.local(np.float64(v.x_um.mean()), np.float64(v.y_um.mean()))[1])
        for v in views
    ]
    np.testing.assert_allclose(depth, [15, 65, 95], atol=1.5)
    beyond = np.array([[15.0], [65.0], [95.0], [125.0], [-5.0]])
    flags = folded.flags(line + beyond * across)["folded"]
    assert flags.tolist() == [True, True, True, False, False]
