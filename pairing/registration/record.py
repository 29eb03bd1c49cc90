"""The registration of one run: transform, figures, verdict and its reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pairing.geometry import Affine, Row
from pairing.registration.evidence import Evidence
from pairing.warp import Warp
from shards.artifact import write_atomically
from shards.dataset import read_record
from shards.errors import BadInput
from shards.schema import Record

SCHEMA_VERSION: Final = 2
REGISTRATION_FILE = "registration.json"
# (rows, columns, 2) float32: displacements in level-0 pixels at the nodes of `FieldGrid`.
FIELD_FILE = "field.npy"
# One row a cell of the instrument, in its order: CELL_COLUMNS.
CELLS_FILE = "cells.parquet"
CELL_COLUMNS = ("cell_id", "x_px", "y_px", "error_um")

Verdict = Literal["pass", "doubtful", "fail", "not_assessable"]


class KeypointFit(Record):
    """How well one affine explains all keypoints; residuals on the slide, in µm."""

    n_points: int
    rms_um: float
    max_um: float
    residuals_um: tuple[float, ...]


class FieldGrid(Record):
    """Where the nodes of `field.npy` lie: `step_um` apart from `origin_um`, in the Xenium frame."""

    origin_um: tuple[float, float]
    step_um: float


class ErrorFigures(Record):
    """The estimated errors of cells on the slide.

    Quantiles in µm, of those cells that it shows tissue of; the share of all that is above 2 µm.
    """

    median_um: float
    p95_um: float
    share_above_2_um: float


class Registration(Record):
    """`registration.json`. The transform maps Xenium µm to level-0 pixels of the slide.

    It is the affine, plus the field of `field.npy` where `field` says where that lies; null where
    an automatic registration found no place at all.
    `density_correlation` holds the correlation of stained tissue with the density of the cells,
    for a given transform as it is and for the variants that people get wrong. `moved_um` is by
    how much (median, 95th percentile, most) the refinement moved the cells from where the given
    alignment puts them. `error_um` is null where a given alignment was taken as it is.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    method: Literal["auto", "matrix", "keypoints"]
    refined: bool
    he_px_from_xenium_um: tuple[Row, Row, Row] | None
    field: FieldGrid | None
    n_cells: int
    slide_mpp: float
    implied_mpp: float | None
    share_on_slide: float
    density_correlation: dict[str, float]
    keypoints: KeypointFit | None
    evidence: Evidence | None
    moved_um: tuple[float, float, float] | None
    error_um: ErrorFigures | None
    verdict: Verdict
    reasons: tuple[str, ...]


def judged(registration: Registration, max_median_error_um: float) -> Registration:
    """The record under a limit of the median error: of held-out nuclei, and of the cells.

    It stays out of what is stored, so that another limit makes nothing anew.
    """
    evidence, error = registration.evidence, registration.error_um
    figures = (
        ("nuclei held out of the fit lie", evidence.residual_um if evidence else None),
        ("the cells on tissue are estimated to lie", error.median_um if error else None),
    )
    reasons = tuple(
        f"{words} {median_um:.1f} µm off in the median, more than {max_median_error_um:g} µm"
        for words, median_um in figures
        if median_um is not None and median_um > max_median_error_um
    )
    if not reasons:
        return registration
    return registration.model_copy(
        update={"verdict": "fail", "reasons": (*reasons, *registration.reasons)}
    )


def write_registration(
    out: Path, registration: Registration, warp: Warp | None, cells: pd.DataFrame
) -> None:
    """Write the record, the field of `warp` where it has one, and the table of cells into `out`."""
    if warp is not None and warp.shift is not None:
        with (out / FIELD_FILE).open("wb") as file:
            np.save(file, np.asarray(warp.shift, np.float32), allow_pickle=False)
    table = pa.Table.from_pandas(cells[list(CELL_COLUMNS)], preserve_index=False)
    pq.write_table(table, out / CELLS_FILE)
    write_atomically(out / REGISTRATION_FILE, registration.model_dump_json(indent=1).encode())


def read_registration(folder: Path) -> tuple[Registration, Warp]:
    """The record of a folder, and its transform `he_px_from_xenium_um`.

    Raises BadInput where none was found.
    """
    registration = read_record(folder / REGISTRATION_FILE, Registration)
    if registration.he_px_from_xenium_um is None:
        raise BadInput(
            folder / REGISTRATION_FILE,
            expected="a transform",
            found=f"{registration.verdict}: {'; '.join(registration.reasons)}",
            remedy="give the alignment that Xenium Explorer exports for this slide",
        )
    affine, grid = Affine.of(registration.he_px_from_xenium_um), registration.field
    if grid is None:
        return registration, Warp(affine)
    shift = np.load(folder / FIELD_FILE, allow_pickle=False)
    return registration, Warp(affine, grid.origin_um, grid.step_um, shift)


def read_cell_places(folder: Path) -> pd.DataFrame:
    """The table of the cells, CELL_COLUMNS; places and errors are NaN where there are none."""
    places: pd.DataFrame = pq.read_table(
        folder / CELLS_FILE, columns=list(CELL_COLUMNS)
    ).to_pandas()
    return places


def read_cell_errors(folder: Path) -> pd.Series[float]:
    """Estimated error in µm by cell_id; NaN where it was not assessed."""
    table = pq.read_table(folder / CELLS_FILE, columns=["cell_id", "error_um"]).to_pandas()
    errors: pd.Series[float] = table.set_index("cell_id")["error_um"]
    return errors
