"""The scale benchmarks: repeated sections hold what the unit does, and costs add up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from benchmarks.cost import Cost, Measured
from benchmarks.scale.figures import CurationFigures, StageFigures
from benchmarks.scale.repeated import TRUE_NUCLEI, repeat, write_unit
from pairing.cells import CellsConfig, HeSide, read_cells, read_counts, write_cells
from pairing.registration.given import read_alignment
from pairing.slide import open_slide
from pairing.warp import Warp
from pairing.xenium import open_xenium


def stage(name: str, workers_cpu_s: float, driver_cpu_s: float, n_bytes: int) -> StageFigures:
    return StageFigures(
        stage=name, seconds=1.0, driver_cpu_s=driver_cpu_s, workers_cpu_s=workers_cpu_s,
        driver_peak_bytes=1, worker_peak_bytes=2, n_files=10, n_bytes=n_bytes, tasks=(),
    )  # fmt: skip


def test_costs_of_a_corpus_are_those_of_its_cells() -> None:
    figures = CurationFigures(
        what="full", n_cells=1000, n_pairs=800, n_transcripts=100_000, slide_mpx=10.0,
        tissue_mm2=0.5, n_workers=2, hashing_s=1.0, input_bytes=4_000_000, load=0.0,
        stages=(
            stage("registration", 7.2, 0.0, 100),
            stage("cells", 0.0, 3.6, 5000),
            stage("patches", 36.0, 0.0, 20_000),
        ),
    )  # fmt: skip
    cost = Cost.of(Measured.of(figures), 800_000)
    assert (cost.n_cells, cost.n_runs, cost.n_files) == (1_000_000, 1000, 30_000)
    assert cost.core_hours == pytest.approx({"registration": 2.0, "cells": 1.0, "patches": 10.0})
    assert cost.driver_hours == pytest.approx(1.0)
    assert cost.input_tb == pytest.approx(0.004)
    assert cost.output_tb == pytest.approx({"registration": 1e-7, "cells": 5e-6, "patches": 2e-5})
    # Two hours of registrations, then ten of blocks, at a utilisation of 0.9, beside one of the
    # driver. A thousand registrations on more workers take as long as one.
    assert cost.wall_hours(10, 1) == pytest.approx(0.2 / 0.9 + 1 / 0.9)
    assert cost.wall_hours(100, 1) == pytest.approx(0.02 / 0.9 + 1.0)
    assert cost.wall_hours(100, 20) == pytest.approx(0.02 / 0.9 + 0.1 / 0.9)
    assert cost.wall_hours(2000, 20) == pytest.approx(2 / 1000 + 1 / 20)
    # 2000 cells a mm²: 500 mm², in windows of 51.2 µm.
    assert cost.gpu_hours == pytest.approx(500 / 0.0512**2 * 0.728 / 124.8 / 3600, rel=0.01)


def cells_of(section: Path, out: Path) -> dict[str, object]:
    """The figures of the cells stage on a section, with its true nuclei."""
    kept = out.with_name(f"{out.name}-kept")
    for folder in (out, kept):
        folder.mkdir()
    with open_xenium(section / "outs") as run, open_slide(section / "he.ome.tif") as slide:
        _, affine, _ = read_alignment(section / "he_imagealignment.csv", run.pixel_size_um)
        error_um = pd.Series(0.2, index=run.read_cells()["cell_id"])
        he = HeSide(pq.read_table(section / TRUE_NUCLEI), Warp(affine), slide.mpp, error_um)
        return write_cells(out, kept, run, CellsConfig(), "human", he)


@pytest.mark.slow
def test_a_repeated_section_holds_the_unit_as_often(tmp_path: Path) -> None:
    write_unit(tmp_path / "unit", 200, seed=3, workers=1)
    for n in (1, 3):
        repeat(tmp_path / "unit", tmp_path / f"of-{n}", n)
    one = cells_of(tmp_path / "of-1", tmp_path / "cells-1")
    three = cells_of(tmp_path / "of-3", tmp_path / "cells-3")
    assert one["n_cells"] == 200
    for figure in ("n_cells", "n_instrument_nuclei", "n_he_nuclei", "n_matched"):
        assert three[figure] == 3 * one[figure], figure
    assert one["counts"]["n_transcripts"] * 3 == three["counts"]["n_transcripts"]
    assert three["counts"]["matrix_mismatches"] == 0
    cells = read_cells(tmp_path / "cells-3")
    assert cells["cell_id"].is_unique
    assert cells["cell_id"].is_monotonic_increasing
    counts = read_counts(tmp_path / "cells-3", int(three["n_genes"]))
    assert (counts[:200] != counts[400:]).nnz == 0
    # The last copy lies below the first, and the slide shows the same there.
    um = cells[["x_um", "y_um"]].to_numpy()
    shift_um = um[400:] - um[:200]
    assert np.ptp(shift_um, axis=0) == pytest.approx([0, 0], abs=1e-2)
    with open_slide(tmp_path / "of-3/he.ome.tif") as slide:
        dx, dy = np.rint(shift_um.mean(axis=0) / slide.mpp).astype(int).tolist()
        assert dx == 0
        assert dy > 0
        assert (slide.read((300, 300, 700, 600)) != 255).any()
        np.testing.assert_array_equal(
            slide.read((300, 300, 700, 600)), slide.read((300, 300 + dy, 700, 600 + dy))
        )
        assert [round(level.downsample) for level in slide.levels] == [1, 4, 16]
