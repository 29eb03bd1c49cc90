"""The truth beside a simulation: what no instrument tells and every score needs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile

from pairing.simulate.celltypes import CELL_TYPES
from pairing.simulate.expression import ExpressionModel
from pairing.simulate.params import SimulationParams
from pairing.simulate.render import Frame, Labels
from pairing.simulate.tissue import Tissue

SIMULATOR_VERSION = 1


def write_truth(
    folder: Path,
    params: SimulationParams,
    tissue: Tissue,
    cell_ids: npt.NDArray[np.str_],
    model: ExpressionModel,
    morphology: Frame,
    slide: Frame,
    slide_labels: Labels,
) -> None:
    """Write every file of `truth/` into the existing, empty `folder`; see docs/simulator.md."""
    pq.write_table(_cells_table(tissue, cell_ids), folder / "cells.parquet")
    pq.write_table(
        _he_nuclei_table(tissue, cell_ids, slide, slide_labels), folder / "he_nuclei.parquet"
    )
    with tifffile.TiffWriter(folder / "he_nuclei.tif") as tiff:
        tiff.write(
            slide_labels.nucleus.astype(np.uint32),
            tile=(512, 512),
            compression="zlib",
            metadata=None,
        )
    model.write(folder / "expression.npz")
    transform = {
        "morphology_px_from_he_px": (morphology.um_from_px.inverse @ slide.um_from_px).matrix,
        "xenium_um_from_he_px": slide.um_from_px.matrix,
        "xenium_um_from_morphology_px": morphology.um_from_px.matrix,
    }
    about = {"simulator_version": SIMULATOR_VERSION, "params": params.model_dump()}
    for name, value in (("transform.json", transform), ("simulation.json", about)):
        (folder / name).write_text(json.dumps(value, indent=2), encoding="utf-8")


def _cells_table(tissue: Tissue, cell_ids: npt.NDArray[np.str_]) -> pa.Table:
    """One row a cell; the position is the mean of its nuclei's centroids, hidden ones too."""
    cells, nuclei = tissue.cells, tissue.nuclei
    n = len(cell_ids)
    n_placed = np.bincount(nuclei.cell, minlength=n)
    area = np.bincount(nuclei.cell, weights=nuclei.area_um2, minlength=n)
    return pa.table(
        {
            "cell_id": cell_ids,
            "type": np.array([t.name for t in CELL_TYPES])[cells.type_index],
            "state": cells.state,
            "x_um": np.bincount(nuclei.cell, weights=nuclei.x_um, minlength=n) / n_placed,
            "y_um": np.bincount(nuclei.cell, weights=nuclei.y_um, minlength=n) / n_placed,
            "nucleus_count": np.where(cells.has_nucleus, n_placed, 0),
            "nucleus_area_um2": np.where(cells.has_nucleus, area, np.nan),
        }
    )


def _he_nuclei_table(
    tissue: Tissue, cell_ids: npt.NDArray[np.str_], slide: Frame, labels: Labels
) -> pa.Table:
    """One row for each label of `he_nuclei.tif`, with its outline in H&E pixels."""
    nuclei = tissue.nuclei
    shown = np.unique(labels.nucleus)[1:] - 1
    um = nuclei.outlines_um()[shown]
    outline_px = slide.um_from_px.inverse(um.reshape(-1, 2)).reshape(um.shape)
    centre_um = np.stack([nuclei.x_um, nuclei.y_um], axis=1)[shown]
    centre_px = slide.um_from_px.inverse(centre_um)
    n_vertices = len(um[0])
    starts = pa.array(np.arange(len(um) + 1, dtype=np.int32) * n_vertices)
    return pa.table(
        {
            "label": (shown + 1).astype(np.int64),
            "cell_id": cell_ids[nuclei.cell[shown]],
            "x_um": centre_um[:, 0],
            "y_um": centre_um[:, 1],
            "x_px": centre_px[:, 0],
            "y_px": centre_px[:, 1],
            "area_um2": nuclei.area_um2[shown],
            "outline_x_px": pa.ListArray.from_arrays(starts, outline_px[..., 0].ravel()),
            "outline_y_px": pa.ListArray.from_arrays(starts, outline_px[..., 1].ravel()),
        }
    )
