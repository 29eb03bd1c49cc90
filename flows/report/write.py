"""The pages of a dataset and of an evaluation, as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flows.config import CurateConfig
from flows.history import read_history
from flows.pipeline import Curated
from flows.report.dataset_page import dataset_page
from flows.report.evaluation import RetrievalLine, read_evaluation
from flows.report.render import write_page
from flows.report.rows import write_run

REPORT_FOLDER = "report"
INDEX_FILE = "index.html"
EVALUATION_FILE = "evaluation.html"


def write_report(
    config: CurateConfig,
    curated: Curated,
    *,
    evaluation_json: Path | None = None,
    metrics_csv: Path | None = None,
    extra_lines: Sequence[RetrievalLine] = (),
) -> Path:
    """Write `report/<run>.html` for every curated run and `report/index.html`; returns the latter.

    A run's page that would say the same, but for curations that made nothing of it, stays.

    Runs that failed are told on the index. With `evaluation_json` of the trainer the index holds
    the retrieval table too, and with `metrics_csv` of the training run its curves. What was reused
    or rebuilt is told from `history.jsonl` of the folder. The same input and history give the same
    bytes.
    """
    folder = config.out / REPORT_FOLDER
    splits = curated.dataset.donors if curated.dataset else {}
    history = read_history(config.out)
    runs = []
    for run in curated.runs:
        with run.at_hand():
            runs.append(write_run(folder, config, run, splits, history))
    evaluation = None
    if evaluation_json is not None:
        evaluation = read_evaluation(evaluation_json, metrics_csv, extra_lines)
    index = folder / INDEX_FILE
    write_page(
        index,
        "index.html",
        page=dataset_page(config, curated, runs, history),
        evaluation=evaluation,
    )
    return index


def write_evaluation_page(
    out: Path,
    evaluation_json: Path,
    metrics_csv: Path | None,
    extra_lines: Sequence[RetrievalLine] = (),
) -> Path:
    """Write `out/evaluation.html`: retrieval table and, with `metrics_csv`, training curves.

    `extra_lines` are figures that the trainer can't have, such as a simulator's oracle. Raises
    BadInput where a file is not what the trainer writes.
    """
    page = out / EVALUATION_FILE
    evaluation = read_evaluation(evaluation_json, metrics_csv, extra_lines)
    write_page(page, "evaluation.html", evaluation=evaluation)
    return page
