"""The gates of a given alignment: pixel sizes that disagree, files mixed up, damage in the way."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from pairing.registration.record import Registration
from pairing.registration.stage import register_run
from pairing.slide import open_slide
from pairing.xenium import open_xenium
from shards.errors import BadInput
from tests.pairing.slides import place_of

HE_MPP = 0.2738  # of the simulated slide; its alignment implies the same


def assessed(run: Path, slide_path: Path, alignment: Path, mpp: float | None) -> Registration:
    """By its gates alone."""
    opener = partial(open_slide, slide_path, mpp=mpp)
    with open_xenium(run / "outs") as xenium:
        return register_run(xenium, opener, alignment, refine=False).registration


@pytest.mark.parametrize("file", ["he_imagealignment.csv", "he_keypoints.csv"])
@pytest.mark.parametrize(
    ("off", "verdict", "words"),
    [
        (1.01, "pass", None),
        (0.99, "pass", None),
        (1.03, "doubtful", r"implies 0\.2738 µm per pixel, 0\.2820 is stated \(-2\.9%\)"),
        (0.97, "doubtful", r"implies 0\.2738 µm per pixel, 0\.2656 is stated \(\+3\.1%\)"),
        (1.10, "fail", r"0\.3012 is stated \(-9\.1%\); if .* right, set mpp = 0\.2738"),
        (0.90, "fail", r"0\.2464 is stated \(\+11\.1%\); if .* right, set mpp = 0\.2738"),
        (1.50, "fail", r"0\.4107 is stated \(-33\.3%\); if .* right, set mpp = 0\.2738"),
        (0.50, "fail", r"0\.1369 is stated \(\+100\.0%\); if .* right, set mpp = 0\.2738"),
    ],
)
def test_a_wrong_pixel_size_is_silent_doubtful_or_a_failure(
    simulated: Path, file: str, off: float, verdict: str, words: str | None
) -> None:
    registration = assessed(simulated, simulated / "he.ome.tif", simulated / file, HE_MPP * off)
    assert registration.verdict == verdict
    assert registration.implied_mpp == pytest.approx(HE_MPP, rel=1e-3)
    assert registration.slide_mpp == HE_MPP * off
    if words is None:
        assert registration.reasons == ()
    else:
        assert len(registration.reasons) == 1
        assert re.search(words, registration.reasons[0])


def test_a_slide_without_a_pixel_size_names_the_option(simulated: Path, tmp_path: Path) -> None:
    path = tmp_path / "he.tif"
    tifffile.imwrite(path, np.full((64, 64, 3), 200, np.uint8), photometric="rgb", metadata=None)
    with pytest.raises(BadInput, match=r"(?s)pixel size.*mpp = .*--mpp"):
        assessed(simulated, path, simulated / "he_imagealignment.csv", None)


@pytest.fixture(scope="module")
def two_files(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The slide, and beside it an export of it at three quarters of the resolution."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copyfile(simulated / "he.ome.tif", folder / "A_he_image.ome.tif")
    (folder / "A_he_image.ome.tif.md5").write_text("0  A_he_image.ome.tif\n")
    (folder / "A_he_image.svs").write_text("no slide")
    with open_slide(simulated / "he.ome.tif") as slide:
        width, height = (int(n * 0.75) for n in slide.size_px)
        smaller = slide.read_at((0, 0, width, height), HE_MPP / 0.75)
    write_plain(folder / "A_he_image.tif", smaller, HE_MPP / 0.75)
    return folder


def write_plain(path: Path, image: Any, mpp: float) -> None:
    tifffile.imwrite(
        path, image, photometric="rgb", tile=(256, 256), metadata=None,
        resolution=(1e4 / mpp, 1e4 / mpp), resolutionunit="CENTIMETER",
    )  # fmt: skip


def test_the_tif_beside_the_ome_tif_is_told_apart(simulated: Path, two_files: Path) -> None:
    alignment = simulated / "he_imagealignment.csv"
    right = assessed(simulated, two_files / "A_he_image.ome.tif", alignment, None)
    assert (right.verdict, right.reasons) == ("pass", ())
    wrong = assessed(simulated, two_files / "A_he_image.tif", alignment, None)
    assert wrong.verdict == "fail"
    assert wrong.reasons[0] == (
        "the alignment implies 0.2738 µm per pixel, 0.3651 is stated (-25.0%); "
        "A_he_image.ome.tif beside it says 0.2738: the alignment is of that file, give it as slide"
    )


def test_a_file_of_another_name_or_pixel_size_is_not_recommended(
    simulated: Path, two_files: Path, tmp_path: Path
) -> None:
    shutil.copyfile(two_files / "A_he_image.tif", tmp_path / "A_he_image.tif")
    shutil.copyfile(simulated / "he.ome.tif", tmp_path / "B_he_image.ome.tif")
    write_plain(tmp_path / "A_he_image.ome.tif", np.full((300, 300, 3), 200, np.uint8), 0.5)
    alignment = simulated / "he_imagealignment.csv"
    wrong = assessed(simulated, tmp_path / "A_he_image.tif", alignment, None)
    assert wrong.verdict == "fail"
    assert wrong.reasons[0].endswith("if the alignment is right, set mpp = 0.2738")


def test_damage_of_the_level_that_the_gates_read_stops_nothing(
    simulated: Path, tmp_path: Path
) -> None:
    path = tmp_path / "he.ome.tif"
    shutil.copyfile(simulated / "he.ome.tif", path)
    with tifffile.TiffFile(path) as file:
        n_levels = len(file.series[0].levels)
    for level in range(n_levels):
        offset, count = place_of(path, 0, level)
        with path.open("r+b") as f:
            f.seek(offset)
            f.write(b"\xff\x00" * (count // 2))
    whole = assessed(simulated, simulated / "he.ome.tif", simulated / "he_keypoints.csv", None)
    found = assessed(simulated, path, simulated / "he_keypoints.csv", None)
    assert found.implied_mpp == whole.implied_mpp
    assert found.density_correlation.keys() == whole.density_correlation.keys()


def test_an_alignment_is_of_a_slide_in_colour(simulated: Path, tmp_path: Path) -> None:
    path = tmp_path / "he.tif"
    grey = np.full((300, 300), 200, np.uint8)
    tifffile.imwrite(path, grey, metadata=None, resolution=(4e4, 4e4), resolutionunit=3)
    with pytest.raises(BadInput, match=r"(?s)three channels.*found:    1 channel of uint8"):
        assessed(simulated, path, simulated / "he_imagealignment.csv", None)
