"""Scores of patches: what lowers and raises them, and that they are of the patch alone."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairing.quality import SCORES, measure

MPP, SIZE = 0.25, 224
# Optical densities of red, green and blue: haematoxylin and eosin of two laboratories, and inks.
STAINS = np.array([[0.65, 0.70, 0.29], [0.56, 0.72, 0.41], [0.07, 0.99, 0.11], [0.22, 0.80, 0.56]])
INKS = {
    "blue": (1.0, 0.62, 0.18),
    "cyan": (1.0, 0.25, 0.10),
    "green": (1.0, 0.42, 0.75),
    "black": (1.0, 1.0, 1.0),
}
GLASS = (241, 240, 243)


def scored(rgb: Any, mpp: float = MPP) -> dict[str, float]:
    scores = measure(rgb, mpp, [(0, 0)], rgb.shape[0])
    return {name: float(getattr(scores, name)[0]) for name in SCORES}


def light_of(density: Any) -> Any:
    """Beer-Lambert, as 8 bits."""
    return np.clip(np.rint(256 * 10.0**-density - 1), 0, 255).astype(np.uint8)


def tissue(seed: int, size: int = SIZE, mpp: float = MPP) -> Any:
    """Nuclei with chromatin on fibres, by the stains."""
    rng = np.random.default_rng(seed)

    def noise(sigma_um: float) -> Any:
        drawn = rng.standard_normal((size, size)).astype(np.float32)
        smooth = cv2.GaussianBlur(drawn, (0, 0), sigma_um / mpp)
        return smooth / smooth.std()

    nuclei = np.zeros((size, size), np.float32)
    for x, y, radius in rng.uniform((0, 0, 2.5), (size, size, 5.0), (40, 3)):
        cv2.circle(nuclei, (int(x), int(y)), round(radius / mpp), 1.0, -1)
    haematoxylin = (nuclei * (0.7 + 0.15 * noise(0.4)))[..., None] * STAINS[seed % 2]
    # Less than no eosin is no colour that tissue has.
    fibres = np.clip(0.35 + 0.08 * noise(0.5) + 0.08 * noise(3.0), 0, None)
    eosin = fibres[..., None] * STAINS[2 + seed % 2]
    return light_of(np.clip(haematoxylin + eosin, 0.01, None))


def blurred(rgb: Any, sigma_um: float, mpp: float = MPP) -> Any:
    return cv2.GaussianBlur(rgb, (0, 0), sigma_um / mpp)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.5, 3.0), st.floats(1.3, 2.0))
def test_blur_lowers_sharpness_and_more_blur_more(seed: int, sigma: float, times: float) -> None:
    rgb = tissue(seed)
    whole, soft, softer = (
        scored(picture)["sharpness"]
        for picture in (rgb, blurred(rgb, sigma), blurred(rgb, sigma * times))
    )
    # Where nothing is left to be blurred, whole grey levels are noise.
    assert whole > soft
    assert softer < max(soft, 0.1)
    assert -0.1 < softer < 0.9 < whole < 2.0


def test_sharpness_knows_smooth_edges_and_noise() -> None:
    x = np.arange(SIZE, dtype=np.float64)
    ramp = np.broadcast_to((60 + 0.7 * x)[:, None, None], (SIZE, SIZE, 3)).astype(np.uint8)
    assert scored(ramp)["sharpness"] == pytest.approx(0.0, abs=0.1)
    steps = np.where((x // 56)[:, None, None] % 2, 60, 200) * np.ones((1, SIZE, 3))
    assert scored(steps.astype(np.uint8))["sharpness"] == pytest.approx(1.0, abs=0.1)
    drawn = np.random.default_rng(0).uniform(60, 200, (SIZE // 4, SIZE // 4, 1)).astype(np.uint8)
    grain = np.ascontiguousarray(drawn.repeat(4, 0).repeat(4, 1).repeat(3, 2))
    assert scored(grain)["sharpness"] == pytest.approx(2.0, abs=0.1)


def test_one_tissue_is_as_sharp_at_any_pixel_size() -> None:
    fine = tissue(3, size=896, mpp=0.125)
    found = []
    for times in (1, 2, 4):
        size = 896 // times
        seen = cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA)
        found.append(scored(seen, 0.125 * times)["sharpness"])
    assert np.ptp(found) < 0.1


def test_pixels_too_large_to_show_a_micron_tell_no_sharpness() -> None:
    assert np.isnan(scored(tissue(0), mpp=1.5)["sharpness"])
    assert scored(tissue(0), mpp=1.5)["pen_share"] == 0


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(sorted(INKS)),
    st.floats(1.6, 2.5),
    st.integers(24, SIZE),
    st.integers(0, 100),
)
def test_ink_raises_the_share_by_what_it_covers(
    seed: int, ink: str, layers: float, width: int, more: int
) -> None:
    rgb = tissue(seed)
    density = -np.log10((rgb.astype(np.float64) + 1) / 256)
    assert scored(rgb)["pen_share"] == 0
    shares = []
    for columns in (width, min(SIZE, width + more)):
        painted = density.copy()
        painted[:, :columns] += layers * np.array(INKS[ink])
        shares.append(scored(light_of(painted))["pen_share"])
    assert shares[1] >= shares[0] - 1e-6
    # Thin ink on dark nuclei is not told; squares at its border are whole or not at all.
    assert 0.5 * width / SIZE - 0.05 < shares[0] < width / SIZE + 0.05


@given(st.floats(0.0, 1.5), st.floats(0.0, 1.5), st.integers(0, 3), st.integers(0, 3))
def test_no_mixture_of_the_stains_is_ink(h: float, e: float, one: int, other: int) -> None:
    density = h * STAINS[one] + e * STAINS[other]
    rgb = np.broadcast_to(light_of(density), (SIZE, SIZE, 3))
    assert scored(np.ascontiguousarray(rgb))["pen_share"] == 0


@pytest.mark.parametrize("brown", [(0.27, 0.57, 0.78), (0.45, 0.75, 0.95)])
def test_brown_pigment_is_no_ink(brown: tuple[float, float, float]) -> None:
    rgb = np.broadcast_to(light_of(1.2 * np.array(brown)), (SIZE, SIZE, 3))
    assert scored(np.ascontiguousarray(rgb))["pen_share"] == 0


def test_a_second_layer_darkens_its_tenth() -> None:
    rgb = tissue(1)
    density = -np.log10((rgb.astype(np.float64) + 1) / 256)
    dark = []
    for width in (0, 16, 48, SIZE):
        folded = density.copy()
        folded[:, :width] *= 2
        dark.append(scored(light_of(folded))["dark_od"])
    assert dark[0] <= dark[1] < dark[2] < dark[3] * 1.001
    assert dark[3] == pytest.approx(2 * dark[0], rel=0.1)


def test_glass_has_nothing_to_be_sharp_and_shows_no_tissue() -> None:
    glass = np.full((SIZE, SIZE, 3), GLASS, np.uint8)
    found = scored(glass)
    assert np.isnan(found["sharpness"])
    assert (found["pen_share"], found["centre_tissue"]) == (0, 0)
    middle = slice(SIZE // 2 - 24, SIZE // 2 + 24)
    hole = tissue(2)
    hole[middle, middle] = GLASS
    assert scored(hole)["centre_tissue"] == 0
    island = glass.copy()
    island[middle, middle] = tissue(2)[middle, middle]
    assert scored(island)["centre_tissue"] == 1


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 200), st.integers(0, 200), st.integers(0, 60), st.integers(0, 60),
    st.sampled_from([0.25, 0.4, 0.6]),
)  # fmt: skip
def test_a_patch_scores_the_same_in_whatever_part_of_the_slide(
    x: int, y: int, left: int, above: int, mpp: float
) -> None:
    whole = tissue(5, size=500)
    far = measure(whole, mpp, [(x, y), (500 - SIZE, 0)], SIZE)
    x0, y0 = max(0, x - left), max(0, y - above)
    part = np.ascontiguousarray(whole[y0 : y + SIZE + 9, x0 : x + SIZE + 3])
    near = measure(part, mpp, [(x - x0, y - y0)], SIZE, (x0, y0))
    for name in SCORES:
        np.testing.assert_array_equal(getattr(far, name)[:1], getattr(near, name))


def test_patches_smaller_than_what_is_measured_tell_nothing() -> None:
    tiny = tissue(0, size=16)
    found = scored(tiny, mpp=0.05)
    assert all(np.isnan(value) for value in found.values())
