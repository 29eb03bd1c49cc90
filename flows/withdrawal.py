"""Donors who are withdrawn from a run with several, and the nuclei of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from flows.built import Built
from flows.run_files import RunFiles
from flows.split import SplitSection
from pairing.annotations import area_of, donors_named
from pairing.geometry import Points
from segmentation.config import NUCLEI_FILE
from segmentation.others import write_others
from shards.errors import BadInput


def withdrawn_of(files: RunFiles, split: SplitSection) -> tuple[str, ...]:
    """The withdrawn donors of a run with several, as its file names them.

    Raises BadInput where nobody is left.
    """
    run = files.run
    if run.donors is None or not split.withdraw:
        return ()
    files.hold()
    named = donors_named(run.donors)
    withdrawn = tuple(filter(split.is_withdrawn, named))
    if withdrawn == named:
        raise BadInput(
            f"run {run.id}",
            expected="a donor who is not withdrawn",
            found=f"{len(named)} in {run.donors.name}, all withdrawn",
            remedy="remove this [[runs]] from the config",
        )
    return withdrawn


def write_nuclei_of_others(
    out: Path, of_all: Built, files: RunFiles, withdrawn: tuple[str, ...], centres_px: Points
) -> dict[str, Any]:
    """The artifact `of_all` without the nuclei of withdrawn donors; the figures of the stage.

    Theirs are those in their polygons; by a csv, those whose nearest cell of the instrument
    (`centres_px`, on the slide) is theirs.
    """
    assert files.run.donors is not None
    nuclei = pq.read_table(of_all.folder / NUCLEI_FILE, columns=["x_px", "y_px"])
    is_theirs = area_of(files.run.donors, withdrawn, files.cell_ids().tolist(), centres_px)
    places_px = np.stack([nuclei["x_px"], nuclei["y_px"]], axis=1)
    n_nuclei = write_others(out, of_all.folder, is_theirs(places_px))
    return {**of_all.summary, "n_nuclei": n_nuclei, "n_of_all": of_all.summary["n_nuclei"]}
