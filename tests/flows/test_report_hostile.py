"""Names that would break out of a page, through a real curation, into a real browser."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from flows.cluster import BlockMap, Runtime
from flows.config import CurateConfig, SegmentationSection, read_curate_config
from flows.history import HistoryEntry, StageHistory, append_history
from flows.local import curate_and_remember
from flows.pipeline import Curated, CuratedRun
from flows.report import write_evaluation_page, write_report
from pairing.simulate import SimulationParams, simulate
from tests.flows.chromium import Chromium, Look

SCRIPT = "<script>window.ran = true; alert(1)</script>"
PICTURE = '"><img src=x onerror="window.ran = true">'
CLOSING = "</title></style></pre></table>"
UP = "../x"
BROKEN = "a\nb <b>bold</b> {{ 7 * 7 }} &lt;"
GENES = (SCRIPT, PICTURE, UP, BROKEN)
CONFIG = """
name = {name}
out = "out"
[patch]
fov_um = 32
size_px = 64
[split.assign]
{picture} = "test"
[[runs]]
id = "he"
source_id = {picture}
xenium = "raw/outs"
slide = "raw/he.ome.tif"
alignment = "raw/he_keypoints.csv"
donors = "donors.csv"
labels = "labels.csv"
tissue = {broken}
[[runs]]
id = "dapi"
xenium = "other/outs"
image = "morphology"
donor = {script}
tissue = {picture}
[[runs]]
id = "broken"
xenium = "other/outs"
slide = "other/he.ome.tif"
alignment = {file}
donor = {script}
"""
FILE = "<script>window.ran = true<&'script>.csv"


class Markup(HTMLParser):
    """Every tag and attribute of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def name_genes(outs: Path, symbols: tuple[str, ...]) -> None:
    """Give the most counted genes of a bundle other symbols, in every file that names them."""
    with h5py.File(outs / "cell_feature_matrix.h5", "r+") as file:
        features = file["matrix/features"]
        names = features["name"].asstr()[:].tolist()
        is_gene = features["feature_type"].asstr()[:] == "Gene Expression"
        matrix = file["matrix"]
        n_counts = np.bincount(matrix["indices"][:], matrix["data"][:], len(names)) * is_gene
        new = dict(zip([names[i] for i in np.argsort(-n_counts)], symbols, strict=False))
        del features["name"]
        features["name"] = np.array([new.get(name, name).encode() for name in names])
    panel = json.loads((outs / "gene_panel.json").read_text())
    for target in panel["payload"]["targets"]:
        data = target["type"]["data"]
        data["name"] = new.get(data["name"], data["name"])
    (outs / "gene_panel.json").write_text(json.dumps(panel))
    transcripts = pq.read_table(outs / "transcripts.parquet")
    at = transcripts.column_names.index("feature_name")
    given = pc.cast(transcripts["feature_name"], pa.string()).to_pylist()
    renamed = pa.array([new.get(name, name) for name in given])
    pq.write_table(
        transcripts.set_column(at, "feature_name", renamed), outs / "transcripts.parquet"
    )


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> tuple[CurateConfig, Curated]:
    folder = tmp_path_factory.mktemp("hostile")
    simulate(folder / "raw", SimulationParams(n_cells=80, seed=3))
    simulate(folder / "other", SimulationParams(n_cells=40, seed=4))
    name_genes(folder / "raw" / "outs", GENES)
    cells = pq.read_table(folder / "raw" / "outs" / "cells.parquet")["cell_id"].to_pylist()
    donors = [(cell, (PICTURE, UP, "D9" * 60)[i % 3]) for i, cell in enumerate(cells)]
    write_csv(folder / "donors.csv", [("cell_id", "donor"), *donors])
    write_csv(
        folder / "labels.csv", [("cell_id", "label"), *((c, SCRIPT + PICTURE) for c in cells)]
    )
    write_csv(folder / FILE, [("fixedX", "fixedY"), ("1", "2")])
    names = {"name": SCRIPT + CLOSING, "script": SCRIPT, "picture": PICTURE, "broken": BROKEN}
    # A string of JSON is one of TOML.
    config = CONFIG.format(**{k: json.dumps(v) for k, v in {**names, "file": FILE}.items()})
    (folder / "curate.toml").write_text(config, encoding="utf-8")
    read = read_curate_config(folder / "curate.toml")
    with BlockMap(Runtime(workers=1)) as blocks:
        done = curate_and_remember(read, blocks, device="cpu", partial_dataset=True)
    return read, Curated(tuple(map(with_notes, done.runs)), done.failures, done.dataset)


def with_notes(run: CuratedRun) -> CuratedRun:
    """As if bundle and slide had something to note, in words that their files choose."""
    noted = dict(run.built)
    for stage, key in (("cells", "notes"), ("patches", "slide_notes")):
        built = noted[stage]
        noted[stage] = replace(built, summary={**built.summary, key: [PICTURE, SCRIPT]})
    return CuratedRun(run.config, noted)


@pytest.fixture(scope="module")
def report(curated: tuple[CurateConfig, Curated]) -> Path:
    config, done = curated
    hostile = HistoryEntry(
        started="2025-01-01T00:00:00Z",
        seconds=1.0,
        cellpair=PICTURE,
        dataset=SCRIPT,
        failures={"he": SCRIPT, PICTURE: PICTURE},
        stages=(
            StageHistory(run="he", stage="cells", fingerprint=PICTURE, reused=False, seconds=0.5),
        ),
    )
    append_history(config.out, hostile)
    evaluation, metrics = evaluation_files(config.out)
    index = write_report(config, done, evaluation_json=evaluation, metrics_csv=metrics)
    write_evaluation_page(index.parent, evaluation, metrics)
    return index.parent


def evaluation_files(folder: Path) -> tuple[Path, Path]:
    """What a trainer leaves that was handed hostile names."""
    line = {
        "method": PICTURE,
        "scope": "all",
        "direction": "image_to_genes",
        "n_queries": 8,
        "n_candidates": 8,
        "r_at_1": 0.1,
        "r_at_5": 0.5,
        "r_at_10": 1.0,
        "median_rank": 3.0,
    }
    record = {
        "schema_version": 1,
        "checkpoint": SCRIPT + CLOSING,
        "step": 3,
        "dataset": PICTURE,
        "split": "test",
        "n_samples": 8,
        "n_samples_by_donor": {SCRIPT: 4, PICTURE: 4},
        "genes_unknown_to_model": {PICTURE: 1},
        "batch_size": 8,
        "n_batches": 1,
        "n_left_over": 0,
        "seed": 0,
        "tie_rule": SCRIPT,
        "retrieval": [line],
        "not_evaluated": [PICTURE],
    }
    evaluation, metrics = folder / "evaluation.json", folder / "metrics.csv"
    evaluation.write_text(json.dumps(record))
    columns = "step,loss,r1_image_to_genes,r1_genes_to_image,lr,temperature,grad_norm"
    others = "val_r5_image_to_genes,val_r5_genes_to_image,runs_per_batch,effective_runs"
    metrics.write_text(f"{columns},{others}\n1,3,0,0,1,1,1,0,0,2,2\n2,2,0,0,1,1,1,0,0,2,2\n")
    return evaluation, metrics


PAGES = ("index", "he", "dapi", "evaluation")


@pytest.fixture(scope="module")
def markup(report: Path) -> dict[str, Markup]:
    return {name: Markup((report / f"{name}.html").read_text("utf-8")) for name in PAGES}


def test_every_page_is_there(report: Path) -> None:
    assert {path.name for path in report.glob("*.html")} == {f"{n}.html" for n in PAGES}


@pytest.mark.parametrize("name", PAGES)
def test_names_become_text_and_never_markup(name: str, markup: dict[str, Markup]) -> None:
    page = markup[name]
    assert not page.tags & {"script", "bold", "iframe", "object", "link", "meta http-equiv"}
    assert not [a for a, _ in page.attributes if a.startswith("on")]
    sources = [value for a, value in page.attributes if a == "src"]
    assert all(value.startswith("data:image/") for value in sources)
    assert PICTURE in page.text
    assert SCRIPT in page.text


def test_genes_tissue_donors_and_notes_are_shown_as_they_are(markup: dict[str, Markup]) -> None:
    for name in (*GENES, "D9" * 60):
        assert name in markup["he"].text
    assert UP in markup["index"].text
    assert f"{BROKEN}, human" in markup["he"].text
    # A note of the bundle and one of the slide.
    assert markup["he"].text.count(f"{PICTURE}.") == 2
    assert f"{SCRIPT}{CLOSING}" in markup["index"].text


def test_no_folder_of_the_machine_is_told(
    curated: tuple[CurateConfig, Curated], markup: dict[str, Markup], tmp_path: Path
) -> None:
    config, done = curated
    assert FILE in markup["index"].text
    assert not [name for name, page in markup.items() if str(config.out.parent) in page.text]
    weights = SegmentationSection(model="/home/somebody/of the lab/weights.pth")
    failures: dict[str, Exception] = {
        "he": OSError(28, "No space left on device", "/scratch/somebody/file.npy"),
        "dapi": RuntimeError("see https://example.org/a/b and /home/somebody/of the lab/log.txt"),
    }
    elsewhere = config.model_copy(update={"out": tmp_path, "segmentation": weights})
    index = write_report(elsewhere, Curated(done.runs, failures, None))
    for page in (index, index.with_name("he.html")):
        text = Markup(page.read_text("utf-8")).text
        assert "somebody" not in text
        assert "weights.pth" in text
    told = Markup(index.read_text("utf-8")).text
    assert "No space left on device: 'file.npy'" in told
    assert "see https://example.org/a/b and log.txt" in told


@pytest.fixture(scope="module")
def looks(report: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Look]]:
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield {name: browser.look(report / f"{name}.html") for name in PAGES}


@pytest.mark.parametrize("name", PAGES)
def test_a_browser_shows_the_page_and_runs_nothing(name: str, looks: dict[str, Look]) -> None:
    look = looks[name]
    assert look.problems == []
    assert not look.ran
    assert SCRIPT in look.text
    assert look.images
    assert min(look.images) > 0
    assert look.overflow_px <= 0


def test_the_browser_would_tell(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    wide = '<div style="width: 2000px">wide</div>'
    page.write_text(f"<title>bad</title><p>{PICTURE}{SCRIPT}{wide}")
    with Chromium(tmp_path / "profile") as browser:
        look = browser.look(page)
    assert look.ran
    assert look.images == [0]
    assert look.overflow_px > 700
    assert any("dialog: 1" in problem for problem in look.problems)
    assert any("ERR_FILE_NOT_FOUND" in problem for problem in look.problems)
