"""A run as the page of its dataset lists it, and what is kept of it while its own page stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.built import cellpair_version
from flows.config import CurateConfig
from flows.history import HistoryEntry
from flows.pipeline import CuratedRun
from flows.report.cell_figures import CellFigures
from flows.report.checks import Check
from flows.report.donors import DonorRow, donor_rows
from flows.report.render import write_page
from flows.report.run_page import run_page
from pairing.registration.record import Verdict
from shards.artifact import write_atomically
from shards.dataset import read_manifest, read_record
from shards.errors import BadInput
from shards.schema import Manifest, Record, Split, digest


class KeptRow(Record):
    """`report/.<run>.row.json`: what a run's page found in its artifacts; no donor."""

    says: str  # a digest of all that the page was written of
    verdict: Verdict | None
    checks: tuple[Check, ...]
    figures: CellFigures


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run on the page of its dataset."""

    run: str
    verdict: Verdict | None
    checks: tuple[Check, ...]
    figures: CellFigures
    donors: list[DonorRow]
    manifest: Manifest
    n_genes: int


def write_run(
    folder: Path,
    config: CurateConfig,
    curated: CuratedRun,
    splits: Mapping[str, Split],
    history: Sequence[HistoryEntry],
) -> RunRow:
    """The row of a run; writes its page, unless that was made of the same and nothing is new.

    So a run that is added to hundreds opens its own slide alone, and no page is held in memory
    while the next is made. A page that stays tells the curations until it was written.
    """
    run, built = curated.config.id, curated.built
    manifest = read_manifest(built["shards"].folder)
    donors = donor_rows(manifest, built["shards"].summary["n_cells_of_donor"], splits)
    page, state = folder / f"{run}.html", folder / f".{run}.row.json"
    says = _digest(config, curated, donors)
    kept = _read(state) if page.exists() else None
    if kept is None or kept.says != says or not all(b.reused for b in built.values()):
        state.unlink(missing_ok=True)
        told = run_page(config, curated, splits, history)
        write_page(page, "run.html", page=told)
        kept = KeptRow(
            says=says, verdict=told.verdict, checks=tuple(told.checks), figures=told.figures
        )
        write_atomically(state, kept.model_dump_json().encode())
    n_genes = built["cells"].summary["n_genes"]
    return RunRow(run, kept.verdict, kept.checks, kept.figures, donors, manifest, n_genes)


def _digest(config: CurateConfig, curated: CuratedRun, donors: Sequence[DonorRow]) -> str:
    return digest(
        [
            cellpair_version(),
            config.model_dump(mode="json", exclude={"runs"}),
            curated.config.model_dump(mode="json"),
            [built.fingerprint for built in curated.built.values()],
            [[row.donor, row.split] for row in donors],
        ]
    )


def _read(state: Path) -> KeptRow | None:
    try:
        return read_record(state, KeptRow)
    except BadInput:  # none, or of another version: the page is written anew
        return None
