"""The small files of a bundle: the manifest, the panels and the summary of metrics."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa

from pairing.simulate.bundle.layouts import TRAITS, LayoutFeatures, is_since
from pairing.simulate.bundle.matrix import PROTEINS
from pairing.simulate.bundle.morphology import Z_STEP_UM
from pairing.simulate.bundle.transcripts import Tally
from pairing.simulate.panel import Species, species_of
from pairing.simulate.params import BundleParams
from pairing.simulate.section import PIXEL_UM


def _design(species: Species) -> dict[str, str]:
    return {"design_id": "simulated_v1", "name": f"Simulated {species} panel"}


def gene_panel(names: LayoutFeatures) -> dict[str, Any]:
    """`gene_panel.json`: every target with its codewords, in the order of the matrix."""
    targets = [
        {
            "codewords": list(f.codewords),
            "source": {"category": f.category},
            "type": {
                "data": {"id": f.id, "name": f.name},
                "descriptor": "gene" if is_gene else f.category,
            },
        }
        for f, is_gene in zip(names.features, names.is_gene, strict=True)
    ]
    n_genes = int(names.is_gene.sum())
    species = species_of(f.id for f in names.features)
    panel = {"identity": _design(species), "num_gene_targets": n_genes, "species": species}
    return {"metadata": {"schema": "gene_panel"}, "payload": {"panel": panel, "targets": targets}}


def panel_tsv(names: LayoutFeatures) -> str:
    """`panel.tsv` of XOA 1.0: name and id of every gene."""
    genes = (f for f, is_gene in zip(names.features, names.is_gene, strict=True) if is_gene)
    return "".join(["Name\tID\n", *(f"{f.name}\t{f.id}\n" for f in genes)])


def protein_panel() -> dict[str, Any]:
    """`protein_panel.json`: every protein of the matrix."""
    targets = [
        {"type": {"data": {"id": name, "name": name}, "descriptor": "protein"}} for name in PROTEINS
    ]
    panel = {"identity": {"design_id": "simulated_protein_v1", "name": "Simulated proteins"}}
    return {
        "metadata": {"schema": "protein_panel"},
        "payload": {"panel": panel, "targets": targets},
    }


@dataclass(frozen=True, slots=True)
class Figures:
    """What the manifest and the summary of metrics say of a run."""

    n_cells: int
    transcripts_per_cell: int
    transcripts_per_100um2: float
    region_um2: float
    cells_um2: float
    nuclear_per_100um2: float
    share_in_cells: float  # of gene transcripts of good quality
    share_good: float
    share_of_cells_with_nucleus: float
    z_deviation_um: float

    @classmethod
    def of(cls, cells: pa.Table, tally: Tally, shape: tuple[int, ...]) -> Figures:
        """From the tables; `shape` is DAPI's (Y, X)."""
        per_cell = cells["transcript_counts"].to_numpy()
        cells_um2 = float(cells["cell_area"].to_numpy().sum())
        nuclei_um2 = float(np.nansum(cells["nucleus_area"].to_numpy()))
        return cls(
            n_cells=len(cells),
            transcripts_per_cell=int(np.median(per_cell)),
            transcripts_per_100um2=_ratio(100 * int(per_cell.sum()), cells_um2),
            region_um2=float(shape[0] * shape[1] * PIXEL_UM**2),
            cells_um2=cells_um2,
            nuclear_per_100um2=_ratio(100 * tally.genes_in_nuclei, nuclei_um2),
            share_in_cells=_ratio(tally.genes_in_cells, tally.genes),
            share_good=_ratio(tally.n_good, tally.n),
            share_of_cells_with_nucleus=float((cells["nucleus_count"].to_numpy() > 0).mean()),
            z_deviation_um=tally.z_deviation_um,
        )


def _ratio(part: float, whole: float) -> float:
    """0 of nothing: a run without transcripts has its figures too."""
    return part / whole if whole else 0.0


def experiment(
    name: str, names: LayoutFeatures, figures: Figures, images: dict[str, str], params: BundleParams
) -> dict[str, Any]:
    """`experiment.xenium`: the manifest of the layout; `images` are the files by their keys."""
    traits = TRAITS[params.layout]

    def uuid(role: str) -> str:
        digest = hashlib.sha256(f"{name}/{role}".encode()).digest()
        return str(UUID(bytes=digest[:16], version=4))

    species = species_of(f.id for f in names.features)
    n_custom = int((names.category == "custom_gene").sum())
    manifest = {
        "major_version": traits.format_version, "minor_version": 0, "patch_version": 0,
        "run_name": "simulated", "run_start_time": "2024-05-29T00:00:00Z",
        "region_name": name, "preservation_method": "ffpe",
        "num_cells": figures.n_cells,
        "transcripts_per_cell": figures.transcripts_per_cell,
        "transcripts_per_100um": figures.transcripts_per_100um2,
        "cassette_name": "simulated", "slide_id": "0000000",
        "panel_design_id": _design(species)["design_id"],
        "panel_name": _design(species)["name"], "panel_organism": species.capitalize(),
        "panel_tissue_type": "Simulated",
        "panel_num_targets_predesigned": int(names.is_gene.sum()) - n_custom,
        "panel_num_targets_custom": n_custom,
        "pixel_size": PIXEL_UM, "z_step_size": Z_STEP_UM,
        "instrument_sn": "SIMULATED",
        "instrument_sw_version": "R&D" if params.rnd_version else traits.software.split("-")[1],
        "analysis_sw_version": "R&D" if params.rnd_version else traits.software,
        "experiment_uuid": uuid("experiment"), "cassette_uuid": uuid("cassette"),
        "roi_uuid": uuid("roi"), "well_uuid": uuid("well"),
        "calibration_uuid": uuid("calibration"),
        "images": images,
        "xenium_explorer_files": {"cells_zarr_filepath": "cells.zarr.zip"}
        if params.cells_zarr
        else {},
    }  # fmt: skip
    if is_since(params.layout, "xoa-3.0"):
        by_nucleus = figures.share_of_cells_with_nucleus
        manifest |= {
            "region_area": figures.region_um2, "total_cell_area": figures.cells_um2,
            # Of the middle 95 % of a normal distribution of depths.
            "thickness_of_high_quality_decoded_transcripts": 4 * figures.z_deviation_um,
            "nuclear_transcripts_per_100um": figures.nuclear_per_100um2,
            "fraction_transcripts_assigned": figures.share_in_cells,
            "segmented_cell_stain_frac": 1 - by_nucleus,
            "segmented_cell_boundary_frac": 0.0,
            "segmented_cell_interior_frac": 1 - by_nucleus,
            "segmented_cell_nuc_expansion_frac": by_nucleus,
            "imported_cell_frac": 0.0,
            "segmentation_stain": "Xenium Multi-Tissue Stain" if params.stains else "",
            "panel_type": "predesigned", "panel_predesigned_id": "",
            "chemistry_version": "v1", "analysis_uuid": uuid("analysis"),
        }  # fmt: skip
    return manifest


def image_keys(params: BundleParams, focus: str) -> dict[str, str]:
    """`images` of the manifest; `focus` is the path of the focus image of DAPI."""
    images = {}
    if not is_since(params.layout, "xoa-2.0"):
        images["morphology_filepath"] = "morphology.ome.tif"
    if not is_since(params.layout, "xoa-3.0"):
        # XOA 2.0 goes on naming the image that it no longer writes.
        images["morphology_mip_filepath"] = "morphology_mip.ome.tif"
    return images | {"morphology_focus_filepath": focus}


def metrics_summary(name: str, figures: Figures, names: LayoutFeatures, tally: Tally) -> pa.Table:
    """`metrics_summary.csv`: one row."""

    def share(*categories: str) -> float:
        chosen = np.isin(names.category, categories)
        return _ratio(int(tally.good_of_feature[chosen].sum()), tally.n_good)

    return pa.table(
        {
            "region_name": [name],
            "num_cells_detected": [figures.n_cells],
            "total_cell_area": [figures.cells_um2],
            "region_area": [figures.region_um2],
            "num_transcripts": [tally.n],
            "num_transcripts_high_quality": [tally.n_good],
            "fraction_transcripts_decoded_q20": [figures.share_good],
            "fraction_transcripts_assigned": [figures.share_in_cells],
            "median_genes_transcripts_per_cell": [figures.transcripts_per_cell],
            "nuclear_transcripts_per_100um2": [figures.nuclear_per_100um2],
            "transcripts_per_100um2": [figures.transcripts_per_100um2],
            "negative_control_probe_rate": [share("negative_control_probe")],
            "negative_control_codeword_rate": [share("negative_control_codeword")],
        }
    )
