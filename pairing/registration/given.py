"""Alignments that a person gives: the 10x matrix csv and the Explorer's keypoints csv."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

import numpy as np

from pairing.geometry import Affine, Points
from pairing.registration.record import KeypointFit
from shards.errors import BadInput

KEYPOINT_COLUMNS = ("fixedX", "fixedY", "alignmentX", "alignmentY")
_REMEDY = (
    "export the alignment from Xenium Explorer: a 3 x 3 matrix csv without a header, or a "
    f"keypoints csv with the columns {', '.join(KEYPOINT_COLUMNS)}"
)


def read_alignment(
    path: Path, pixel_size_um: float
) -> tuple[Literal["matrix", "keypoints"], Affine, KeypointFit | None]:
    """The transform `he_px_from_xenium_um` of an alignment file, taken as it is.

    `pixel_size_um` is that of the bundle's morphology image. The 10x matrix maps H&E full
    resolution pixels to morphology pixels (10x knowledge base 35386990499853); keypoints pair
    morphology pixels (fixed) with H&E pixels (alignment), and all of them enter one least-squares
    affine. Raises BadInput on anything else.
    """
    rows = _read_rows(path)
    morphology_px_from_um = Affine.scale(1 / pixel_size_um)
    try:
        if tuple(cell.strip() for cell in rows[0]) == KEYPOINT_COLUMNS:
            points = _numbers(path, rows[1:], width=4)
            he_px_from_morphology_px, fit = fit_keypoints(path, points, pixel_size_um)
            return "keypoints", he_px_from_morphology_px @ morphology_px_from_um, fit
        morphology_px_from_he_px = Affine.of(_numbers(path, rows, width=3))
        return "matrix", morphology_px_from_he_px.inverse @ morphology_px_from_um, None
    except ValueError as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            path, expected="an invertible 3 x 3 affine", found=str(error), remedy=_REMEDY
        ) from error


def fit_keypoints(path: Path, points: Points, pixel_size_um: float) -> tuple[Affine, KeypointFit]:
    """Least-squares affine `he_px_from_morphology_px` over all keypoints, with its residuals.

    `points` is (n, 4): morphology x, y and H&E x, y. Residuals are taken on the slide and turned
    to µm by the scale that the fit itself implies. Raises BadInput where the points do not span
    a plane.
    """
    fixed, moved = points[:, :2], points[:, 2:]
    for frame, side in (("morphology image", fixed), ("slide", moved)):
        on_one_line = len(side) >= 3 and _on_one_line(side)
        if len(side) < 3 or on_one_line:
            raise BadInput(
                path,
                expected="at least three keypoints that do not lie on one line",
                found=f"{len(side)} keypoints"
                + (f", on one line of the {frame}" if on_one_line else ""),
                remedy="set more keypoints in Xenium Explorer, spread over the tissue",
            )
    design = np.column_stack([fixed, np.ones(len(fixed))])
    solution = np.linalg.lstsq(design, moved, rcond=None)[0]
    affine = Affine.of(np.vstack([solution.T, (0.0, 0.0, 1.0)]))
    um_per_he_px = pixel_size_um / np.sqrt(affine.area_scale)
    residuals_um = np.linalg.norm(affine(fixed) - moved, axis=1) * um_per_he_px
    return affine, KeypointFit(
        n_points=len(fixed),
        rms_um=float(np.sqrt((residuals_um**2).mean())),
        max_um=float(residuals_um.max()),
        residuals_um=tuple(float(r) for r in residuals_um),
    )


def _on_one_line(points: Points) -> bool:
    along, across = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)
    return bool(across <= 1e-3 * along)


def _read_rows(path: Path) -> list[list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            rows = [row for row in csv.reader(f) if any(cell.strip() for cell in row)]
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(path, expected="a csv file", found=str(error), remedy=_REMEDY) from error
    if not rows:
        raise BadInput(path, expected="a csv file", found="an empty file", remedy=_REMEDY)
    # Spreadsheets of many countries save so, and write decimals with commas as they do.
    for sign, name in ((";", "semicolons"), ("\t", "tabs")):
        if any(sign in cell for cell in rows[0]):
            raise BadInput(
                path, expected="values parted by commas", found=f"{name}", remedy=_REMEDY
            )
    return rows


def _numbers(path: Path, rows: list[list[str]], width: int) -> Points:
    values = np.zeros((len(rows), width))
    for i, row in enumerate(rows):
        found = None if len(row) == width else f"{len(row)} values"
        try:
            values[i, : len(row)] = [float(cell) for cell in row[:width]]
        except ValueError as error:
            found = found or str(error)
        if found is None and not np.isfinite(values[i]).all():
            found = ", ".join(row)
        if found is not None:
            raise BadInput(
                f"{path}, row {i + 1} of the numbers",
                expected=f"{width} finite numbers",
                found=found,
                remedy=_REMEDY,
            )
    return values
