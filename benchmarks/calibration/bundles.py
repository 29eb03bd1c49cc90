"""Figures of Xenium bundles, or of what of one a folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.spatial import cKDTree

from shards.errors import BadInput

F64 = npt.NDArray[np.float64]
QV_MIN = 20.0
CONTROLS = (
    "control_probe",
    "genomic_control",
    "control_codeword",
    "unassigned_codeword",
    "deprecated_codeword",
)
CATEGORIES = (
    "negative_control_probe",
    "genomic_control_probe",
    "negative_control_codeword",
    "unassigned_codeword",
    "deprecated_codeword",
)


def measure_bundle(folder: Path) -> dict[str, F64]:
    """Figure to its values, of a folder in the layout of XOA 3.0 or later.

    Needs `experiment.xenium` and `cells.parquet`; `metrics_summary.csv` and `transcripts.parquet`
    are used where they are there. Where `cells.parquet` has fewer rows than the run had cells it is
    taken for a random sample: distances between cells, and all of the transcripts but their
    qualities, are left out. Raises BadInput for a folder without the first two.
    """
    for name in ("experiment.xenium", "cells.parquet"):
        if not (folder / name).is_file():
            raise BadInput(
                folder,
                expected=f"a folder with {name}",
                found="none there",
                remedy="name a Xenium bundle, or a folder with a sample of its cells.parquet",
            )
    n_cells = json.loads((folder / "experiment.xenium").read_text(encoding="utf-8"))["num_cells"]
    cells = pd.read_parquet(folder / "cells.parquet")
    whole = len(cells) == n_cells
    measured = _of_cells(cells, whole)
    if (folder / "transcripts.parquet").is_file():
        transcripts = pd.read_parquet(folder / "transcripts.parquet")
        measured |= _of_qualities(transcripts)
        if whole:
            measured |= _of_transcripts(transcripts, cells)
    if (folder / "metrics_summary.csv").is_file() and not whole:
        measured |= _of_metrics(pd.read_csv(folder / "metrics_summary.csv").iloc[0])
    return {name: np.atleast_1d(np.asarray(v, np.float64)) for name, v in measured.items()}


def _of_cells(cells: pd.DataFrame, whole: bool) -> dict[str, npt.ArrayLike]:
    counts = cells["transcript_counts"].to_numpy(np.float64)
    area = cells["cell_area"].to_numpy(np.float64)
    nucleus = cells["nucleus_area"].to_numpy(np.float64)
    nucleus = nucleus[np.nan_to_num(nucleus) > 0]
    seen = np.log(counts[counts > 0])
    measured: dict[str, npt.ArrayLike] = {
        "nucleus area, instrument, µm²": nucleus,
        "nucleus area, instrument, sigma of ln": np.log(nucleus).std(),
        "cell area, µm²": area,
        "gene counts per cell": counts,
        "gene counts per cell, sigma of ln": seen.std(),
        "correlation of ln counts and ln cell area": np.corrcoef(seen, np.log(area[counts > 0]))[
            0, 1
        ],
        "cells without a count": (counts == 0).mean(),
        "cells without a nucleus": 1 - len(nucleus) / len(cells),
    }
    for kind in CONTROLS:
        name = f"{kind}_counts"
        if name in cells:
            measured[f"{kind} per gene count, qv ≥ 20, in cells"] = cells[name].sum() / counts.sum()
    if whole:
        points = cells[["x_centroid", "y_centroid"]].to_numpy()
        measured["nearest cell, µm"] = cKDTree(points).query(points, k=2)[0][:, 1]
    return measured


def _of_qualities(transcripts: pd.DataFrame) -> dict[str, npt.ArrayLike]:
    """Shares of gene transcripts."""
    gene = transcripts[transcripts["is_gene"]]
    qv = gene["qv"].to_numpy(np.float64)
    good = qv >= QV_MIN
    return {
        "qv of gene transcripts": qv,
        "share with qv ≥ 20": good.mean(),
        "share with qv = 40": (qv == 40).mean(),
        "share with qv = 0": (qv == 0).mean(),
        "qv where between 20 and 40": qv[good & (qv < 40)],
        "qv where below 20": qv[~good],
    }


def _of_transcripts(transcripts: pd.DataFrame, cells: pd.DataFrame) -> dict[str, npt.ArrayLike]:
    gene = transcripts["is_gene"].to_numpy()
    good = gene & (transcripts["qv"].to_numpy() >= QV_MIN)
    of_cell = transcripts["cell_id"].isin(cells["cell_id"]).to_numpy()
    in_nucleus = transcripts["overlaps_nucleus"].to_numpy() == 1
    counted = transcripts[good & of_cell]
    nucleus_um2, cell_um2 = cells["nucleus_area"].sum(), cells["cell_area"].sum()
    measured: dict[str, npt.ArrayLike] = {
        "genes per cell": counted.groupby("cell_id", observed=True)["feature_name"].nunique(),
        "share assigned to cells": of_cell[good].mean(),
        "share in nuclei": in_nucleus[good].mean(),
        "density in nuclei / in cells": (in_nucleus & good).sum()
        / nucleus_um2
        / (len(counted) / cell_um2),
    }
    category = transcripts["codeword_category"].to_numpy()
    for kind in CATEGORIES:
        measured[f"{kind} per gene transcript, any qv"] = (category == kind).sum() / gene.sum()
    return measured


def _of_metrics(metrics: pd.Series) -> dict[str, npt.ArrayLike]:
    """What the instrument's own summary tells of the whole run."""
    density = metrics["nuclear_transcripts_per_100um2"] / metrics["decoded_transcripts_per_100um2"]
    return {
        "genes per cell": metrics["median_genes_per_cell"],
        "share with qv ≥ 20": metrics["fraction_transcripts_decoded_q20"],
        "share assigned to cells": metrics["fraction_transcripts_assigned"],
        "density in nuclei / in cells": density,
    }
