"""What the page of a whole dataset says: runs, drop reasons, donors, panels, failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flows.config import CurateConfig
from flows.pipeline import Curated
from flows.report.run_page import RunPage
from flows.report.settings import Setting, dataset_settings, without_folders
from shards.schema import SPLITS, Dataset, Totals


@dataclass(frozen=True, slots=True)
class Failure:
    run: str
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class DonorRow:
    """One donor: its split (None where nothing was published), its runs and its pairs."""

    donor: str
    split: str | None
    runs: list[str]
    n_pairs: int


@dataclass(frozen=True, slots=True)
class PanelRow:
    panel_id: str
    species: str
    n_genes: int
    runs: list[str]


@dataclass(frozen=True, slots=True)
class SplitRow:
    split: str
    n_donors: int
    n_shards: int
    n_pairs: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class DatasetPage:
    """All that the template of the dataset's page prints."""

    name: str
    dataset: Dataset | None
    failures: list[Failure]
    runs: list[RunPage]
    totals: Totals
    reasons: list[str]
    noted: list[str]
    donors: list[DonorRow]
    splits: list[SplitRow]
    panels: list[PanelRow]
    settings: dict[str, list[Setting]]


def dataset_page(config: CurateConfig, curated: Curated, runs: Sequence[RunPage]) -> DatasetPage:
    """The page over the pages of its runs."""
    totals = sum((run.totals for run in runs), Totals(seen=0, kept=0, dropped={}))
    return DatasetPage(
        name=config.name,
        dataset=curated.dataset,
        failures=[
            Failure(run, type(error).__name__, without_folders(str(error), config))
            for run, error in curated.failures.items()
        ],
        runs=list(runs),
        totals=totals,
        # In the order in which they are tried, which is the order of each run's own record.
        reasons=list(dict.fromkeys(reason for run in runs for reason in run.totals.dropped)),
        noted=list(dict.fromkeys(note for run in runs for note in run.totals.noted)),
        donors=_donors(runs),
        splits=_splits(runs),
        panels=_panels(runs),
        settings=dataset_settings(config),
    )


def _donors(runs: Sequence[RunPage]) -> list[DonorRow]:
    return [
        DonorRow(
            donor=donor,
            split=next(run.split for run in runs if run.donor == donor),
            runs=[run.run for run in runs if run.donor == donor],
            n_pairs=sum(run.totals.kept for run in runs if run.donor == donor),
        )
        for donor in sorted({run.donor for run in runs})
    ]


def _splits(runs: Sequence[RunPage]) -> list[SplitRow]:
    rows = []
    for split in SPLITS:
        inside = [run for run in runs if run.split == split]
        shards = [shard for run in inside for shard in run.manifest.shards]
        rows.append(
            SplitRow(
                split=split,
                n_donors=len({run.donor for run in inside}),
                n_shards=len(shards),
                n_pairs=sum(shard.n_samples for shard in shards),
                n_bytes=sum(shard.tar_bytes for shard in shards),
            )
        )
    return rows


def _panels(runs: Sequence[RunPage]) -> list[PanelRow]:
    rows: dict[str, PanelRow] = {}
    for run in runs:
        panel_id = run.manifest.panel_id
        if panel_id not in rows:
            rows[panel_id] = PanelRow(
                panel_id, run.manifest.species, run.cells_summary["n_genes"], []
            )
        rows[panel_id].runs.append(run.run)
    return list(rows.values())
