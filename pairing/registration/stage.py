"""The registration of a run: an alignment given or found, refined on the nuclei, and judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from pairing.geometry import Affine, Points
from pairing.registration.automatic import SURE_UM, Alignment, align, hold_out
from pairing.registration.gates import (
    MIN_CELLS,
    Finding,
    density_correlations,
    density_findings,
    implied_mpp_of,
    mpp_findings,
    on_slide,
    share_findings,
)
from pairing.registration.given import read_alignment
from pairing.registration.he_nuclei import OpenSlide
from pairing.registration.record import (
    ErrorFigures,
    FieldGrid,
    KeypointFit,
    Registration,
    Verdict,
)
from pairing.warp import Warp
from pairing.xenium import XeniumRun


@dataclass(frozen=True, slots=True)
class Registered:
    """The record, its transform (None where none was found), and the table of the cells.

    `cells` has the columns CELL_COLUMNS, one row a cell in the instrument's order; positions are
    NaN without a transform, errors where they were not assessed.
    """

    registration: Registration
    he_px_from_xenium_um: Warp | None
    cells: pd.DataFrame


@dataclass(frozen=True, slots=True)
class _Given:
    """An alignment file as it is, and what the density of the cells says of it."""

    method: Literal["matrix", "keypoints"]
    he_px_from_xenium_um: Affine
    keypoints: KeypointFit | None
    density_correlation: dict[str, float]


def register_run(
    run: XeniumRun,
    open_slide: OpenSlide,
    alignment: Path | Literal["auto"],
    *,
    refine: bool,
) -> Registered:
    """Register a run to its H&E: by an alignment file, or ("auto") from the nuclei alone.

    A given alignment is refined on the nuclei and judged by them and by its gates; where too few
    nuclei are there to judge by, or `refine` is false, it is taken as given. Raises BadInput where
    the slide can be no H&E or the file is no alignment.
    """
    cells = run.read_cells()
    cells_um = cells[["x_um", "y_um"]].to_numpy(np.float64)
    with open_slide() as slide:
        slide.require_rgb()
        path, mpp, size_px = slide.path, slide.mpp, slide.size_px
        given = None
        if alignment != "auto":
            method, affine, keypoints = read_alignment(alignment, run.pixel_size_um)
            correlation = density_correlations(slide, cells_um, affine, run.pixel_size_um)
            given = _Given(method, affine, keypoints, correlation)
    aligned = None
    if given is None or refine:
        aligned = _aligned(run, cells, open_slide, given)
    warp = _transform(aligned, given)
    points_px = np.full((len(cells), 2), np.nan) if warp is None else warp(cells_um)
    seen = on_slide(points_px, size_px)
    share = float(seen.mean()) if len(seen) else 0.0
    implied_mpp = None
    if aligned is not None:
        implied_mpp = aligned.implied_mpp
    elif warp is not None:
        implied_mpp = implied_mpp_of(warp.affine)
    findings: list[Finding] = []
    if warp is not None and implied_mpp is not None:
        findings += mpp_findings(path, mpp, implied_mpp, automatic=given is None)
        findings += _of_place(share, aligned, given)
    error_um = np.full(len(cells), np.nan)
    error, moved_um = None, None
    if aligned is not None and aligned.evidence is not None:
        error_um = aligned.error_um(cells_um)
        error = _figures(error_um[seen], aligned.on_tissue(cells_um[seen]))
        moved_um = _moved_um(points_px[seen], given, cells_um[seen], mpp)
    verdict, reasons = _verdict(aligned, given, findings, len(cells))
    registration = Registration(
        method=given.method if given else "auto",
        refined=aligned is not None and aligned.evidence is not None,
        he_px_from_xenium_um=warp.affine.matrix if warp else None,
        field=_grid_of(warp),
        n_cells=len(cells),
        slide_mpp=mpp,
        implied_mpp=implied_mpp,
        share_on_slide=share,
        density_correlation=given.density_correlation if given else {},
        keypoints=given.keypoints if given else None,
        evidence=aligned.evidence if aligned else None,
        moved_um=moved_um,
        error_um=error,
        verdict=verdict,
        reasons=reasons,
    )
    table = pd.DataFrame(
        {
            "cell_id": cells["cell_id"],
            "x_px": points_px[:, 0],
            "y_px": points_px[:, 1],
            "error_um": error_um,
        }
    )
    return Registered(registration, warp, table)


def _aligned(
    run: XeniumRun, cells: pd.DataFrame, open_slide: OpenSlide, given: _Given | None
) -> Alignment:
    nuclei = run.read_nuclei()
    # A nucleus that is no cell's is held out by its own label.
    ids = np.append(cells["cell_id"].to_numpy(object), "")[nuclei["cell_index"].to_numpy()]
    ids = np.where(ids == "", nuclei["label_id"].astype(str).to_numpy(object), ids)
    return align(
        nuclei[["x_um", "y_um"]].to_numpy(np.float64),
        hold_out(ids.tolist()),
        open_slide,
        given.he_px_from_xenium_um if given else None,
    )


def _transform(aligned: Alignment | None, given: _Given | None) -> Warp | None:
    if aligned is None:
        assert given is not None
        return Warp(given.he_px_from_xenium_um)
    warp = aligned.he_px_from_xenium_um
    if warp is None or warp.shift is None:
        return warp
    # As it is stored, so that all who read it find the cells where this table says.
    return replace(warp, shift=np.asarray(warp.shift, np.float32))


def _grid_of(warp: Warp | None) -> FieldGrid | None:
    if warp is None or warp.shift is None:
        return None
    return FieldGrid(origin_um=warp.origin, step_um=warp.step)


def _of_place(share: float, aligned: Alignment | None, given: _Given | None) -> Iterator[Finding]:
    """What gates say of the place. Where nuclei fit, their density has nothing to add, and cells
    beside the slide are of a part that it does not show."""
    if aligned is not None and aligned.verdict in ("pass", "doubtful"):
        for finding in share_findings(share):
            yield Finding("doubtful", finding.words)
        return
    yield from share_findings(share)
    if given is not None:
        yield from density_findings(given.density_correlation)


def _verdict(
    aligned: Alignment | None, given: _Given | None, findings: list[Finding], n_cells: int
) -> tuple[Verdict, tuple[str, ...]]:
    """The worst of what nuclei and gates say, and why, the worst first."""
    verdict: Verdict = "pass"
    told: tuple[str, ...] = ()
    if aligned is not None:
        verdict, told = aligned.verdict, aligned.reasons
    elif given is not None and not given.density_correlation:
        verdict, told = "not_assessable", (f"{n_cells} cells, fewer than {MIN_CELLS}",)
    if verdict == "not_assessable" and given is not None:
        told = tuple(f"{words}; taken as given" for words in told)
    failed, doubtful = (
        tuple(f.words for f in findings if f.verdict == which) for which in ("fail", "doubtful")
    )
    found = {verdict, *(finding.verdict for finding in findings)}
    order: tuple[Verdict, ...] = ("fail", "not_assessable", "doubtful", "pass")
    return next(v for v in order if v in found), (*failed, *told, *doubtful)


def _moved_um(
    points_px: Points, given: _Given | None, cells_um: Points, mpp: float
) -> tuple[float, float, float] | None:
    if given is None or not len(points_px):
        return None
    moved = np.linalg.norm(points_px - given.he_px_from_xenium_um(cells_um), axis=1) * mpp
    median, p95, most = np.quantile(moved, (0.5, 0.95, 1.0)).tolist()
    return median, p95, most


def _figures(
    error_um: npt.NDArray[np.float64], on_tissue: npt.NDArray[np.bool_]
) -> ErrorFigures | None:
    if not on_tissue.any():
        return None
    median, p95 = np.quantile(error_um[on_tissue], (0.5, 0.95)).tolist()
    share = float((error_um > SURE_UM).mean())
    return ErrorFigures(median_um=median, p95_um=p95, share_above_2_um=share)
