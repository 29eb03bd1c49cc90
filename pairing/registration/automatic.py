"""Registers a run to its slide by nuclei alone, without a hint, and says how sure that is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pairing.geometry import Affine, Points
from pairing.registration.evidence import Evidence, hold_out
from pairing.registration.field import STEP_UM
from pairing.registration.gates import implied_mpp_of
from pairing.registration.growth import fit_affine
from pairing.registration.he_nuclei import OpenSlide, find_he_nuclei
from pairing.registration.nuclei import HeNuclei
from pairing.registration.place import CLEAR_EVIDENCE, SCALES, SURE_UM, Fit, Sides
from pairing.registration.record import Verdict
from pairing.warp import Warp

__all__ = ["SURE_UM", "Alignment", "align", "hold_out"]

F64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

MIN_NUCLEI = 200
# Held-out nuclei on tissue; of MIN_NUCLEI that all lie there about 67 are held out.
MIN_HELD_OUT = 50
# Below this evidence a place is wrong, above CLEAR_EVIDENCE right; z likewise.
_WRONG_EVIDENCE, _WRONG_Z = 0.08, 4.0
# Share of cells that are not sure, above which the run is doubtful.
_DOUBTFUL_UNSURE = 0.25
_ROUGH_UM = 1.0


@dataclass(frozen=True, slots=True)
class Alignment:
    """What `align` found.

    The transform is None where it found none and none was given; a given one that could not be
    assessed, or that is wrong, comes back as it is. `implied_mpp` is µm of Xenium per level-0 pixel
    of the slide: around the cells that are sure where there is a fit, since folds and tears change
    the whole, else by the affine. `fit` is None where nothing was assessed.
    """

    he_px_from_xenium_um: Warp | None
    verdict: Verdict
    reasons: tuple[str, ...]
    implied_mpp: float | None
    fit: Fit | None

    @property
    def evidence(self) -> Evidence | None:
        return None if self.fit is None else self.fit.evidence

    def on_tissue(self, points_um: Points) -> Mask:
        """(n,) which points in the Xenium frame the slide shows tissue of, where assessed."""
        if self.fit is None:
            return np.zeros(len(points_um), bool)
        return self.fit.on_tissue(points_um)

    def error_um(self, points_um: Points) -> F64:
        """(n,) estimated error of points in the Xenium frame; NaN where nothing was assessed."""
        if self.fit is None:
            return np.full(len(points_um), np.nan)
        return self.fit.error_um(points_um)


def align(
    nuclei_um: Points, held_out: Mask, open_slide: OpenSlide, given: Affine | None = None
) -> Alignment:
    """Register the instrument's nuclei, (n, 2) in the Xenium frame, to an H&E.

    `held_out` marks those that no fit may see. `given`, `he_px_from_xenium_um` of an alignment,
    is refined; without it every place, turn, mirror image, and scale from 0.75 to 1.33 are
    searched. Raises BadInput where the slide can be no H&E.
    """
    with open_slide() as slide:
        slide.require_rgb()
        mpp, size_px = slide.mpp, slide.size_px
    as_given, mpp_as_given = None, None
    if given is not None:
        as_given, mpp_as_given = Warp(given), implied_mpp_of(given)
    if len(nuclei_um) < MIN_NUCLEI:
        few = _too_few(len(nuclei_um), "in the run")
        return Alignment(as_given, "not_assessable", (few,), mpp_as_given, None)
    blobs = find_he_nuclei(open_slide)
    if len(blobs) < MIN_NUCLEI:
        few = _too_few(len(blobs), "found on the slide")
        return Alignment(as_given, "not_assessable", (few,), mpp_as_given, None)

    he_um_from_he_px = Affine.scale(mpp)
    slide_um = (size_px[0] * mpp, size_px[1] * mpp)
    he = HeNuclei(blobs.px * mpp, blobs.weight)
    sides = Sides(nuclei_um, held_out, he, slide_um)
    if given is None:
        fit = sides.found()
    else:
        fit = sides.fitted(he_um_from_he_px @ given)
        if fit is None or not fit.is_clear:
            elsewhere = sides.found()
            if elsewhere is not None and elsewhere.is_clear:
                off_um = np.linalg.norm(
                    elsewhere(nuclei_um) - (he_um_from_he_px @ given)(nuclei_um), axis=1
                )
                reason = (
                    f"the given alignment puts the cells {np.median(off_um):.0f} µm (median) from "
                    'where their nuclei lie on the slide: give the right one, or alignment = "auto"'
                )
                return Alignment(as_given, "fail", (reason,), mpp_as_given, None)
    if fit is None:
        reason = (
            f"nowhere on the slide do nuclei lie as those of the run do, at its {mpp:g} µm per "
            f"pixel and {min(SCALES):g} to {max(SCALES):g} times that"
        )
        return Alignment(as_given, "fail", (reason,), mpp_as_given, None)
    error_um = fit.error_um(nuclei_um)
    verdict, reasons = _verdict(fit.evidence, error_um)
    if verdict == "not_assessable" and given is not None:
        return Alignment(as_given, verdict, reasons, mpp_as_given, None)
    warp = _warp(fit, nuclei_um, he_um_from_he_px.inverse)
    sure = error_um <= SURE_UM
    implied_mpp = mpp / _local_scale(fit, nuclei_um[sure] if sure.any() else nuclei_um)
    return Alignment(warp, verdict, reasons, implied_mpp, fit)


def _too_few(n: int, where: str) -> str:
    return f"{n} nuclei {where}, fewer than {MIN_NUCLEI}: too few to register by"


def _warp(fit: Fit, nuclei_um: Points, he_px_from_he_um: Affine) -> Warp:
    """The fit in pixels, as an affine through all nuclei and a field that is small beside it."""
    affine, _ = fit_affine(nuclei_um, fit(nuclei_um), _ROUGH_UM)
    n_rows, n_columns, _ = fit.field.shift_um.shape
    x, y = np.meshgrid(np.arange(n_columns), np.arange(n_rows))
    nodes = np.stack([x, y], axis=-1).reshape(-1, 2) * STEP_UM + fit.field.origin_um
    shift_um = fit.rough(nodes) + fit.field.shift_um.reshape(-1, 2) - affine(nodes)
    shift_px = shift_um @ he_px_from_he_um.array[:2, :2].T
    shift_px = shift_px.reshape(n_rows, n_columns, 2)
    return Warp(he_px_from_he_um @ affine, fit.field.origin_um, STEP_UM, shift_px)


def _local_scale(fit: Fit, points_um: Points) -> float:
    """µm of the slide per µm of Xenium: the median of the places around points."""
    across, down = (
        (fit(points_um + aside) - fit(points_um - aside)) / STEP_UM
        for aside in (np.array([STEP_UM / 2, 0.0]), np.array([0.0, STEP_UM / 2]))
    )
    area = across[:, 0] * down[:, 1] - across[:, 1] * down[:, 0]
    return float(np.sqrt(np.median(np.abs(area))))


def _verdict(evidence: Evidence, error_um: F64) -> tuple[Verdict, tuple[str, ...]]:
    told = (
        f"{evidence.share:.0%} of {evidence.n_held_out:,} nuclei held out of the fit have "
        f"one of the slide within 3 µm, by chance {evidence.chance:.0%} would: evidence "
        f"{evidence.evidence:.2f}, z {evidence.z:.0f}"
    )
    unsure = float((error_um > SURE_UM).mean())
    where = f"{unsure:.0%} of the cells may be more than {SURE_UM:g} µm off"
    if evidence.evidence < _WRONG_EVIDENCE or evidence.z < _WRONG_Z:
        return "fail", (told,)
    if evidence.n_held_out < MIN_HELD_OUT:
        few = (
            f"{evidence.n_held_out} nuclei held out of the fit lie on tissue of the slide, fewer "
            f"than {MIN_HELD_OUT}: too few to judge by"
        )
        return "not_assessable", (few,)
    if evidence.evidence < CLEAR_EVIDENCE:
        return "doubtful", (told,)
    if unsure > _DOUBTFUL_UNSURE:
        return "doubtful", (where,)
    return "pass", ()
