"""What calibration says of data that are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.calibration.bundles import measure_bundle
from benchmarks.calibration.figures import Figure, summary, table
from benchmarks.calibration.hardness import Cells
from benchmarks.calibration.slides import measure_colour, measure_tiles
from segmentation.tiles import LabelledTile
from shards.errors import BadInput


def test_a_line_of_the_table() -> None:
    figure = Figure("area", {"1": np.arange(101.0), "2": np.arange(101.0)}, {"a": np.array([25.0])})
    assert table([figure]).splitlines()[2:] == ["| area | 50 [5 to 95] | 25 | a | 1 | 2.00 |"]
    assert summary(np.array([1.0, 2.0, 9.0])) == "2 [1 to 9]"


def _bundle(folder: Path, n_cells: int) -> Path:
    """Two cells, 3 µm apart, of a run of `n_cells`."""
    (folder / "experiment.xenium").write_text(json.dumps({"num_cells": n_cells}))
    pd.DataFrame(
        {
            "cell_id": ["a", "b"],
            "x_centroid": [0.0, 3.0],
            "y_centroid": [0.0, 0.0],
            "transcript_counts": [3, 1],
            "control_probe_counts": [1, 0],
            "cell_area": [80.0, 20.0],
            "nucleus_area": [20.0, np.nan],
        }
    ).to_parquet(folder / "cells.parquet")
    pd.DataFrame(
        {
            "cell_id": ["a", "a", "a", "b", "UNASSIGNED", "a"],
            "feature_name": ["A", "A", "B", "A", "A", "Control"],
            "qv": [40.0, 40.0, 20.0, 40.0, 40.0, 3.0],
            "overlaps_nucleus": [1, 0, 1, 0, 0, 1],
            "is_gene": [True] * 5 + [False],
            "codeword_category": ["predesigned_gene"] * 5 + ["negative_control_probe"],
        }
    ).to_parquet(folder / "transcripts.parquet")
    return folder


def test_a_whole_bundle(tmp_path: Path) -> None:
    found = measure_bundle(_bundle(tmp_path, 2))
    assert found["nearest cell, µm"].tolist() == [3, 3]
    assert sorted(found["genes per cell"].tolist()) == [1, 2]
    assert found["share assigned to cells"].tolist() == [0.8]
    assert found["share in nuclei"].tolist() == [0.4]
    assert found["density in nuclei / in cells"].tolist() == [(2 / 20) / (4 / 100)]
    assert found["control_probe per gene count, qv ≥ 20, in cells"].tolist() == [0.25]
    assert found["negative_control_probe per gene transcript, any qv"].tolist() == [0.2]
    assert found["share with qv = 40"].tolist() == [0.8]
    assert found["cells without a nucleus"].tolist() == [0.5]


def test_a_sample_says_nothing_of_neighbours(tmp_path: Path) -> None:
    found = measure_bundle(_bundle(tmp_path, 1000))
    assert "nearest cell, µm" not in found
    assert "share assigned to cells" not in found
    assert found["nucleus area, instrument, µm²"].tolist() == [20]


def test_a_folder_that_holds_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"experiment\.xenium"):
        measure_bundle(tmp_path)


def test_colour_is_of_the_tissue_alone() -> None:
    density = np.concatenate([np.zeros((50, 3)), np.tile([0.1, 0.4, 0.2], (50, 1))])
    found = measure_colour(density)
    assert [np.unique(v).tolist() for v in found.values()] == [[0.1], [0.4], [0.2]]


def test_nuclei_that_a_border_cuts_are_left_out() -> None:
    labels = np.zeros((20, 30), np.int32)
    labels[2:4, 2:4], labels[2:4, 12:14], labels[18:20, 2:6] = 1, 2, 3
    tile = LabelledTile("t", np.zeros((20, 30, 3), np.uint8), labels, mpp=0.5)
    found = measure_tiles([tile])
    assert found["nucleus area on H&E, labels, µm²"].tolist() == [1, 1]
    assert found["nearest nucleus on H&E, labels, µm"].tolist() == [5, 5]


def test_errors_of_an_affine() -> None:
    um = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    cells = Cells(um, um @ np.array([[0.0, 1.0], [-1.0, 0.0]]) + 7)
    assert cells.best_affine_error_um() == pytest.approx(0, abs=1e-9)
    assert cells.error_um(np.array([[0.0, -1.0, 7.0], [1.0, 0.0, 10.0]])) == pytest.approx(3)
