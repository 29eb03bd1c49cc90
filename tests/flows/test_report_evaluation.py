"""The trainer's figures on pages: what it leaves is what is shown."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.config import CurateConfig, RunConfig
from flows.pipeline import Curated
from flows.report import RetrievalLine, read_retrieval, write_evaluation_page, write_report
from shards.errors import BadInput
from tests.flows.report_page import Page, decoded
from trainer.evaluate import Evaluation
from trainer.metrics import COLUMNS

HOSTILE = "<script>alert('x')</script>&\"D1"


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
    # Loss, recall, runs, rate, temperature, norm: this run was not validated.
    assert len([decoded(uri) for uri in page.images]) == 6


def test_the_index_holds_the_evaluation_when_handed_in(
    evaluation: tuple[Path, Path], tmp_path: Path
) -> None:
    run = RunConfig(id="a", xenium=tmp_path / "outs", image="morphology", donor="D1")
    index = write_report(
        CurateConfig(name="pilot", out=tmp_path, runs=(run,)),
        Curated((), {"a": ValueError("no bundle")}, None),
        evaluation_json=evaluation[0],
        metrics_csv=evaluation[1],
    )
    page = Page(index)
    assert "retrieval" in page.tables
    assert len(page.images) == 6
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
