"""What a version of the simulator makes is frozen: results that name it stay comparable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import tifffile

from pairing.simulate import SimulationParams, SlideParams, simulate
from pairing.simulate.truth import SIMULATOR_VERSION

# Of version 2. Whoever has to change them raises SIMULATOR_VERSION, and results measured on the
# old one are measured again. Rounded, so that another processor's last digit is no new version.
FIGURES = {
    "version": 2,
    "transcripts": 14814,
    "counts": 11731,
    "cell_um2": 9549,
    "nuclei_on_slide": 62,
    "types": "eeslleffesepeeseeeelflle",
    "he_rgb": [212, 203, 211],
    "dapi": 316,
    "slide_px": [490, 510],
}


def test_the_figures_of_this_version(tmp_path: Path) -> None:
    slide = SlideParams(mpp=0.5, warp_um=10, tear_um=10)
    simulate(tmp_path / "s", SimulationParams(n_cells=60, seed=11, slide=slide))
    outs, truth = tmp_path / "s" / "outs", tmp_path / "s" / "truth"
    cells = pq.read_table(outs / "cells.parquet").to_pandas()
    he = tifffile.imread(tmp_path / "s" / "he.ome.tif", is_ome=False)
    dapi = tifffile.imread(outs / "morphology_focus/morphology_focus_0000.ome.tif", is_ome=False)
    types = pq.read_table(truth / "cells.parquet")["type"].to_pylist()
    found = {
        "version": SIMULATOR_VERSION,
        "transcripts": pq.read_metadata(outs / "transcripts.parquet").num_rows,
        "counts": int(cells["transcript_counts"].sum()),
        "cell_um2": round(float(cells["cell_area"].sum())),
        "nuclei_on_slide": pq.read_metadata(truth / "he_nuclei.parquet").num_rows,
        "types": "".join(name[0] for name in types[:24]),
        "he_rgb": [round(float(v)) for v in he.mean(axis=(0, 1))],
        "dapi": round(float(np.mean(dapi))),
        "slide_px": list(he.shape[:2]),
    }
    assert found == FIGURES
