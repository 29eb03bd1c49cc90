"""What the page of one run says: figures, charts and pictures, read from its artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from flows.config import CurateConfig
from flows.history import HistoryEntry
from flows.pipeline import Built, CuratedRun
from flows.report.cell_figures import (
    CategoryRow,
    CellFigures,
    GeneRow,
    by_gene,
    category_rows,
    cell_charts,
    cell_figures,
    top_genes,
)
from flows.report.checks import Check, run_checks
from flows.report.curations import RunCuration, newest_of_run
from flows.report.donors import DonorRow, donor_rows
from flows.report.drawing import View
from flows.report.gallery import Sample, kept_cell_ids, read_gallery
from flows.report.maps import FitMaps, displacements_um, fit_maps
from flows.report.nuclei_parts import NucleiParts, nuclei_parts
from flows.report.overlay import Nuclei, open_image, pictures, read_nuclei
from flows.report.quality_parts import QualityParts, quality_parts
from flows.report.registration_parts import RegistrationParts, registration_parts
from flows.report.settings import Setting, run_settings
from flows.report.views import BEFORE, DONOR, HE_NUCLEUS, HE_UNMATCHED, INSTRUMENT
from pairing import cells, patch_blocks
from pairing.match_rate import MatchRate
from pairing.registration.given import read_alignment
from pairing.registration.record import (
    Registration,
    Verdict,
    judged,
    read_cell_places,
    read_registration,
)
from pairing.slide import Damage, open_slide
from pairing.warp import Warp
from pairing.xenium import open_xenium
from segmentation.config import FACTS_FILE, NUCLEI_FILE, SegmentationFacts
from shards.artifact import read_artifact
from shards.dataset import read_manifest, read_record
from shards.schema import Manifest, Panel, Split, Totals


@dataclass(frozen=True, slots=True)
class StageFacts:
    """One artifact: whether it was made now, its identity, and what it was made from."""

    stage: str
    reused: bool
    fingerprint: str
    version: int
    parents: dict[str, str]
    inputs: dict[str, str]
    provenance: dict[str, str]
    n_files: int


@dataclass(frozen=True, slots=True)
class RunPage:
    """All that the template of a run's page prints."""

    run: str
    donors: list[DonorRow]
    manifest: Manifest
    verdict: Verdict | None
    registration: Registration | None
    parts: RegistrationParts | None
    checks: list[Check]
    fit: FitMaps | None
    segmentation: NucleiParts | None
    why_no_fit: str | None
    totals: Totals
    figures: CellFigures
    counts_qc: dict[str, Any]
    categories: list[CategoryRow]
    cells_summary: dict[str, Any]
    match_rate: MatchRate | None
    patches_summary: dict[str, Any]
    quality: QualityParts
    damage: tuple[Damage, ...]
    top_genes: list[GeneRow]
    charts: dict[str, str]
    views: list[View]
    corners: list[View]
    colours: dict[str, tuple[int, int, int]]
    gallery: list[Sample]
    settings: dict[str, list[Setting]]
    stages: list[StageFacts]
    history: list[RunCuration]


def run_page(
    config: CurateConfig,
    curated: CuratedRun,
    splits: Mapping[str, Split],
    history: Sequence[HistoryEntry],
) -> RunPage:
    """Everything about one curated run; opens its bundle and its slide for the pictures.

    `splits` are those of the dataset's donors; empty where no dataset was published. `history` is
    of the folder, oldest first.
    """
    built = curated.built
    folder = built["cells"].folder
    table = cells.read_cells(folder)
    panel = read_record(folder / cells.PANEL_FILE, Panel)
    counts = cells.read_counts(folder, len(panel.genes))
    manifest = read_manifest(built["shards"].folder)
    kept = table["cell_id"].isin(kept_cell_ids(built["shards"].folder, manifest)).to_numpy()
    registration = warp = None
    if "registration" in built:
        record, warp = read_registration(built["registration"].folder)
        registration = judged(record, config.registration.max_median_error_um)
    nuclei = read_nuclei(curated, table)
    views, corners = pictures(config, curated, warp, nuclei, table, kept)
    fit = None
    if config.cells.unit == "xenium":
        fit = _fit(registration, warp, nuclei, table, folder)
    n_by_gene, n_cells_by_gene = by_gene(counts)
    summary = built["cells"].summary
    # Cells that are H&E nuclei have each its own: there is nothing to match.
    has_nuclei = "nuclei" in built and config.cells.unit == "xenium"
    figures = cell_figures(table, counts, n_by_gene, has_nuclei=has_nuclei)
    return RunPage(
        run=curated.config.id,
        donors=donor_rows(manifest, built["shards"].summary["n_cells_of_donor"], splits),
        manifest=manifest,
        verdict=registration.verdict if registration else None,
        registration=registration,
        parts=_registration_parts(config, curated, registration, warp, nuclei),
        checks=run_checks(
            registration, manifest.totals, figures, fit, summary, built["patches"].summary
        ),
        fit=fit,
        segmentation=_segmentation(curated),
        why_no_fit=None if fit else _why_no_fit(config, curated),
        totals=manifest.totals,
        figures=figures,
        counts_qc=summary["counts"],
        categories=category_rows(summary["counts"]["by_category"], len(table)),
        cells_summary=summary,
        match_rate=MatchRate.model_validate(summary["match"]) if summary["match"] else None,
        patches_summary=built["patches"].summary,
        quality=quality_parts(
            built["patches"].folder,
            table[["x_um", "y_um"]].to_numpy(),
            config.filters,
            manifest.totals,
            built["shards"].summary["n_flagged"],
        ),
        damage=read_record(
            built["patches"].folder / patch_blocks.DAMAGE_FILE, patch_blocks.DamageReport
        ).damage,
        top_genes=top_genes(panel, n_by_gene, n_cells_by_gene, len(table)),
        charts=cell_charts(table, counts, n_by_gene, config.filters.min_counts),
        views=views,
        corners=corners,
        colours={
            "instrument": INSTRUMENT,
            "he_nucleus": HE_NUCLEUS,
            "he_unmatched": HE_UNMATCHED,
            "donor": DONOR,
            "before": BEFORE,
        },
        gallery=read_gallery(built["shards"].folder, manifest, panel),
        settings=run_settings(config, curated.config),
        stages=[_stage_facts(b) for b in built.values()],
        history=newest_of_run(history, curated.config.id),
    )


def _registration_parts(
    config: CurateConfig,
    curated: CuratedRun,
    registration: Registration | None,
    he_px_from_xenium_um: Warp | None,
    nuclei: Nuclei,
) -> RegistrationParts | None:
    """Errors, change and figures of the registration; None for a run that needs none."""
    if registration is None or he_px_from_xenium_um is None:
        return None
    places = read_cell_places(curated.built["registration"].folder)
    run, given = curated.config, None
    with open_xenium(run.xenium) as xenium:
        # As the registration puts them; those of the cells artifact may be their nuclei's.
        at_um = xenium.read_cells().set_index("cell_id")[["x_um", "y_um"]]
        if isinstance(run.alignment, Path):
            _, given, _ = read_alignment(run.alignment, xenium.pixel_size_um)
    with open_image(curated, he_px_from_xenium_um) as slide:
        return registration_parts(
            registration,
            he_px_from_xenium_um,
            places,
            at_um.loc[places["cell_id"]].to_numpy(),
            nuclei.instrument,
            slide,
            given,
            config.patch.fov_um,
        )


def _fit(
    registration: Registration | None,
    he_px_from_xenium_um: Warp | None,
    nuclei: Nuclei,
    table: pd.DataFrame,
    cells_folder: Path,
) -> FitMaps | None:
    """Maps of the fit; None where there are no two kinds of nuclei to compare."""
    if registration is None or he_px_from_xenium_um is None:
        return None
    if not len(nuclei.he_id) or not (nuclei.instrument["cell_index"] >= 0).any():
        return None
    mpp = registration.slide_mpp
    return fit_maps(
        he_px_from_xenium_um(table[["x_um", "y_um"]].to_numpy()) * mpp,
        table,
        displacements_um(
            table, nuclei.instrument, nuclei.he_centroids_px(), he_px_from_xenium_um, mpp
        ),
        pd.read_parquet(cells_folder / cells.REGIONS_FILE),
    )


def _segmentation(curated: CuratedRun) -> NucleiParts | None:
    """Nuclei of the slide; None where none were looked for."""
    if "nuclei" not in curated.built:
        return None
    folder, run = curated.built["nuclei"].folder, curated.config
    facts = read_record(folder / FACTS_FILE, SegmentationFacts)
    assert run.slide is not None, "nuclei are looked for on a slide"
    with open_slide(run.slide, mpp=run.mpp) as slide:
        return nuclei_parts(folder / NUCLEI_FILE, facts, slide.size_px, slide.mpp)


def _why_no_fit(config: CurateConfig, curated: CuratedRun) -> str:
    if config.cells.unit == "he_nuclei":
        return (
            'The cells of this run are the H&E nuclei themselves (unit = "he_nuclei"): none is '
            "matched to the instrument's, and the alignment is judged by the registration alone."
        )
    if curated.config.slide is None:
        return (
            "This run has no H&E slide: patches, cells and nuclei are of one image and in one "
            "frame, so there is no residual, no error and no match to show."
        )
    if "nuclei" not in curated.built:
        return (
            'No nuclei were looked for on the H&E (segmentation.model = "none"): there is nothing '
            "to measure the alignment by, and no match to show."
        )
    return (
        "No nuclei were found on the H&E, or no cell of the instrument has one: there is nothing "
        "to measure the alignment by."
    )


def _stage_facts(built: Built) -> StageFacts:
    record = read_artifact(built.folder)
    assert record is not None
    return StageFacts(
        stage=built.stage,
        reused=built.reused,
        fingerprint=record.fingerprint,
        version=record.stage_version,
        parents=record.parents,
        inputs=record.inputs,
        provenance=record.provenance,
        n_files=len(record.files),
    )
