"""The page of a registration: its figures are the record's, and nothing breaks out of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.report.registration_page import write_registration_page
from flows.report.registration_parts import REGION_UM, transform_figures
from flows.report.registration_words import next_steps
from pairing.geometry import Affine
from pairing.registration.evidence import Evidence
from pairing.registration.given import read_alignment
from pairing.registration.record import (
    CELLS_FILE,
    REGISTRATION_FILE,
    ErrorFigures,
    FieldGrid,
    Registration,
    read_registration,
    write_registration,
)
from pairing.simulate import SimulationParams, simulate
from pairing.simulate.params import SlideParams
from pairing.slide import open_slide
from pairing.warp import Warp
from pairing.xenium import open_xenium
from shards.errors import BadInput
from tests.flows.chromium import Chromium
from tests.flows.report_page import Page, decoded

SCRIPT = "<script>window.ran = true; alert(1)</script>"
PICTURE = '"><img src=x onerror="window.ran = true">'
N_CELLS, N_UNSURE = 700, 90
STEP_UM, FIELD_PX = 100.0, 30.0
EVIDENCE = Evidence(
    n_held_out=233,
    n_he_nuclei=1_812,
    share=0.6123,
    chance=0.1377,
    evidence=0.5504,
    z=17.26,
    residual_um=0.731,
)


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("section")
    simulate(folder, SimulationParams(n_cells=N_CELLS, seed=5, slide=SlideParams(mirror=True)))
    return folder


def registered(section: Path) -> tuple[Registration, Warp, pd.DataFrame]:
    """The exact affine of a section with a made-up field, and made-up errors: a corner is bad."""
    with open_xenium(section / "outs") as run:
        _, affine, _ = read_alignment(section / "he_imagealignment.csv", run.pixel_size_um)
        cells = run.read_cells()
    cells_um = cells[["x_um", "y_um"]].to_numpy()
    low = cells_um.min(axis=0) - STEP_UM
    n_columns, n_rows = (np.ptp(cells_um, axis=0) // STEP_UM + 4).astype(int)
    x, _ = np.meshgrid(np.linspace(-1, 1, n_columns), np.arange(n_rows))
    shift = np.stack([FIELD_PX * x, np.zeros_like(x)], axis=-1).astype(np.float32)
    origin = (float(low[0]), float(low[1]))
    warp = Warp(affine, origin, STEP_UM, shift)
    rng = np.random.default_rng(0)
    error_um = rng.gamma(4.0, 0.1, len(cells))
    corner = np.argsort(cells_um.sum(axis=1))[:N_UNSURE]
    error_um[corner] = rng.uniform(2.5, 60.0, N_UNSURE)
    px = warp(cells_um)
    table = pd.DataFrame(
        {"cell_id": cells["cell_id"], "x_px": px[:, 0], "y_px": px[:, 1], "error_um": error_um}
    )
    with open_slide(section / "he.ome.tif") as slide:
        mpp, size_px = slide.mpp, slide.size_px
    seen = ((px >= 0) & (px < size_px)).all(axis=1)
    registration = Registration(
        method="matrix",
        refined=True,
        he_px_from_xenium_um=affine.matrix,
        field=FieldGrid(origin_um=origin, step_um=STEP_UM),
        n_cells=len(cells),
        slide_mpp=mpp,
        implied_mpp=float(1 / np.sqrt(affine.area_scale)),
        share_on_slide=float(seen.mean()),
        density_correlation={"given": 0.61, "inverse": 0.02, SCRIPT: 0.1},
        keypoints=None,
        evidence=EVIDENCE,
        moved_um=(4.44, 7.77, 8.88),
        error_um=ErrorFigures(
            median_um=float(np.median(error_um[seen])),
            p95_um=float(np.quantile(error_um[seen], 0.95)),
            share_above_2_um=float((error_um[seen] > 2).mean()),
        ),
        verdict="doubtful",
        reasons=(f"because of {SCRIPT}", PICTURE),
    )
    return registration, warp, table


@pytest.fixture(scope="module")
def hostile(section: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished folder and its page, of files whose names would break out of it."""
    folder = tmp_path_factory.mktemp("hostile")
    bundle, slide = folder / PICTURE, folder / f"{PICTURE}.ome.tif"
    alignment = folder / "<script>window.ran = true<&'script>.csv"
    shutil.copytree(section / "outs", bundle)
    shutil.copy(section / "he.ome.tif", slide)
    shutil.copy(section / "he_imagealignment.csv", alignment)
    out = folder / "out"
    out.mkdir()
    write_registration(out, *registered(section))
    write_registration_page(out, bundle, slide, None, alignment)
    return out


@pytest.fixture(scope="module")
def page(hostile: Path) -> Page:
    return Page(hostile / "index.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


def values(page: Page, section: str) -> dict[str, str]:
    return {row[0]: row[1] for row in page.tables[section] if len(row) > 1}


def test_it_is_one_file_that_runs_nothing(page: Page) -> None:
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert page.tags.count("html") == page.tags.count("title") == 1
    assert page.links == []
    # Three zooms, four places, map and histogram of errors, before and after, regions.
    assert len(page.images) == 3 + 4 + 2 + 2 + 1
    assert all(min(decoded(uri).size) > 50 for uri in page.images)


def test_names_and_reasons_become_text(page: Page) -> None:
    assert f"bundle {PICTURE}, matrix <script>window.ran = true<&'script>.csv" in page.text
    assert f"Because of {SCRIPT}." in page.text
    assert f"{PICTURE}.ome.tif · registration" in page.text
    assert SCRIPT in values(page, "transform")


def test_a_browser_shows_it_whole(hostile: Path, browser: Chromium) -> None:
    look = browser.look(hostile / "index.html")
    assert look.problems == []
    assert not look.ran
    assert len(look.images) == 12
    assert min(look.images) > 0
    assert look.overflow_px <= 0
    assert SCRIPT in look.text


def test_its_numbers_are_those_of_the_record(page: Page, hostile: Path) -> None:
    registration, _ = read_registration(hostile)
    evidence = values(page, "evidence")
    assert [evidence[name] for name in list(evidence)[1:]] == [
        "233",
        "1,812",
        "61.2%",
        "13.8%",
        "0.55",
        "17.3",
        "0.73 µm",
    ]
    error = registration.error_um
    assert error is not None
    assert f"half of them {error.median_um:.2f} µm or less" in page.text
    assert f"95 of 100 {error.p95_um:.2f} µm or less" in page.text
    assert f"({error.share_above_2_um:.1%})" in page.text
    transform = values(page, "transform")
    assert transform["mirror image"] == "yes"
    assert transform["µm per pixel, as stated"] == f"{registration.slide_mpp:.4f}"
    assert transform["µm per pixel, as the transform implies"] == f"{registration.implied_mpp:.4f}"
    assert transform["moved by the refinement: median, 95 of 100, most"] == "4.4, 7.8, 8.9 µm"
    assert transform["cells on the slide"] == f"{registration.share_on_slide:.2%}"
    assert transform["given"] == "0.610"


def test_regions_add_up_to_the_cells(page: Page, hostile: Path, section: Path) -> None:
    registration, _ = read_registration(hostile)
    cells = pq.read_table(hostile / CELLS_FILE).to_pandas()
    with open_slide(section / "he.ome.tif") as slide:
        on_slide = (cells["x_px"].between(0, slide.size_px[0])) & (
            cells["y_px"].between(0, slide.size_px[1])
        )
    cells = cells[on_slide]
    corner_mm = np.floor(cells[["x_px", "y_px"]] * registration.slide_mpp / REGION_UM) / 2
    unsure = cells["error_um"] > 2
    grouped = unsure.groupby([corner_mm["x_px"], corner_mm["y_px"]]).agg(["size", "sum", "mean"])
    bad = grouped[(grouped["size"] >= 8) & (grouped["sum"] > 0)]
    expected = {
        (f"{x:g}–{x + 0.5:g}", f"{y:g}–{y + 0.5:g}"): (f"{n:,}", f"{k:,}", f"{share:.1%}")
        for (x, y), n, k, share in bad.itertuples()
    }
    rows = page.tables["regions"][1:]
    assert {(r[0], r[1]): (r[2], r[3], r[4]) for r in rows} == expected
    shares = [float(r[4].rstrip("%")) for r in rows]
    assert shares == sorted(shares, reverse=True)


def test_before_is_the_given_alignment_or_the_affine_alone(
    section: Path, hostile: Path, page: Page, tmp_path: Path
) -> None:
    assert "Before: the alignment as given. After: as registered." in page.text
    # The made-up affine is the given one: what moved the cells is the field.
    moved = re.search(r"moved by ([\d.]+) µm at most", page.text)
    largest = values(page, "transform")["field: largest displacement of a cell"]
    assert moved is not None
    assert float(moved[1]) == pytest.approx(float(largest.split()[0]), abs=0.1)
    registration, warp, cells = registered(section)
    found = registration.model_copy(update={"method": "auto", "moved_um": None, "reasons": ()})
    write_registration(tmp_path, found, warp, cells)
    path = write_registration_page(tmp_path, section / "outs", section / "he.ome.tif", None)
    first = path.read_bytes()
    assert path == tmp_path / "index.html"
    assert "Before: the affine alone, without the field." in Page(path).text
    assert "found from the nuclei alone" in Page(path).text
    write_registration_page(tmp_path, section / "outs", section / "he.ome.tif", None)
    assert path.read_bytes() == first


def test_an_alignment_taken_as_given_has_no_field_and_no_errors(
    section: Path, tmp_path: Path, browser: Chromium
) -> None:
    registration, warp, cells = registered(section)
    as_given = registration.model_copy(
        update={
            "refined": False,
            "field": None,
            "evidence": None,
            "moved_um": None,
            "error_um": None,
            "verdict": "not_assessable",
            "reasons": ("150 nuclei in the run, fewer than 200; taken as given",),
        }
    )
    with open_xenium(section / "outs") as run:
        px = warp.affine(run.read_cells()[["x_um", "y_um"]].to_numpy())
    cells = cells.assign(x_px=px[:, 0], y_px=px[:, 1], error_um=np.nan)
    write_registration(tmp_path, as_given, Warp(warp.affine), cells)
    path = write_registration_page(tmp_path, section / "outs", section / "he.ome.tif", None)
    page = Page(path)
    assert len(page.images) == 3 + 4
    assert "alignment: not assessable" in page.text
    assert "150 nuclei in the run, fewer than 200; taken as given." in page.text
    assert "Judge by eye" in page.text
    assert "Nothing to compare: the transform is an affine alone." in page.text
    assert page.text.count("Not assessed:") == 2
    assert "Not weighed:" in page.text
    assert values(page, "transform")["field: largest displacement of a cell"] == "no field"
    look = browser.look(path)
    assert look.problems == []
    assert min(look.images) > 0
    assert look.overflow_px <= 0


def test_where_no_place_was_found_the_page_says_what_to_do(
    section: Path, tmp_path: Path, browser: Chromium
) -> None:
    registration, _, cells = registered(section)
    none = registration.model_copy(
        update={
            "method": "auto",
            "refined": False,
            "he_px_from_xenium_um": None,
            "field": None,
            "implied_mpp": None,
            "share_on_slide": 0.0,
            "density_correlation": {},
            "evidence": None,
            "moved_um": None,
            "error_um": None,
            "verdict": "fail",
            "reasons": ("nowhere on the slide do nuclei lie as those of the run do",),
        }
    )
    nowhere = cells.assign(x_px=np.nan, y_px=np.nan, error_um=np.nan)
    write_registration(tmp_path, none, None, nowhere)
    path = write_registration_page(tmp_path, section / "outs", section / "he.ome.tif", None)
    page = Page(path)
    assert len(page.images) == 2
    assert "Slide and bundle, each by itself" in page.text
    look = browser.look(path)
    assert look.problems == []
    assert min(look.images) > 0
    assert look.overflow_px <= 0
    assert "Nowhere on the slide do nuclei lie as those of the run do." in page.text
    assert "Check that slide and bundle are of the same section." in page.text
    assert "export the alignment from Xenium Explorer" in page.text


def test_another_bundle_is_refused(section: Path, hostile: Path, simulated: Path) -> None:
    with pytest.raises(BadInput, match="a bundle without 700 of its 700 cells"):
        write_registration_page(hostile, simulated / "outs", section / "he.ome.tif", None)


def test_a_wrong_pixel_size_is_told_with_the_one_to_set(hostile: Path) -> None:
    record = json.loads((hostile / REGISTRATION_FILE).read_text())
    off = {"slide_mpp": 0.25, "implied_mpp": 0.3125, "verdict": "fail"}
    auto = Registration.model_validate({**record, **off, "method": "auto"})
    assert "register again with mpp = 0.3125" in next_steps(auto)[0]
    matrix = Registration.model_validate({**record, **off})
    assert "if the slide states it wrong, set mpp = 0.3125" in next_steps(matrix)[0]
    assert any('alignment = "auto"' in step for step in next_steps(matrix))
    folded = auto.model_copy(
        update={"he_px_from_xenium_um": ((3.6, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 0.0, 1.0))}
    )
    assert next_steps(folded)[0].startswith("One axis came out 20% larger than the other.")
    assert next_steps(folded)[1] == next_steps(auto)[0]


def test_the_files_are_read_by_numpy_alone_as_the_docs_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = Path(__file__).parents[2] / "docs" / "registration.md"
    (snippet,) = re.findall(r"```python\n(.*?)```", docs.read_text("utf-8"), re.DOTALL)
    # Waves of 20 µm and 1 mm, at the nodes that a registration has.
    affine = Affine.similarity(1 / 0.2738, 2.0, (9000.0, 4000.0), mirror=True)
    x, y = np.meshgrid(np.arange(60) * 25.0, np.arange(50) * 25.0)
    waves = np.stack([np.sin(2 * np.pi * y / 1000), np.cos(2 * np.pi * x / 1000)], axis=-1)
    warp = Warp(affine, (100.0, 200.0), 25.0, np.float32(20 / 0.2738 * waves))
    points = np.random.default_rng(1).uniform((60, 160), (1500, 1350), (400, 2))
    px = warp(points)
    error_um = np.linspace(0.1, 4.0, 400)
    cells = pd.DataFrame({"cell_id": [f"cell-{i}" for i in range(400)], "error_um": error_um})
    record = Registration(
        method="auto",
        refined=True,
        he_px_from_xenium_um=affine.matrix,
        field=FieldGrid(origin_um=(100.0, 200.0), step_um=25.0),
        n_cells=400,
        slide_mpp=0.2738,
        implied_mpp=0.2738,
        share_on_slide=1.0,
        density_correlation={},
        keypoints=None,
        evidence=EVIDENCE,
        moved_um=None,
        error_um=None,
        verdict="pass",
        reasons=(),
    )
    write_registration(tmp_path, record, warp, cells.assign(x_px=px[:, 0], y_px=px[:, 1]))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet, names)
    off_um = np.linalg.norm(names["he_px_from_xenium_um"](points) - px, axis=1) * 0.2738
    assert off_um.max() < 0.2
    there = names["he_px_from_xenium_um"](points)
    assert np.abs(names["xenium_um_from_he_px"](there) - points).max() < 1e-6
    assert names["sure"]["cell_id"].tolist() == cells.loc[error_um <= 2, "cell_id"].tolist()


@settings(deadline=None)
@given(
    st.floats(0.5, 8.0),
    st.floats(-3.1, 3.1),
    st.booleans(),
    st.floats(1.0, 1.2),
)
def test_the_figures_of_a_transform_are_those_it_was_made_of(
    scale: float, angle_rad: float, mirror: bool, stretch: float
) -> None:
    turned = Affine.similarity(scale, angle_rad, (100.0, 200.0), mirror=mirror)
    # Pulled along the turned axes, so that the turn stays what it was.
    pulled = turned @ Affine.of(np.diag([stretch, 1.0, 1.0]))
    points = np.array([[0.0, 0.0], [10.0, 20.0], [30.0, 5.0]])
    figures = transform_figures(Warp(pulled), pulled(points), points, 0.5)
    assert figures.mirrored == mirror
    assert figures.turn_deg == pytest.approx(np.rad2deg(angle_rad), abs=1e-6)
    assert figures.px_per_um == pytest.approx(scale * np.sqrt(stretch))
    assert figures.stretch == pytest.approx(stretch - 1, abs=1e-9)
    assert figures.field_um is None
