"""The pages of real curations: what they say, that they are one file, that nothing breaks out."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.cluster import BlockMap, Runtime
from flows.config import CurateConfig, read_curate_config
from flows.history import HISTORY_FILE, HistoryEntry, StageHistory, append_history, read_history
from flows.local import curate_and_remember
from flows.pipeline import Curated
from flows.report import RetrievalLine, read_retrieval, write_evaluation_page, write_report
from flows.report.views import chosen_places
from pairing.simulate import SimulationParams, simulate
from shards.errors import BadInput
from trainer.evaluate import Evaluation
from trainer.train import COLUMNS

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
N_CELLS = 240


class Page(HTMLParser):
    """Tags, sources of images, links, and tables as rows of cell texts, by section id."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._section = ""
        self._in_cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        if tag == "img":
            self.images.append(given["src"] or "")
        if tag == "a":
            self.links.append(given["href"] or "")
        if tag == "section":
            self._section = given["id"] or ""
        if tag == "tr":
            self.tables.setdefault(self._section, []).append([])
        if tag in ("td", "th"):
            self._in_cell = True
            self.tables[self._section][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.tables[self._section][-1][-1] += data.strip()

    def number(self, section: str, name: str) -> int:
        """The first figure of the row of a section's tables that starts with `name`."""
        row = next(r for r in self.tables[section] if r and r[0] == name)
        return int(row[1].lstrip("− ").replace(",", ""))


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> tuple[CurateConfig, Curated]:
    folder = tmp_path_factory.mktemp("report")
    simulate(folder / "raw", SimulationParams(n_cells=N_CELLS, seed=3))
    simulate(folder / "other", SimulationParams(n_cells=N_CELLS, seed=4))
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


def decoded(uri: str) -> Image.Image:
    head, data = uri.split(",", 1)
    assert head in ("data:image/jpeg;base64", "data:image/png;base64")
    picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    picture.load()
    return picture


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
    # Three zooms, four places, residuals of keypoints, five charts, three maps and the gallery;
    # DAPI has neither keypoints nor matches.
    assert len(pages["he"].images) == 3 + 4 + 1 + 5 + 3 + 24
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
    assert dataset.totals.seen == 2 * N_CELLS


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
    assert he.number("match", "cells with an H&E nucleus") > 0.8 * N_CELLS
    assert "registration" not in pages["dapi"].tables


def test_fingerprints_are_those_of_the_artifacts(
    pages: dict[str, Page], curated: tuple[CurateConfig, Curated]
) -> None:
    for run in curated[1].runs:
        rows = {row[0]: row for row in pages[run.config.id].tables["fingerprints"]}
        for stage, built in run.built.items():
            assert built.fingerprint in rows[stage][2]
            assert rows[stage][1] == "made"


def test_the_same_input_gives_the_same_bytes(curated: tuple[CurateConfig, Curated]) -> None:
    folder = write_report(*curated).parent
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_report(*curated)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


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


# The evaluation.


def lines(method: str, **changes: float) -> Iterator[RetrievalLine]:
    for scope, n in (("batch", 64), ("all", 130)):
        for direction, r_at_5 in (("image_to_genes", 0.25), ("genes_to_image", 0.3125)):
            values = {"r_at_1": 0.1, "r_at_5": r_at_5, "r_at_10": 0.5, "median_rank": 11.5}
            yield RetrievalLine.model_validate(
                {
                    "method": method,
                    "scope": scope,
                    "direction": direction,
                    "n_queries": 128,
                    "n_candidates": n,
                    **values,
                    **changes,
                }
            )


@pytest.fixture
def evaluation(tmp_path: Path) -> tuple[Path, Path]:
    """What the trainer leaves, written through its own record, and its metrics."""
    record = Evaluation.model_validate(
        {
            "checkpoint": "c0ffee",
            "step": 400,
            "dataset": "da7a",
            "split": "test",
            "n_samples": 130,
            "n_samples_by_donor": {HOSTILE: 130},
            "genes_unknown_to_model": {"beef": 3},
            "batch_size": 64,
            "n_batches": 2,
            "n_left_over": 2,
            "seed": 0,
            "tie_rule": "ties share",
            "retrieval": [
                line.model_dump()
                for m in ("model", "shuffled_pairs", "chance")
                for line in lines(m)
            ],
            "not_evaluated": ["ridge: no train split"],
        }
    )
    evaluation_json, metrics_csv = tmp_path / "evaluation.json", tmp_path / "metrics.csv"
    evaluation_json.write_text(record.model_dump_json())
    with metrics_csv.open("w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, restval="")
        writer.writeheader()
        for step in (10, 20, 30):
            row = dict.fromkeys(c for c in COLUMNS if not c.startswith("val_"))
            writer.writerow({**{c: 1 / step for c in row}, "step": step})
    return evaluation_json, metrics_csv


def test_an_evaluation_page_holds_the_table_and_the_curves(
    evaluation: tuple[Path, Path], tmp_path: Path
) -> None:
    oracle = list(lines("oracle", n_candidates=128, r_at_5=0.75))
    path = write_evaluation_page(tmp_path, *evaluation, oracle)
    page = Page(path)
    assert path.name == "evaluation.html"
    assert "script" not in page.tags
    assert HOSTILE in page.text
    assert "ridge: no train split" in page.text
    assert [row for row in page.tables["retrieval"] if row[0] == "model"] == [
        ["model", "10.0%", "25.0%", "50.0%", "11.5", "10.0%", "31.2%", "50.0%", "11.5"]
    ] * 2
    names = [row[0] for row in page.tables["retrieval"] if row[0].startswith("oracle")]
    assert names == ["oracleof 128", "oracleof 128"]
    assert "shuffled pairs" in page.text
    # Loss, recall, rate, temperature, norm: this run was not validated.
    assert len([decoded(uri) for uri in page.images]) == 5


def test_the_index_holds_the_evaluation_when_handed_in(
    evaluation: tuple[Path, Path], curated: tuple[CurateConfig, Curated], tmp_path: Path
) -> None:
    config = curated[0].model_copy(update={"out": tmp_path})
    index = write_report(
        config,
        Curated((), curated[1].failures, None),
        evaluation_json=evaluation[0],
        metrics_csv=evaluation[1],
    )
    page = Page(index)
    assert "retrieval" in page.tables
    assert len(page.images) == 5
    assert "measured on dataset da7a, not on this one" in page.text


def test_lines_are_read_as_the_trainer_wrote_them(evaluation: tuple[Path, Path]) -> None:
    written = json.loads(evaluation[0].read_text())["retrieval"]
    assert [line.model_dump() for line in read_retrieval(evaluation[0])] == written


def test_metrics_of_something_else_are_refused(
    evaluation: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.csv"
    other.write_text("step,accuracy\n1,2\n")
    with pytest.raises(BadInput, match="loss"):
        write_evaluation_page(tmp_path, evaluation[0], other)
    with pytest.raises(BadInput, match=r"missing\.json"):
        write_evaluation_page(tmp_path, tmp_path / "missing.json", None)
