"""`cellpair register`: its files, its words and its exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from flows.cli import main
from pairing.geometry import Affine
from pairing.registration.given import read_alignment
from pairing.registration.record import read_registration

HE_MPP = 0.2738


def register(run: Path, out: Path, *more: str, slide: Path | None = None) -> int:
    slide = slide or run / "he.ome.tif"
    words = ["--xenium", str(run / "outs"), "--slide", str(slide), "--out", str(out)]
    return main(["register", *words, *more])


def true_px(run: Path, points_um: np.ndarray) -> np.ndarray:
    transform = json.loads((run / "truth" / "transform.json").read_text())
    return Affine.of(transform["xenium_um_from_he_px"]).inverse(points_um)


@pytest.fixture(scope="module")
def registered(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("registered") / "out é"
    assert register(simulated, out) == 0
    return out


def test_a_section_is_found_on_its_slide(registered: Path, simulated: Path) -> None:
    registration, warp = read_registration(registered)
    assert (registration.method, registration.verdict) == ("auto", "pass")
    assert registration.implied_mpp == pytest.approx(HE_MPP, rel=0.005)
    assert registration.error_um is not None
    cells = pd.read_parquet(registered / "cells.parquet")
    assert list(cells.columns) == ["cell_id", "x_px", "y_px", "error_um"]
    bundle = pd.read_parquet(simulated / "outs" / "cells.parquet")
    assert cells["cell_id"].tolist() == bundle["cell_id"].tolist()
    centroids_um = bundle[["x_centroid", "y_centroid"]].to_numpy()
    placed = cells[["x_px", "y_px"]].to_numpy()
    np.testing.assert_allclose(warp(centroids_um), placed, rtol=0, atol=1e-9)
    off_um = np.linalg.norm(placed - true_px(simulated, centroids_um), axis=1) * HE_MPP
    assert np.median(off_um) < 0.5


def test_the_matrix_is_one_that_explorer_and_curate_take(registered: Path, simulated: Path) -> None:
    method, he_px_from_xenium_um, _ = read_alignment(registered / "he_imagealignment.csv", 0.2125)
    assert method == "matrix"
    points_um = np.random.default_rng(0).uniform(100, 300, (50, 2))
    off_um = he_px_from_xenium_um(points_um) - true_px(simulated, points_um)
    assert np.abs(off_um).max() * HE_MPP < 2


def test_the_same_command_gives_the_same_bytes(
    registered: Path, simulated: Path, tmp_path: Path
) -> None:
    assert register(simulated, tmp_path) == 0
    assert register(simulated, tmp_path) == 0  # over what it made
    names = {p.name for p in registered.iterdir()}
    assert {"registration.json", "field.npy", "cells.parquet", "he_imagealignment.csv"} <= names
    assert {p.name for p in tmp_path.iterdir()} == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (registered / name).read_bytes(), name


def test_a_given_alignment_is_refined(simulated: Path, tmp_path: Path) -> None:
    assert register(simulated, tmp_path, "--alignment", str(simulated / "he_keypoints.csv")) == 0
    registration, _ = read_registration(tmp_path)
    assert (registration.method, registration.refined) == ("keypoints", True)
    assert registration.keypoints is not None
    assert registration.moved_um is not None
    assert registration.moved_um[0] < 1


@pytest.mark.parametrize("off", [0.8, 1.1])
def test_a_wrong_pixel_size_is_named_and_with_the_right_one_it_passes(
    simulated: Path, tmp_path: Path, off: float, caplog: pytest.LogCaptureFixture
) -> None:
    assert register(simulated, tmp_path, "--mpp", f"{off * HE_MPP}") == 1
    record = json.loads((tmp_path / "registration.json").read_text())
    assert record["verdict"] == "fail"
    told = f"set mpp = {record['implied_mpp']:.4f}"
    assert told in caplog.text
    assert record["implied_mpp"] == pytest.approx(HE_MPP, rel=0.01)
    assert register(simulated, tmp_path, "--mpp", f"{record['implied_mpp']:.4f}") == 0


def test_a_slide_of_glass_is_no_place_and_leaves_nothing_stale(
    simulated: Path, registered: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, slide = tmp_path / "out", tmp_path / "glass.tif"
    shutil.copytree(registered, out)
    tifffile.imwrite(
        slide, np.full((900, 1200, 3), 243, np.uint8), photometric="rgb", tile=(256, 256),
        metadata=None, resolution=(1e4 / HE_MPP, 1e4 / HE_MPP), resolutionunit="CENTIMETER",
    )  # fmt: skip
    assert register(simulated, out, slide=slide) == 1
    record = json.loads((out / "registration.json").read_text())
    assert record["verdict"] in ("fail", "not_assessable")
    assert record["reasons"]
    assert record["he_px_from_xenium_um"] is None
    assert not (out / "field.npy").exists()
    assert not (out / "he_imagealignment.csv").exists()
    assert pd.read_parquet(out / "cells.parquet")["x_px"].isna().all()
    assert f"the registration in {out} will be replaced" in caplog.text
    page = (out / "index.html").read_text()
    assert page.count("data:image/jpeg") == 2
    assert "The cells of the bundle" in page


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--mpp", "-1"), "--mpp"),
        (("--alignment", "none.csv"), "none.csv"),
        (("--slide", "none.tif"), "none.tif"),
    ],
)
def test_bad_input_is_told(
    simulated: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert register(simulated, tmp_path / "out", *more) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_somebodys_alignment_stays_as_it_was(
    simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "he_imagealignment.csv").write_text("mine")
    assert register(simulated, tmp_path) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["he_imagealignment.csv"]
    assert (tmp_path / "he_imagealignment.csv").read_text() == "mine"
