"""The trainer's figures, as it leaves them in evaluation.json and metrics.csv."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pandas as pd

from flows.report import charts
from flows.report.embed import chart_uri
from shards.dataset import read_record
from shards.errors import BadInput
from shards.schema import Record, Split

Scope = Literal["batch", "all"]
Direction = Literal["image_to_genes", "genes_to_image"]
DIRECTIONS: Final[tuple[Direction, ...]] = ("image_to_genes", "genes_to_image")

_DIRECTIONS_OF: Final = {
    "{}_image_to_genes": "image to genes",
    "{}_genes_to_image": "genes to image",
}
# Chart by chart: the columns of metrics.csv that it holds and their names, its axis, whether that
# is logarithmic.
_CURVES: Final[tuple[tuple[dict[str, str], str, bool], ...]] = (
    ({"loss": "loss"}, "contrastive loss", False),
    (
        {k.format("r1"): name for k, name in _DIRECTIONS_OF.items()},
        "R@1 in the training batch",
        False,
    ),
    (
        {k.format("val_r5"): name for k, name in _DIRECTIONS_OF.items()},
        "validation R@5 in batches",
        False,
    ),
    ({"runs_per_batch": "distinct", "effective_runs": "effective"}, "runs in a batch", False),
    ({"lr": "lr"}, "learning rate", False),
    ({"temperature": "temperature"}, "temperature", False),
    ({"grad_norm": "norm"}, "gradient norm", True),
)


class RetrievalLine(Record):
    """Recall and rank of one method in one scope and direction; chance has no queries."""

    method: str
    scope: Scope
    direction: Direction
    n_queries: int
    n_candidates: int
    r_at_1: float
    r_at_5: float
    r_at_10: float
    median_rank: float


class EvaluationRecord(Record):
    """`evaluation.json` of the trainer; fields are documented there."""

    schema_version: Literal[1]
    checkpoint: str
    step: int
    dataset: str
    split: Split
    n_samples: int
    n_samples_by_donor: dict[str, int]
    genes_unknown_to_model: dict[str, int]
    batch_size: int
    n_batches: int
    n_left_over: int
    seed: int
    tie_rule: str
    retrieval: tuple[RetrievalLine, ...]
    not_evaluated: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RetrievalTable:
    """One scope: for each method its line in either direction (None where it has none)."""

    scope: Scope
    n_candidates: int
    rows: list[tuple[str, list[RetrievalLine | None]]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the templates print of a trained model; `curves` are charts as data URIs."""

    record: EvaluationRecord
    tables: list[RetrievalTable]
    curves: list[str]


def read_retrieval(evaluation_json: Path) -> list[RetrievalLine]:
    """The trainer's own lines."""
    return list(read_record(evaluation_json, EvaluationRecord).retrieval)


def read_evaluation(
    evaluation_json: Path, metrics_csv: Path | None, extra_lines: Sequence[RetrievalLine]
) -> Evaluation:
    """Retrieval tables, with `extra_lines` below the trainer's own, and training curves."""
    record = read_record(evaluation_json, EvaluationRecord)
    lines = (*record.retrieval, *extra_lines)
    return Evaluation(
        record=record,
        tables=list(_tables(lines)),
        curves=read_curves(metrics_csv) if metrics_csv is not None else [],
    )


def _tables(lines: Sequence[RetrievalLine]) -> Iterator[RetrievalTable]:
    scopes: tuple[Scope, ...] = ("batch", "all")
    for scope in scopes:
        inside = [line for line in lines if line.scope == scope]
        if not inside:
            continue
        by_place = {(line.method, line.direction): line for line in inside}
        methods = dict.fromkeys(line.method for line in inside)
        yield RetrievalTable(
            scope=scope,
            n_candidates=inside[0].n_candidates,
            rows=[(m, [by_place.get((m, d)) for d in DIRECTIONS]) for m in methods],
        )


def read_curves(metrics_csv: Path) -> list[str]:
    """Charts of the columns of `metrics.csv`; values are there only at some steps."""
    try:
        metrics = pd.read_csv(metrics_csv)
    except (OSError, ValueError) as error:
        raise BadInput(
            metrics_csv,
            expected="the metrics.csv of a training run",
            found=str(error),
            remedy="give the folder in which the run wrote",
        ) from error
    missing = {"step", *(c for columns, _, _ in _CURVES for c in columns)} - set(metrics.columns)
    if missing:
        raise BadInput(
            metrics_csv,
            expected=f"the columns {', '.join(sorted(missing))}",
            found=", ".join(metrics.columns),
            remedy="give the metrics.csv of a training run of this version",
        )
    result = []
    for columns, label, log in _CURVES:
        series = {}
        for column, name in columns.items():
            known = metrics[["step", column]].dropna()
            if len(known):
                series[name] = (
                    known["step"].to_numpy(np.float64),
                    known[column].to_numpy(np.float64),
                )
        if series:
            result.append(chart_uri(charts.curves(series, "step", label, log=log)))
    return result
