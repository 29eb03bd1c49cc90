"""The pages of real curations: what they say, that they are one file, that nothing breaks out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flows.cluster import BlockMap, Runtime
from flows.config import CurateConfig, SplitSection, read_curate_config
from flows.history import append_history, read_history
from flows.local import curate_and_remember
from flows.pipeline import Curated, CuratedRun
from flows.report import write_report
from flows.report.maps import displacements_um
from flows.report.overlay import read_nuclei
from flows.report.views import chosen_places
from pairing.cells import read_cells
from pairing.registration.record import read_registration
from pairing.simulate import SimulationParams, simulate
from tests.flows.report_page import Page, decoded

HOSTILE = "<script>alert('x')</script>&\"D1"
CONFIG = r"""
name = "a & b </title><script>alert(1)</script>"
out = "out"
[patch]
fov_um = 32
size_px = 96
[filters]
min_counts = 60
[split.assign]
"<script>alert('x')</script>&\"D1" = "train"
M1 = "test"
[[runs]]
id = "he"
xenium = "raw/outs"
slide = "raw/he.ome.tif"
alignment = "raw/he_keypoints.csv"
donor = '''<script>alert('x')</script>&"D1'''
tissue = "<b>bold</b>"
[[runs]]
id = "dapi"
xenium = "other/outs"
image = "morphology"
donor = "M1"
[[runs]]
id = "broken"
xenium = "other/outs"
slide = "other/he.ome.tif"
alignment = "two-points.csv"
donor = "M1"
"""
N_CELLS, N_OTHER = 220, 90


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> tuple[CurateConfig, Curated]:
    folder = tmp_path_factory.mktemp("report")
    simulate(folder / "raw", SimulationParams(n_cells=N_CELLS, seed=3))
    simulate(folder / "other", SimulationParams(n_cells=N_OTHER, seed=4))
    (folder / "two-points.csv").write_text(
        "fixedX,fixedY,alignmentX,alignmentY\n1,1,1,1\n500,500,500,500\n"
    )
    (folder / "curate.toml").write_text(CONFIG, encoding="utf-8")
    config = read_curate_config(folder / "curate.toml")
    with BlockMap(Runtime(workers=1)) as blocks:
        return config, curate_and_remember(config, blocks, device="cpu", partial_dataset=True)


@pytest.fixture(scope="module")
def pages(curated: tuple[CurateConfig, Curated]) -> dict[str, Page]:
    index = write_report(*curated)
    return {path.stem: Page(path) for path in index.parent.glob("*.html")}


def test_there_is_a_page_for_each_run_and_the_index_links_to_them(pages: dict[str, Page]) -> None:
    assert set(pages) == {"index", "he", "dapi"}
    assert {link for link in pages["index"].links if link.endswith(".html")} == {
        "he.html",
        "dapi.html",
    }


def test_a_page_is_one_file_and_runs_nothing(pages: dict[str, Page]) -> None:
    for page in pages.values():
        assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
        assert page.tags.count("html") == page.tags.count("title") == 1
        assert all(re.fullmatch(r"[\w-]+\.html", link) for link in page.links)
        for uri in page.images:
            assert min(decoded(uri).size) > 50
    # Three zooms, four places; residuals of keypoints, errors, before and after, regions; five
    # charts, four maps, four of quality, four of nuclei and the gallery. DAPI has only cells.
    assert len(pages["he"].images) == 3 + 4 + 1 + 2 + 2 + 1 + 5 + 4 + 4 + 4 + 24
    assert len(pages["dapi"].images) == 3 + 4 + 3 + 24


def test_names_are_shown_as_they_are(pages: dict[str, Page]) -> None:
    assert HOSTILE in pages["index"].text
    assert HOSTILE in pages["he"].text
    assert "<b>bold</b>" in pages["he"].text
    assert "a & b </title>" in pages["index"].text


def test_totals_add_up(pages: dict[str, Page], curated: tuple[CurateConfig, Curated]) -> None:
    dataset = curated[1].dataset
    assert dataset is not None
    for name, totals in (
        ("index", dataset.totals),
        ("he", dataset.runs[0].totals),
        ("dapi", dataset.runs[1].totals),
    ):
        page = pages[name]
        dropped = [
            int(row[1].lstrip("− ").replace(",", ""))
            for row in page.tables["totals"]
            if row[0].startswith("dropped: ")
        ]
        seen, kept = (page.number("totals", text) for text in ("cells seen", "kept, in the shards"))
        assert seen == kept + sum(dropped)
        assert (seen, kept) == (totals.seen, totals.kept)
        assert page.number("totals", "dropped: low counts") == totals.dropped["low_counts"] > 0
    assert dataset.totals.seen == N_CELLS + N_OTHER


def test_the_runs_table_adds_up_by_row_and_by_column(pages: dict[str, Page]) -> None:
    head, *rows = pages["index"].tables["runs"]
    first, last = head.index("seen"), head.index("kept")
    figures = np.array(
        [[int(cell.replace(",", "")) for cell in row[first : last + 1]] for row in rows]
    )
    assert (figures[:, 0] == figures[:, 1:].sum(axis=1)).all()
    assert (figures[-1] == figures[:-1].sum(axis=0)).all()


def test_a_failed_run_is_told_without_the_folders_of_this_machine(
    pages: dict[str, Page], curated: tuple[CurateConfig, Curated]
) -> None:
    index = pages["index"]
    assert "published without 1 failed run" in index.text
    assert "two-points.csv" in index.text
    assert "at least three keypoints" in index.text
    folder = str(curated[0].out.parent)
    assert not any(folder in page.text for page in pages.values())


def test_without_a_dataset_the_index_says_so(
    curated: tuple[CurateConfig, Curated], tmp_path: Path
) -> None:
    config, done = curated
    failed = Curated((), done.failures, None)
    index = Page(write_report(config.model_copy(update={"out": tmp_path}), failed))
    assert "not published" in index.text
    assert "at least three keypoints" in index.text


def test_a_run_with_a_slide_shows_its_alignment_and_matches(pages: dict[str, Page]) -> None:
    he = pages["he"]
    rows = {row[0]: row for row in he.tables["registration"] if row}
    assert list(rows)[1:8] == [
        "given",
        "inverse",
        "mirrored x",
        "mirrored y",
        "turned 90",
        "turned 180",
        "turned 270",
    ]
    assert all(float(rows["given"][1]) > float(rows[name][1]) for name in list(rows)[2:8])
    assert rows["keypoints"][1] == "16"
    assert he.number("registration", "nuclei held out, on the slide") > 50
    assert re.search(r"half of them \d+\.\d\d µm or less", he.text)
    moved = rows["moved by the refinement: median, 95 of 100, most"][1].split()
    assert f"a cell was moved by {moved[2]} µm at most, by {moved[0][:-1]} µm" in he.text
    totals = [row[0] for row in he.tables["totals"] if row]
    assert any("registration error" in name for name in totals)
    assert he.number("match", "cells with an H&E nucleus") > 0.7 * N_CELLS
    assert "registration" not in pages["dapi"].tables


def test_displacements_are_as_long_as_the_match_says(
    curated: tuple[CurateConfig, Curated],
) -> None:
    run = curated[1].runs[0]
    table = read_cells(run.built["cells"].folder)
    nuclei = read_nuclei(run, table)
    registration, warp = read_registration(run.built["registration"].folder)
    moved_um = displacements_um(
        table,
        nuclei.instrument,
        nuclei.he_centroids_px(),
        warp,
        registration.slide_mpp,
    )
    measured = np.isfinite(moved_um[:, 0])
    assert measured.sum() > 0.7 * N_CELLS
    assert np.linalg.norm(moved_um[measured], axis=1) == pytest.approx(
        table["he_distance_um"].to_numpy()[measured],
        abs=0.01,  # the middle of a warped outline, and the warped middle
    )


def test_the_fit_is_told_by_place_or_why_it_is_not(pages: dict[str, Page]) -> None:
    assert "The H&E nuclei of" in pages["he"].text
    assert "not on held-out ones" in pages["he"].text
    assert "This run has no H&E slide" in pages["dapi"].text


def test_a_slide_without_segmentation_says_so(
    curated: tuple[CurateConfig, Curated], tmp_path: Path
) -> None:
    config, done = curated
    he = done.runs[0]
    built = {stage: b for stage, b in he.built.items() if stage != "nuclei"}
    elsewhere = config.model_copy(update={"out": tmp_path})
    index = write_report(elsewhere, Curated((CuratedRun(he.config, built),), {}, None))
    page = Page(index.with_name("he.html"))
    assert 'segmentation.model = "none"' in page.text
    assert "match" not in page.tables
    assert "No curation of this run is on record" in page.text


def test_control_rates_are_those_of_the_cells(
    pages: dict[str, Page], curated: tuple[CurateConfig, Curated]
) -> None:
    by_category = curated[1].runs[0].built["cells"].summary["counts"]["by_category"]
    n_inside = sum(by_category.values())
    rows = {row[0]: row[1:] for row in pages["he"].tables["counts"]}
    assert by_category["negative_control_probe"] > 0
    for name in (
        "gene",
        "negative_control_probe",
        "negative_control_codeword",
        "deprecated_codeword",
    ):
        n = by_category.get(name, 0)
        assert rows[name.replace("_", " ")] == [
            f"{n:,}",
            f"{n / N_CELLS:,.3f}",
            f"{n / n_inside:.3%}",
        ]


def test_the_history_tells_what_was_made_reused_and_failed(
    pages: dict[str, Page], curated: tuple[CurateConfig, Curated], tmp_path: Path
) -> None:
    config, done = curated
    (first,) = read_history(config.out)
    assert done.dataset is not None
    n_stages = sum(len(run.built) for run in done.runs)
    _, row = pages["index"].tables["history"]
    assert row[2:6] == [str(n_stages), "0", "broken: BadInput", done.dataset.fingerprint]

    # Twelve more that reused all but the shards of one run; the pages show the last ten.
    stages = tuple(
        s.model_copy(update={"reused": (s.run, s.stage) != ("he", "shards"), "seconds": 7.25})
        for s in first.stages
    )
    for second in range(12):
        started = f"2030-01-01T00:00:{second:02d}Z"
        entry = first.model_copy(update={"started": started, "stages": stages, "failures": {}})
        append_history(tmp_path, entry)
    index = write_report(config.model_copy(update={"out": tmp_path}), done)
    _, *rows = Page(index).tables["history"]
    assert [row[0] for row in rows] == [f"2030-01-01 00:00:{s:02d} UTC" for s in range(11, 1, -1)]
    assert {tuple(row[2:5]) for row in rows} == {("1", str(n_stages - 1), "–")}
    head, *rows = Page(index.with_name("he.html")).tables["history"]
    assert head[1:6] == list(done.runs[0].built)
    assert len(rows) == 10
    for row in rows:
        assert [cell.startswith("reused") for cell in row[1:6]] == [True] * 4 + [False]
        assert row[5].startswith("7.2 s")


def test_fingerprints_are_those_of_the_artifacts(
    pages: dict[str, Page], curated: tuple[CurateConfig, Curated]
) -> None:
    for run in curated[1].runs:
        rows = {row[0]: row for row in pages[run.config.id].tables["fingerprints"]}
        for stage, built in run.built.items():
            assert built.fingerprint in rows[stage][2]
            assert rows[stage][1] == "made"


def test_the_same_input_gives_the_same_bytes(
    pages: dict[str, Page], curated: tuple[CurateConfig, Curated]
) -> None:
    folder = curated[0].out / "report"
    before = {path.name: path.read_bytes() for path in folder.glob("*.html")}
    assert len(before) == len(pages)
    for row in folder.glob(".*.row.json"):  # else pages that would say the same stay
        row.unlink()
    made = {path.name: path.stat().st_ino for path in folder.glob("*.html")}
    write_report(*curated)
    assert {path.name: path.read_bytes() for path in folder.glob("*.html")} == before
    assert made.keys() == before.keys()
    assert all((folder / name).stat().st_ino != inode for name, inode in made.items())


def test_a_page_that_would_say_the_same_stays(
    pages: dict[str, Page], curated: tuple[CurateConfig, Curated]
) -> None:
    config, done = curated
    folder = config.out / "report"
    runs = tuple(
        CuratedRun(run.config, {s: replace(b, reused=True) for s, b in run.built.items()})
        for run in done.runs
    )
    again = replace(done, runs=runs)
    write_report(config, again)
    table = Page(folder / "index.html").tables["runs"]
    before = {path.name: path.stat().st_ino for path in folder.glob("*.html")}
    write_report(config, again)
    after = {path.name: path.stat().st_ino for path in folder.glob("*.html")}
    assert {name for name in after if after[name] != before[name]} == {"index.html"}
    assert Page(folder / "index.html").tables["runs"] == table
    (folder / "he.html").unlink()
    (folder / ".dapi.row.json").write_text("torn")
    write_report(config, again)
    now = {path.name: path.stat().st_ino for path in folder.glob("*.html")}
    assert now.keys() == before.keys()
    assert now["dapi.html"] != before["dapi.html"]
    # Another split is another page.
    other = config.model_copy(update={"split": SplitSection(assign={"Q": "test"})})
    write_report(other, again)
    assert (folder / "he.html").stat().st_ino != now["he.html"]
    write_report(*curated)


def test_the_places_are_in_the_fullest_square_and_in_each_quarter() -> None:
    grid = np.stack(np.meshgrid(np.arange(50.0, 1000, 100), np.arange(50.0, 1000, 100)), -1)
    crowd = np.array([[620.0, 310.0], [640, 330], [630, 320], [610, 300]])
    centre, quarters = chosen_places(np.concatenate([grid.reshape(-1, 2), crowd]), 100.0)
    assert centre.tolist() == [630, 320]
    assert list(quarters) == ["Upper left", "Upper right", "Lower left", "Lower right"]
    assert (quarters["Upper left"] < 500).all()
    assert (quarters["Lower right"] > 500).all()
    one, quarters = chosen_places(np.array([[7.0, 8.0]]), 100.0)
    assert one.tolist() == [7, 8]
    assert list(quarters) == ["Lower right"]
