"""Pairs of the registration's benchmark: that their truth is what the slide shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import tifffile
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from benchmarks.registration.baselines import best_affine
from benchmarks.registration.derived import Picture, derived
from benchmarks.registration.limits import Limits
from benchmarks.registration.pairs import ONE_IMAGE_SHARE, Pair, Simulated, hard, simulated
from benchmarks.registration.scale import MPP, PERIOD_PX, Repeated
from benchmarks.registration.wrong import remaining, shuffled, wrong_basins
from pairing.simulate.fields import Outline
from pairing.simulate.tissue import PERIOD_UM
from shards.artifact import sha256_of

N_CELLS, SEED = 150, 1001


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="module")
def painted(out: Path) -> Simulated:
    return simulated(out, N_CELLS, SEED, hard(SEED, warp_um=40.0, missing_um=60.0))


def darker(pair: Pair) -> float:
    """Optical density of red at the true places, over that beside them."""
    red = tifffile.imread(pair.slide, key=0)[..., 0].astype(np.float64)
    density = gaussian_filter(-np.log10((red + 1) / 256), 1.0 / pair.mpp)

    def at(px: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        column, row = np.floor(px).astype(int).T
        return np.asarray(density[row, column])

    px = pair.px[~pair.missing]
    aside_px = 7 / pair.mpp * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])
    beside = [at(px + shift) for shift in aside_px]
    return float(np.median(at(px) / np.mean(beside, axis=0)))


def test_the_slide_shows_nuclei_where_the_truth_has_them(painted: Simulated) -> None:
    pair = painted.pair()
    assert darker(pair) > 1.3
    assert darker(replace(pair, px=pair.px + 7 / pair.mpp)) < 1.0


def test_a_pair_is_made_once_and_the_same_each_time(
    out: Path, painted: Simulated, tmp_path: Path
) -> None:
    made = (painted.folder / "he.ome.tif").stat().st_mtime_ns
    again = simulated(out, N_CELLS, SEED, hard(SEED, warp_um=40.0, missing_um=60.0))
    assert again.folder == painted.folder
    assert (again.folder / "he.ome.tif").stat().st_mtime_ns == made
    anew = simulated(tmp_path, N_CELLS, SEED, hard(SEED, warp_um=40.0, missing_um=60.0), workers=2)
    for name in ("he.ome.tif", "points.parquet", "recipe.json"):
        assert sha256_of(anew.folder / name) == sha256_of(painted.folder / name)


def test_the_instrument_is_stretched_along(painted: Simulated) -> None:
    whole, half, none = (painted.pair(share) for share in (1.0, 0.5, 0.0))
    assert np.array_equal(whole.px, none.px)
    assert np.allclose(half.um, (whole.um + none.um) / 2)
    assert 20 < np.abs(whole.um - none.um).max() <= 40
    assert none.error_um(best_affine(none)(none.um)).max() < 1e-6
    assert whole.error_um(best_affine(whole)(whole.um)).max() > 0.5


def test_other_focus_leaves_and_adds_nuclei(painted: Simulated) -> None:
    plain, blurred = painted.pair(0.5), painted.out_of_focus(SEED, 0.5)
    assert len(blurred.um) == len(plain.um)
    assert 1.1 < darker(blurred) < darker(plain)
    away, _ = cKDTree(plain.px * plain.mpp).query(blurred.px * plain.mpp)
    assert ONE_IMAGE_SHARE[0] / 2 < (away > 4).mean() < ONE_IMAGE_SHARE[1] / 2
    # The truth follows the blurred centroids: what an affine leaves is the stretch alone.
    left, usual = (float(np.median(p.error_um(best_affine(p)(p.um)))) for p in (blurred, plain))
    assert left == pytest.approx(usual, rel=0.2)


def test_a_picture_is_stretched_as_told(tmp_path: Path) -> None:
    mpp = 0.5
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(40, 800, 30), np.arange(40, 600, 30)), -1).reshape(-1, 2)
    px = grid + rng.uniform(-8, 8, grid.shape)
    dark = np.zeros((640, 840))
    column, row = np.floor(px).astype(int).T
    dark[row, column] = 1
    grey = np.asarray(240 * np.exp(-60 * gaussian_filter(dark, 4.0)), np.uint8)
    rgb = grey[..., None].repeat(3, axis=2)
    nuclei = pd.DataFrame({"x_um": px[:, 0] * mpp, "y_um": px[:, 1] * mpp, "area_um2": 30.0})
    pair = derived(tmp_path, Picture("dots", rgb, mpp), nuclei, warp_um=15.0, seed=3)
    n = round(0.85 * len(px))
    assert len(pair.um) == n + round(0.1 * n)
    assert darker(pair.take(np.arange(n))) > 3


def test_spoilt_slides(out: Path, painted: Simulated) -> None:
    pair = painted.pair()
    assert darker(shuffled(out, pair, 64.0)) < darker(pair) / 1.1
    little = remaining(out, pair)
    assert 0.03 < (~little.missing).mean() < 0.08
    assert darker(little) > 1.3
    basin = wrong_basins()["turned by 180°"](pair)
    assert basin(pair.px).mean(axis=0) == pytest.approx(pair.px.mean(axis=0))
    assert basin(pair.px) == pytest.approx(2 * pair.px.mean(axis=0) - pair.px)


def test_a_square_goes_on_on_its_other_side() -> None:
    assert pytest.approx(PERIOD_UM) == MPP * PERIOD_PX
    square = np.arange(PERIOD_PX, dtype=np.uint32).astype(np.uint8)[None, :, None].repeat(3, axis=2)
    square = np.broadcast_to(square, (PERIOD_PX, PERIOD_PX, 3))
    slide = Repeated(square, Outline.of_core(np.random.default_rng(0)).scaled(3000.0), 3300.0)
    band = slide[12000:12064]
    assert band.shape == (64, slide.shape[1], 3)
    middle = slide.shape[1] // 2
    assert band[0, middle, 0] == middle % PERIOD_PX % 256
    assert band[0, middle + PERIOD_PX // 4, 0] == (middle + PERIOD_PX // 4) % PERIOD_PX % 256
    assert (band[:, :100] == 243).all()


def test_a_limit_that_is_not_met_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    limits = Limits()
    limits.line("median", 0.2, "≤", 0.5)
    limits.none("passed", [], 3)
    assert limits.met
    limits.line("p95", float("nan"), "≤", 2.0)
    assert not limits.met
    limits.none("passed", ["a on b"], 3)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "NOT MET" in line] == [
        "| p95 | nan | ≤ 2.0 | NOT MET |",
        "| passed | 1 of 3 | 0 | NOT MET: a on b |",
    ]
