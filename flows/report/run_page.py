"""What the page of one run says: figures, charts and pictures, read from its artifacts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
import shapely
from shapely import STRtree

from flows.config import CurateConfig, RunConfig
from flows.pipeline import Built, CuratedRun
from flows.report.cell_figures import (
    CellFigures,
    GeneRow,
    by_gene,
    cell_charts,
    cell_figures,
    top_genes,
)
from flows.report.checks import Check, run_checks
from flows.report.donors import DonorRow, donor_rows
from flows.report.gallery import Sample, kept_cell_ids, read_gallery
from flows.report.settings import Setting, run_settings
from flows.report.views import DONOR, HE_NUCLEUS, HE_UNMATCHED, INSTRUMENT, Scene, View, three_zooms
from pairing import cells, patches
from pairing.annotations import CSV_SUFFIX, Outline, read_regions
from pairing.geometry import Affine
from pairing.registration.record import REGISTRATION_FILE, Registration, Verdict
from pairing.slide import Damage, Slide, open_slide
from pairing.xenium import open_xenium
from segmentation.segment import NUCLEI_FILE
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
    checks: list[Check]
    totals: Totals
    figures: CellFigures
    counts_qc: dict[str, Any]
    cells_summary: dict[str, Any]
    patches_summary: dict[str, Any]
    damage: tuple[Damage, ...]
    top_genes: list[GeneRow]
    charts: dict[str, str]
    views: list[View]
    corners: list[View]
    colours: dict[str, tuple[int, int, int]]
    gallery: list[Sample]
    settings: dict[str, list[Setting]]
    stages: list[StageFacts]


def run_page(config: CurateConfig, curated: CuratedRun, splits: Mapping[str, Split]) -> RunPage:
    """Everything about one curated run; opens its bundle and its slide for the pictures.

    `splits` are those of the dataset's donors; empty where no dataset was published.
    """
    built = curated.built
    folder = built["cells"].folder
    table = cells.read_cells(folder)
    panel = read_record(folder / cells.PANEL_FILE, Panel)
    counts = cells.read_counts(folder, len(panel.genes))
    manifest = read_manifest(built["shards"].folder)
    kept = table["cell_id"].isin(kept_cell_ids(built["shards"].folder, manifest)).to_numpy()
    registration = None
    if "registration" in built:
        registration = read_record(built["registration"].folder / REGISTRATION_FILE, Registration)
    views, corners = _pictures(config, curated, registration, table, kept)
    n_by_gene, n_cells_by_gene = by_gene(counts)
    summary = built["cells"].summary
    figures = cell_figures(table, counts, n_by_gene, has_nuclei="nuclei" in built)
    return RunPage(
        run=curated.config.id,
        donors=donor_rows(manifest, built["shards"].summary["n_cells_of_donor"], splits),
        manifest=manifest,
        verdict=registration.verdict if registration else None,
        registration=registration,
        checks=run_checks(
            registration, manifest.totals, figures, summary, built["patches"].summary
        ),
        totals=manifest.totals,
        figures=figures,
        counts_qc=summary["counts"],
        cells_summary=summary,
        patches_summary=built["patches"].summary,
        damage=read_record(
            built["patches"].folder / patches.DAMAGE_FILE, patches.DamageReport
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
        },
        gallery=read_gallery(built["shards"].folder, manifest, panel),
        settings=run_settings(config, curated.config),
        stages=[_stage_facts(b) for b in built.values()],
    )


@contextmanager
def _open_image(curated: CuratedRun) -> Iterator[Slide]:
    run = curated.config
    if run.slide is not None:
        with open_slide(run.slide, mpp=run.mpp) as slide:
            yield slide.tolerant()[0]
    else:
        with patches.open_run_morphology(run.xenium) as slide:
            yield slide.tolerant()[0]


def _pictures(
    config: CurateConfig,
    curated: CuratedRun,
    registration: Registration | None,
    table: pd.DataFrame,
    kept: npt.NDArray[np.bool_],
) -> tuple[list[View], list[View]]:
    with open_xenium(curated.config.xenium) as xenium:
        polygons_um = xenium.read_nuclei()["polygon"].to_numpy(object)
    grey = curated.built["patches"].summary["grey_scale"]
    with _open_image(curated) as slide:
        image_px_from_xenium_um = (
            registration.affine if registration else Affine.scale(1 / slide.mpp)
        )
        cells_px = image_px_from_xenium_um(table[["x_um", "y_um"]].to_numpy())
        he_nuclei, has_cell = _he_nuclei(curated, table)
        return three_zooms(
            Scene(
                slide=slide,
                grey_scale=tuple(grey) if grey else None,
                fov_um=config.patch.fov_um,
                cells_px=cells_px,
                shown_px=cells_px[kept],
                instrument_nuclei=STRtree(shapely.transform(polygons_um, image_px_from_xenium_um)),
                he_matched=STRtree(he_nuclei[has_cell]),
                he_unmatched=STRtree(he_nuclei[~has_cell]),
                donors=_donor_outlines(curated.config),
            )
        )


def _donor_outlines(run: RunConfig) -> list[Outline]:
    if run.donors is None or run.donors.suffix.lower() == CSV_SUFFIX:
        return []
    return [outline for _, outline in read_regions(run.donors)]


def _he_nuclei(
    curated: CuratedRun, table: pd.DataFrame
) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.bool_]]:
    """Polygons on the slide, and whether a cell has each; none where none were looked for."""
    if "nuclei" not in curated.built:
        return np.zeros(0, object), np.zeros(0, bool)
    nuclei = pq.read_table(
        curated.built["nuclei"].folder / NUCLEI_FILE, columns=["nucleus_id", "polygon_px"]
    )
    has_cell = np.isin(nuclei["nucleus_id"].to_numpy(), table["he_nucleus_id"].dropna().to_numpy())
    return shapely.from_wkb(nuclei["polygon_px"].to_pylist()), has_cell


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
