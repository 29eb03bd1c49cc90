"""The registration of a run: what nuclei and gates say together, and what is recorded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import tifffile

from pairing.registration.given import read_alignment
from pairing.registration.record import (
    REGISTRATION_FILE,
    Registration,
    judged,
    read_cell_errors,
    read_registration,
    write_registration,
)
from pairing.registration.stage import Registered, register_run
from pairing.simulate import SimulationParams, simulate
from pairing.slide import open_slide
from pairing.xenium import open_xenium
from shards.errors import BadInput

HE_MPP = 0.2738


def registered(
    run: Path,
    alignment: Path | Literal["auto"],
    *,
    slide: Path | None = None,
    mpp: float | None = None,
    refine: bool = True,
) -> Registered:
    opener = partial(open_slide, slide or run / "he.ome.tif", mpp=mpp)
    with open_xenium(run / "outs") as xenium:
        return register_run(xenium, opener, alignment, refine=refine)


@pytest.fixture(scope="module")
def refined(simulated: Path) -> Registered:
    return registered(simulated, simulated / "he_imagealignment.csv")


def left_part(run: Path, folder: Path, share: float) -> Path:
    """The slide without what lies to the right of a share of its cells."""
    x_px = registered(run, run / "he_imagealignment.csv", refine=False).cells["x_px"]
    width = int(x_px.quantile(share))
    path = folder / "left.tif"
    image = tifffile.imread(run / "he.ome.tif")[:, :width]
    tifffile.imwrite(
        path, image, photometric="rgb", tile=(256, 256), metadata=None,
        resolution=(1e4 / HE_MPP, 1e4 / HE_MPP), resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path


def test_a_given_alignment_is_refined_and_the_record_says_how_far(
    simulated: Path, refined: Registered
) -> None:
    found, record = refined, refined.registration
    assert (record.method, record.refined, record.verdict) == ("matrix", True, "pass")
    assert record.reasons == ()
    assert record.density_correlation["given"] > 0.3
    assert record.evidence is not None
    assert record.evidence.share > record.evidence.chance
    assert record.error_um is not None
    assert record.error_um.median_um == pytest.approx(found.cells["error_um"].median())
    with open_xenium(simulated / "outs") as xenium:
        cells = xenium.read_cells()
        _, given, _ = read_alignment(simulated / "he_imagealignment.csv", xenium.pixel_size_um)
    moved_px = found.cells[["x_px", "y_px"]] - given(cells[["x_um", "y_um"]])
    moved_um = np.linalg.norm(moved_px, axis=1) * HE_MPP
    assert record.moved_um == pytest.approx(np.quantile(moved_um, (0.5, 0.95, 1)).tolist())


def test_without_refinement_an_alignment_is_taken_as_it_is(simulated: Path) -> None:
    found = registered(simulated, simulated / "he_imagealignment.csv", refine=False)
    record = found.registration
    assert (record.refined, record.field, record.evidence) == (False, None, None)
    assert (record.moved_um, record.error_um, record.verdict) == (None, None, "pass")
    assert found.cells["error_um"].isna().all()


def test_what_is_written_is_what_is_read(
    simulated: Path, refined: Registered, tmp_path: Path
) -> None:
    found = refined
    assert found.he_px_from_xenium_um is not None
    write_registration(tmp_path, found.registration, found.he_px_from_xenium_um, found.cells)
    record, warp = read_registration(tmp_path)
    assert record == found.registration
    with open_xenium(simulated / "outs") as xenium:
        cells_um = xenium.read_cells()[["x_um", "y_um"]].to_numpy()
    np.testing.assert_array_equal(warp(cells_um), found.cells[["x_px", "y_px"]])
    np.testing.assert_allclose(warp.inverse(warp(cells_um)), cells_um, atol=1e-4)
    errors = read_cell_errors(tmp_path)
    assert errors.index.tolist() == found.cells["cell_id"].tolist()
    np.testing.assert_array_equal(errors, found.cells["error_um"])


def test_cells_beside_the_slide_are_a_failure_only_where_nuclei_do_not_fit(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    simulate(run, SimulationParams(n_cells=900, seed=8))
    slide = left_part(run, tmp_path, 0.45)
    alignment = run / "he_imagealignment.csv"
    given = registered(run, alignment, slide=slide, refine=False).registration
    assert given.verdict == "fail"
    assert f"{given.share_on_slide:.1%} of the cells lie on the slide" in given.reasons
    refined = registered(run, alignment, slide=slide).registration
    assert 0.4 < refined.share_on_slide < 0.5
    assert f"{refined.share_on_slide:.1%} of the cells lie on the slide" in refined.reasons
    assert (refined.refined, refined.verdict) == (True, "doubtful"), refined.reasons


def test_too_few_nuclei_leave_the_pixel_size_to_be_judged(
    simulated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pairing.registration.automatic.MIN_NUCLEI", 1000)
    alignment = simulated / "he_imagealignment.csv"
    given = registered(simulated, alignment).registration
    assert (given.verdict, given.refined, given.error_um) == ("not_assessable", False, None)
    assert given.reasons[0].endswith("taken as given")
    off = registered(simulated, alignment, mpp=1.1 * HE_MPP).registration
    assert off.verdict == "fail"
    assert "set mpp = 0.2738" in off.reasons[0]
    automatic = registered(simulated, "auto")
    assert automatic.registration.verdict == "not_assessable"
    assert automatic.registration.he_px_from_xenium_um is None
    assert automatic.cells["x_px"].isna().all()


def test_evidence_of_few_nuclei_never_passes(
    simulated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pairing.registration.automatic.MIN_HELD_OUT", 1000)
    automatic = registered(simulated, "auto").registration
    assert automatic.verdict == "not_assessable"
    assert automatic.evidence is not None
    assert automatic.reasons == (
        f"{automatic.evidence.n_held_out} nuclei held out of the fit lie on tissue of the slide, "
        "fewer than 1000: too few to judge by",
    )
    given = registered(simulated, simulated / "he_imagealignment.csv").registration
    assert (given.verdict, given.refined) == ("not_assessable", False)
    assert given.reasons[0].endswith("taken as given")


def test_a_record_without_a_transform_has_none_to_be_read(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pairing.registration.automatic.MIN_NUCLEI", 1000)
    found = registered(simulated, "auto")
    write_registration(tmp_path, found.registration, None, found.cells)
    with pytest.raises(BadInput, match=r"(?s)a transform.*not_assessable: .*fewer than 1000"):
        read_registration(tmp_path)
    assert read_cell_errors(tmp_path).isna().all()
    assert (tmp_path / REGISTRATION_FILE).exists()


def test_a_median_error_above_the_limit_is_a_failure(refined: Registered) -> None:
    record = refined.registration
    assert judged(record, 5.0) is record
    strict = judged(record, 0.05)
    assert strict.verdict == "fail"
    assert any("more than 0.05 µm" in reason for reason in strict.reasons)
    unassessed: Registration = record.model_copy(update={"evidence": None, "error_um": None})
    assert judged(unassessed, 0.05) is unassessed
