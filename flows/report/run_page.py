"""What the page of one run says: figures, charts and pictures, read from its artifacts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
import shapely
from scipy import sparse

from flows.config import CurateConfig
from flows.pipeline import Built, CuratedRun
from flows.report import charts
from flows.report.embed import chart_uri
from flows.report.gallery import Sample, kept_cell_ids, read_gallery
from flows.report.settings import Setting, run_settings
from flows.report.views import HE_NUCLEUS, HE_UNMATCHED, INSTRUMENT, Scene, View, three_zooms
from pairing import cells, patches
from pairing.geometry import Affine
from pairing.registration.gates import LEAD_DOUBTFUL, MPP_DOUBTFUL, SHARE_DOUBTFUL
from pairing.registration.record import REGISTRATION_FILE, Registration, Verdict
from pairing.slide import Slide, open_slide
from pairing.xenium import open_xenium
from segmentation.segment import NUCLEI_FILE
from shards.artifact import read_artifact
from shards.dataset import read_manifest, read_record
from shards.schema import Manifest, Panel, Totals

N_TOP_GENES = 20
_COUNTS_AT_ONCE = 1 << 22

Mark = Literal["good", "look", "bad", "none"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the minute's judgement: what, what was found, what is good, how it stands."""

    what: str
    found: str
    good: str
    mark: Mark


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
class GeneRow:
    symbol: str
    ensembl: str | None
    n_counts: int
    share_of_counts: float
    share_of_cells: float


@dataclass(frozen=True, slots=True)
class CellFigures:
    """Counts and matches over all cells of the run; `match` figures are None without H&E nuclei."""

    median_counts: float
    median_genes: float
    n_silent_genes: int
    n_matched: int | None
    median_iou: float | None
    median_distance_um: float | None


@dataclass(frozen=True, slots=True)
class RunPage:
    """All that the template of a run's page prints."""

    run: str
    donor: str
    split: str | None
    manifest: Manifest
    verdict: Verdict | None
    registration: Registration | None
    checks: list[Check]
    totals: Totals
    figures: CellFigures
    counts_qc: dict[str, Any]
    cells_summary: dict[str, Any]
    patches_summary: dict[str, Any]
    top_genes: list[GeneRow]
    charts: dict[str, str]
    views: list[View]
    corners: list[View]
    colours: dict[str, tuple[int, int, int]]
    gallery: list[Sample]
    settings: dict[str, list[Setting]]
    stages: list[StageFacts]


def run_page(config: CurateConfig, curated: CuratedRun, split: str | None) -> RunPage:
    """Everything about one curated run; opens its bundle and its slide for the pictures.

    `split` is where its donor went in the dataset, None where no dataset was published.
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
    n_by_gene, n_cells_by_gene = _by_gene(counts)
    summary = built["cells"].summary
    figures = _figures(table, counts, n_by_gene, has_nuclei="nuclei" in built)
    return RunPage(
        run=curated.config.id,
        donor=curated.config.donor,
        split=split,
        manifest=manifest,
        verdict=registration.verdict if registration else None,
        registration=registration,
        checks=_checks(registration, manifest.totals, figures, summary, built["patches"].summary),
        totals=manifest.totals,
        figures=figures,
        counts_qc=summary["counts"],
        cells_summary=summary,
        patches_summary=built["patches"].summary,
        top_genes=_top_genes(panel, n_by_gene, n_cells_by_gene, len(table)),
        charts=_charts(table, counts, n_by_gene, config.filters.min_counts),
        views=views,
        corners=corners,
        colours={"instrument": INSTRUMENT, "he_nucleus": HE_NUCLEUS, "he_unmatched": HE_UNMATCHED},
        gallery=read_gallery(built["shards"].folder, manifest, panel),
        settings=run_settings(config, curated.config),
        stages=[_stage_facts(b) for b in built.values()],
    )


@contextmanager
def _open_image(curated: CuratedRun) -> Iterator[Slide]:
    run = curated.config
    if run.slide is not None:
        with open_slide(run.slide, mpp=run.mpp) as slide:
            yield slide
    else:
        with patches.open_run_morphology(run.xenium) as slide:
            yield slide


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
        he_nuclei, he_matched = _he_nuclei(curated, table)
        return three_zooms(
            Scene(
                slide=slide,
                grey_scale=tuple(grey) if grey else None,
                fov_um=config.patch.fov_um,
                cells_px=cells_px,
                shown_px=cells_px[kept],
                instrument_nuclei=shapely.transform(polygons_um, image_px_from_xenium_um),
                he_nuclei=he_nuclei,
                he_matched=he_matched,
            )
        )


def _he_nuclei(
    curated: CuratedRun, table: pd.DataFrame
) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.bool_]]:
    if "nuclei" not in curated.built:
        return np.zeros(0, object), np.zeros(0, bool)
    nuclei = pq.read_table(
        curated.built["nuclei"].folder / NUCLEI_FILE, columns=["nucleus_id", "polygon_px"]
    )
    matched = np.isin(nuclei["nucleus_id"].to_numpy(), table["he_nucleus_id"].dropna().to_numpy())
    return shapely.from_wkb(nuclei["polygon_px"].to_pylist()), matched


def _by_gene(
    counts: sparse.csr_matrix,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Counts of each gene, and cells that have any, in one pass of bounded memory."""
    n_genes = counts.shape[1]
    n_counts, n_cells = np.zeros(n_genes, np.int64), np.zeros(n_genes, np.int64)
    for start in range(0, counts.nnz, _COUNTS_AT_ONCE):
        span = slice(start, start + _COUNTS_AT_ONCE)
        gene = counts.indices[span]
        # Sums of whole numbers below 2^53: exact in the float64 that bincount adds up in.
        n_counts += np.bincount(gene, counts.data[span], n_genes).astype(np.int64)
        n_cells += np.bincount(gene, minlength=n_genes)
    return n_counts, n_cells


def _top_genes(
    panel: Panel,
    n_by_gene: npt.NDArray[np.int64],
    n_cells_by_gene: npt.NDArray[np.int64],
    n_cells: int,
) -> list[GeneRow]:
    order = np.argsort(-n_by_gene, kind="stable")[:N_TOP_GENES]
    total = int(n_by_gene.sum())
    return [
        GeneRow(
            symbol=panel.genes[g].symbol,
            ensembl=panel.genes[g].ensembl,
            n_counts=int(n_by_gene[g]),
            share_of_counts=n_by_gene[g] / total,
            share_of_cells=n_cells_by_gene[g] / n_cells,
        )
        for g in order.tolist()
        if n_by_gene[g]
    ]


def _figures(
    table: pd.DataFrame,
    counts: sparse.csr_matrix,
    n_by_gene: npt.NDArray[np.int64],
    *,
    has_nuclei: bool,
) -> CellFigures:
    matched = table[table["he_nucleus_id"].notna()]
    return CellFigures(
        median_counts=float(table["n_counts"].median()),
        median_genes=float(np.median(np.diff(counts.indptr))),
        n_silent_genes=int((n_by_gene == 0).sum()),
        n_matched=len(matched) if has_nuclei else None,
        median_iou=float(matched["he_iou"].median()) if len(matched) else None,
        median_distance_um=float(matched["he_distance_um"].median()) if len(matched) else None,
    )


def _charts(
    table: pd.DataFrame,
    counts: sparse.csr_matrix,
    n_by_gene: npt.NDArray[np.int64],
    min_counts: int,
) -> dict[str, str]:
    n_counts = table["n_counts"].to_numpy(np.float64)
    figures = {
        "counts_per_cell": charts.histogram(
            n_counts, "counts of a cell", mark=(min_counts, f"min_counts = {min_counts}")
        ),
        "genes_per_cell": charts.histogram(
            np.diff(counts.indptr).astype(np.float64), "genes of a cell"
        ),
        "counts_per_gene": charts.ranked(
            n_by_gene.astype(np.float64), "genes, most counted first", "counts"
        ),
    }
    matched = table[table["he_nucleus_id"].notna()]
    if len(matched):
        figures["iou"] = charts.histogram(
            matched["he_iou"].to_numpy(np.float64),
            "IoU of H&E nucleus and instrument's nucleus",
            limits=(0.0, 1.0),
        )
        figures["distance"] = charts.histogram(
            matched["he_distance_um"].to_numpy(np.float64), "distance of their centroids, µm"
        )
    return {name: chart_uri(figure) for name, figure in figures.items()}


def _checks(
    registration: Registration | None,
    totals: Totals,
    figures: CellFigures,
    summary: dict[str, Any],
    patches_summary: dict[str, Any],
) -> list[Check]:
    return [
        *(_registration_checks(registration) if registration else []),
        *_match_checks(figures, summary),
        *_counts_checks(summary["counts"]),
        Check(
            "Patches over the image's border",
            _share(patches_summary["n_edge"], patches_summary["n_cut"]),
            "few: only cells at the border",
            "none",
        ),
        Check(
            "Cells kept",
            _share(totals.kept, totals.seen),
            "seen = kept + dropped, each with its reason",
            "good" if totals.seen == totals.kept + sum(totals.dropped.values()) else "bad",
        ),
    ]


def _registration_checks(registration: Registration) -> list[Check]:
    marks: dict[Verdict, Mark] = {
        "pass": "good",
        "doubtful": "look",
        "not_assessable": "look",
        "fail": "bad",
    }
    off = registration.implied_mpp / registration.slide_mpp - 1
    checks = [
        Check("Alignment", registration.verdict.replace("_", " "), "pass",
              marks[registration.verdict]),
        Check(
            "Pixel size that the alignment implies",
            f"{registration.implied_mpp:.4f} µm, the slide says {registration.slide_mpp:.4f} "
            f"({off:+.1%})",
            f"within {MPP_DOUBTFUL:.0%}",
            "good" if abs(off) <= MPP_DOUBTFUL else "look",
        ),
        Check(
            "Cells on the slide",
            f"{registration.share_on_slide:.1%}",
            f"at least {SHARE_DOUBTFUL:.0%}",
            "good" if registration.share_on_slide >= SHARE_DOUBTFUL else "look",
        ),
    ]  # fmt: skip
    if registration.density_correlation:
        lead = density_lead(registration)
        checks.append(
            Check(
                "Cell density on stained tissue",
                f"r = {registration.density_correlation['given']:.2f}, {lead:+.2f} before the "
                "best wrong variant",
                f"ahead by at least {LEAD_DOUBTFUL}",
                "good" if lead >= LEAD_DOUBTFUL else "look",
            )
        )
    return checks


def density_lead(registration: Registration) -> float:
    """By how much the transform as given correlates better than the best of its variants."""
    others = [r for name, r in registration.density_correlation.items() if name != "given"]
    return registration.density_correlation["given"] - max(others)


def _match_checks(figures: CellFigures, summary: dict[str, Any]) -> list[Check]:
    if figures.n_matched is None:
        return []
    overlap = ""
    if figures.median_iou is not None:
        overlap = (
            f"; median IoU {figures.median_iou:.2f}, {figures.median_distance_um:.1f} µm apart"
        )
    return [
        Check(
            "Cells with an H&E nucleus",
            _share(figures.n_matched, summary["n_cells"]) + overlap,
            "most; a median distance well below a nucleus",
            "none",
        )
    ]


def _counts_checks(qc: dict[str, Any]) -> list[Check]:
    mismatches = qc["matrix_mismatches"]
    checks = []
    if mismatches is not None:
        checks.append(
            Check(
                "Counts against the bundle's own matrix",
                f"{mismatches:,} of {qc['n_entries']:,} entries differ",
                "0",
                "bad" if mismatches else "good",
            )
        )
    inside = sum(qc["by_category"].values())
    if inside:
        controls = sum(n for name, n in qc["by_category"].items() if name.startswith("negative_"))
        checks.append(
            Check("Negative controls in cells", _share(controls, inside), "next to none", "none")
        )
    return checks


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,}" + (f" ({part / whole:.1%})" if whole else "")


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
