"""The history of a folder, as the pages list it: what was reused or rebuilt, when, how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flows.history import HistoryEntry, StageHistory

N_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Curation:
    """One curation of the folder."""

    entry: HistoryEntry
    n_made: int
    n_reused: int


@dataclass(frozen=True, slots=True)
class RunCuration:
    """What one curation did for one run; `failure` is the kind of the exception, if it failed."""

    entry: HistoryEntry
    stages: dict[str, StageHistory]
    failure: str | None


def newest_curations(history: Sequence[HistoryEntry]) -> list[Curation]:
    """The last N_SHOWN, newest first; `history` is oldest first."""
    return [
        Curation(
            entry=entry,
            n_made=sum(not stage.reused for stage in entry.stages),
            n_reused=sum(stage.reused for stage in entry.stages),
        )
        for entry in history[: -N_SHOWN - 1 : -1]
    ]


def newest_of_run(history: Sequence[HistoryEntry], run: str) -> list[RunCuration]:
    """The last N_SHOWN curations that looked at `run`, newest first; `history` is oldest first."""
    rows = []
    for entry in reversed(history):
        stages = {stage.stage: stage for stage in entry.stages if stage.run == run}
        if stages or run in entry.failures:
            rows.append(RunCuration(entry, stages, entry.failures.get(run)))
        if len(rows) == N_SHOWN:
            break
    return rows
