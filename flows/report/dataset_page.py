"""What the page of a whole dataset says: runs, drop reasons, donors, panels, failures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flows.compose import panels_of
from flows.config import CurateConfig
from flows.history import HistoryEntry
from flows.pipeline import Curated
from flows.report.curations import Curation, newest_curations
from flows.report.donors import DonorRow, over_all_runs
from flows.report.rows import RunRow
from flows.report.settings import Setting, dataset_settings, without_folders
from shards.schema import SPLITS, Dataset, Panel, Totals
from shards.unions import names_that_differ, union_path, unions_of


@dataclass(frozen=True, slots=True)
class Failure:
    run: str
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class PanelRow:
    panel_id: str
    species: str
    n_genes: int
    runs: list[str]


@dataclass(frozen=True, slots=True)
class UnionRow:
    """The panels of one species joined: how many genes, and in which file."""

    species: str
    n_panels: int
    n_genes: int
    path: str


@dataclass(frozen=True, slots=True)
class HeldOutRow:
    """A donor who is in test for `split.hold_out`, and because of which samples."""

    donor: str
    source_ids: str


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
    runs: list[RunRow]
    totals: Totals
    reasons: list[str]
    noted: list[str]
    donors: list[DonorRow]
    splits: list[SplitRow]
    panels: list[PanelRow]
    unions: list[UnionRow]
    gene_names: list[str]
    held_out: list[HeldOutRow]
    settings: dict[str, list[Setting]]
    history: list[Curation]


def dataset_page(
    config: CurateConfig,
    curated: Curated,
    runs: Sequence[RunRow],
    history: Sequence[HistoryEntry],
) -> DatasetPage:
    """The page over those of its runs; `history` is of the folder, oldest first."""
    donors = over_all_runs([row for run in runs for row in run.donors])
    panels = panels_of(curated.runs, [run.manifest for run in runs]).values()
    of_runs = [run.manifest.totals for run in runs]
    totals = sum(of_runs, Totals(seen=0, kept=0, dropped={}))
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
        reasons=list(
            dict.fromkeys(reason for run in runs for reason in run.manifest.totals.dropped)
        ),
        noted=list(dict.fromkeys(note for run in runs for note in run.manifest.totals.noted)),
        donors=donors,
        splits=_splits(runs, donors),
        panels=_panels(runs),
        unions=_unions(curated.dataset, panels),
        gene_names=names_that_differ(panels),
        held_out=[
            HeldOutRow(donor, ", ".join(source_ids))
            for donor, source_ids in (curated.dataset.held_out if curated.dataset else {}).items()
        ],
        settings=dataset_settings(config),
        history=newest_curations(history),
    )


def _splits(runs: Sequence[RunRow], donors: Sequence[DonorRow]) -> list[SplitRow]:
    split_of = {row.donor: row.split for row in donors}
    rows = []
    for split in SPLITS:
        shards = [s for run in runs for s in run.manifest.shards if split_of[s.donor] == split]
        rows.append(
            SplitRow(
                split=split,
                n_donors=len({shard.donor for shard in shards}),
                n_shards=len(shards),
                n_pairs=sum(shard.n_samples for shard in shards),
                n_bytes=sum(shard.tar_bytes for shard in shards),
            )
        )
    return rows


def _panels(runs: Sequence[RunRow]) -> list[PanelRow]:
    rows: dict[str, PanelRow] = {}
    for run in runs:
        panel_id = run.manifest.panel_id
        if panel_id not in rows:
            rows[panel_id] = PanelRow(panel_id, run.manifest.species, run.n_genes, [])
        rows[panel_id].runs.append(run.run)
    return list(rows.values())


def _unions(dataset: Dataset | None, panels: Iterable[Panel]) -> list[UnionRow]:
    return [
        UnionRow(species, len(union.places), len(union.genes), union_path(union))
        for species, union in unions_of(panels).items()
        if dataset is not None
    ]
