"""Writes what a Xenium instrument leaves of a section, in the layout that is asked for."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
from scipy import sparse

from pairing.simulate.bundle.cells import (
    boundaries_table,
    cell_id_column,
    cell_id_strings,
    cells_table,
    nuclei_of_layout,
    write_table,
)
from pairing.simulate.bundle.cells_zarr import write_cells_zarr
from pairing.simulate.bundle.layouts import TRAITS, LayoutFeatures, features_of
from pairing.simulate.bundle.manifests import (
    Figures,
    experiment,
    gene_panel,
    image_keys,
    metrics_summary,
    panel_tsv,
    protein_panel,
)
from pairing.simulate.bundle.matrix import (
    matrix_rows,
    protein_matrix,
    protein_rows,
    write_matrix,
)
from pairing.simulate.bundle.morphology import channel_files, write_morphology_images
from pairing.simulate.bundle.transcripts import write_transcripts
from pairing.simulate.params import BundleParams
from pairing.simulate.polygons import thinned
from pairing.simulate.section import Section

_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_bundle(folder: Path, section: Section, params: BundleParams) -> None:
    """Every file of the bundle into the existing, empty `folder`.

    Planes are read a row of chunks at a time and transcripts one field of view at a time; what
    grows with the cells is held in memory. Raises ValueError where `params.stains` asks for
    channels that the section does not have.
    """
    layout = params.layout
    files = channel_files(section, layout, params.stains)
    names = features_of(section.features, layout)
    matrix = section.matrix[:, names.rows]
    cells = cells_table(section, names, matrix, layout)
    ids = cell_id_column(section, layout)
    nuclei, owner = nuclei_of_layout(section, layout)

    write_table(cells, folder, "cells", layout)
    write_table(
        boundaries_table(nuclei, ids.take(pa.array(owner))), folder, "nucleus_boundaries", layout
    )
    cell_rings = thinned(section.cell_rings, TRAITS[layout].max_vertices)
    write_table(boundaries_table(cell_rings, ids), folder, "cell_boundaries", layout)
    _write_matrix(folder, section, names, matrix, params)
    tally = write_transcripts(folder, section, names, layout)
    if params.cells_zarr:
        write_cells_zarr(folder / "cells.zarr.zip", section, cells, layout)
    write_morphology_images(folder, section, files)

    figures = Figures.of(cells, tally, section.cell_labels.shape)
    focus = f"morphology_focus/{files[0].name}" if files else "morphology_focus.ome.tif"
    images = image_keys(params, focus)
    _write_json(
        folder / "experiment.xenium", experiment(section.name, names, figures, images, params)
    )
    pa_csv.write_csv(
        metrics_summary(section.name, figures, names, tally), folder / "metrics_summary.csv"
    )
    if TRAITS[layout].json_panel:
        _write_json(folder / "gene_panel.json", gene_panel(names))
    else:
        (folder / "panel.tsv").write_text(panel_tsv(names), encoding="utf-8")
    if params.protein:
        _write_json(folder / "protein_panel.json", protein_panel())


def zip_bundle(folder: Path, zip_path: Path) -> None:
    """Move a bundle into a zip of stored files, without its folder's name and without times."""
    with zipfile.ZipFile(zip_path, "w", zipfile.ZIP_STORED) as zipped:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _EPOCH)
            entry.external_attr = 0o644 << 16
            with path.open("rb") as source, zipped.open(entry, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 1 << 20)
    shutil.rmtree(folder)


def _write_matrix(
    folder: Path,
    section: Section,
    names: LayoutFeatures,
    matrix: sparse.csr_matrix,
    params: BundleParams,
) -> None:
    rows = matrix_rows(names)
    if params.protein:
        rows = rows + protein_rows()
        protein = protein_matrix(names, matrix, section.prefix)
        matrix = sparse.hstack([matrix, protein], format="csr")
    write_matrix(folder, rows, cell_id_strings(section.prefix, params.layout), matrix)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=4), encoding="utf-8")
