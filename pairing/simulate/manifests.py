"""The JSON files of a bundle: `gene_panel.json` and `experiment.xenium`."""

from __future__ import annotations

import hashlib
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa

from pairing.simulate.panel import Feature
from pairing.simulate.transcripts import QV_MIN, Transcripts

PIXEL_UM = 0.2125


def gene_panel(features: tuple[Feature, ...]) -> dict[str, Any]:
    """`gene_panel.json`: every target with its codewords, in the order of the matrix."""
    targets = [
        {
            "codewords": list(f.codewords),
            "source": {"category": f.category},
            "type": {
                "data": {"id": f.id, "name": f.name},
                "descriptor": "gene" if f.kind is None else f.category,
            },
        }
        for f in features
    ]
    n_genes = sum(f.kind is None for f in features)
    panel = {
        "identity": {"design_id": "simulated_v1", "name": "Simulated human panel"},
        "num_gene_targets": n_genes,
        "species": "human",
    }
    return {"metadata": {"schema": "gene_panel"}, "payload": {"panel": panel, "targets": targets}}


def experiment(
    name: str,
    shape: tuple[int, ...],
    t: Transcripts,
    features: tuple[Feature, ...],
    cells: pa.Table,
) -> dict[str, Any]:
    """`experiment.xenium`: the manifest, with figures from the tables; `shape` is DAPI's (Y, X)."""
    is_gene = np.array([f.kind is None for f in features])[t.feature]
    good = is_gene & (t.qv >= QV_MIN)
    per_cell = cells["transcript_counts"].to_numpy()
    cell_um2 = float(cells["cell_area"].to_numpy().sum())
    nucleus_um2 = float(np.nansum(cells["nucleus_area"].to_numpy()))
    expanded = float((cells["nucleus_count"].to_numpy() > 0).mean())
    n_custom = sum(f.category == "custom_gene" for f in features)
    n_genes = sum(f.kind is None for f in features)

    def uuid(role: str) -> str:
        digest = hashlib.sha256(f"{name}/{role}".encode()).digest()
        return str(UUID(bytes=digest[:16], version=4))

    return {
        "major_version": 5, "minor_version": 0, "patch_version": 0,
        "run_name": "simulated", "run_start_time": "2024-05-29T00:00:00Z",
        "region_name": name, "preservation_method": "ffpe",
        "num_cells": len(cells),
        "transcripts_per_cell": int(np.median(per_cell)),
        "transcripts_per_100um": float(per_cell.sum() / cell_um2 * 100),
        "region_area": float(shape[0] * shape[1] * PIXEL_UM**2),
        "total_cell_area": cell_um2,
        "nuclear_transcripts_per_100um": float((good & t.in_nucleus).sum() / nucleus_um2 * 100),
        "fraction_transcripts_assigned": float((t.cell[good] >= 0).mean()),
        "segmented_cell_stain_frac": 1 - expanded,
        "segmented_cell_boundary_frac": 0.0,
        "segmented_cell_interior_frac": 1 - expanded,
        "segmented_cell_nuc_expansion_frac": expanded,
        "imported_cell_frac": 0.0,
        "cassette_name": "simulated", "slide_id": "0000000",
        "panel_type": "predesigned", "panel_design_id": "simulated_v1",
        "panel_name": "Simulated human panel", "panel_organism": "Human",
        "panel_tissue_type": "Simulated",
        "panel_num_targets_predesigned": n_genes - n_custom,
        "panel_num_targets_custom": n_custom,
        "pixel_size": PIXEL_UM, "z_step_size": 3.0,
        "instrument_sn": "SIMULATED", "instrument_sw_version": "3.0.0.0",
        "analysis_sw_version": "xenium-3.0.0.0",
        "analysis_uuid": uuid("analysis"), "experiment_uuid": uuid("experiment"),
        "cassette_uuid": uuid("cassette"), "roi_uuid": uuid("roi"),
        "well_uuid": uuid("well"), "calibration_uuid": uuid("calibration"),
        "images": {
            "morphology_focus_filepath": "morphology_focus/morphology_focus_0000.ome.tif",
        },
        "xenium_explorer_files": {"cells_zarr_filepath": "cells.zarr.zip"},
        "segmentation_stain": "",
    }  # fmt: skip
