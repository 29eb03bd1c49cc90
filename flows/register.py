"""`cellpair register`: the registration of one run alone, its files and its page."""

from __future__ import annotations

import csv
import io
import logging
import time
from functools import partial
from pathlib import Path
from typing import Literal

from flows.config import RegistrationSection
from flows.failures import DONE, FAULTS_FOUND
from flows.report.registration_page import PAGE_FILE, write_registration_page
from pairing.geometry import Affine
from pairing.registration.place import SURE_UM
from pairing.registration.record import (
    CELLS_FILE,
    FIELD_FILE,
    REGISTRATION_FILE,
    Registration,
    judged,
    write_registration,
)
from pairing.registration.stage import register_run
from pairing.slide import open_slide
from pairing.xenium import open_xenium
from shards.artifact import write_atomically
from shards.errors import BadInput

log = logging.getLogger("cellpair")

# As 10x names it: H&E pixels at full resolution to pixels of the morphology image.
MATRIX_FILE = "he_imagealignment.csv"
_FILES = (REGISTRATION_FILE, FIELD_FILE, CELLS_FILE, MATRIX_FILE, PAGE_FILE)


def register(xenium: Path, slide: Path, out: Path, alignment: str, mpp: float | None) -> int:
    """Register a bundle to its slide into `out`; prints verdict and page; returns the exit code.

    `alignment` is "auto" or a file to refine. 1 where the verdict is fail or not_assessable.
    Raises BadInput where an input can't be read.
    """
    _check(out, mpp)
    given: Path | Literal["auto"] = "auto" if alignment == "auto" else Path(alignment)
    if (out / REGISTRATION_FILE).exists():
        log.info("the registration in %s will be replaced", out)
    started_s = time.monotonic()
    log.info("registering %s to %s", xenium, slide)
    with open_xenium(xenium) as run:
        registered = register_run(run, partial(open_slide, slide, mpp=mpp), given, refine=True)
        morphology_px_from_xenium_um = Affine.scale(1 / run.pixel_size_um)
    log.info("registered after %.0f s; writing the page", time.monotonic() - started_s)
    limit_um = RegistrationSection().max_median_error_um
    registration = judged(registered.registration, limit_um)
    warp = registered.he_px_from_xenium_um
    out.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        (out / name).unlink(missing_ok=True)
    write_registration(out, registration, warp, registered.cells)
    for reason in registration.reasons:
        log.warning("registration %s: %s", registration.verdict, reason)
    usable = registration.verdict in ("pass", "doubtful")
    if warp is not None and usable:
        # The field's affine is the best one through all nuclei.
        morphology_px_from_he_px = morphology_px_from_xenium_um @ warp.affine.inverse
        write_atomically(out / MATRIX_FILE, _as_csv(morphology_px_from_he_px).encode())
    page = write_registration_page(out, xenium, slide, mpp, None if given == "auto" else given)
    print(f"{registration.verdict}{_in_words(registration)}: {page}")
    return DONE if usable else FAULTS_FOUND


def _check(out: Path, mpp: float | None) -> None:
    if mpp is not None and not mpp > 0:
        raise BadInput(
            "--mpp", expected="µm per pixel, as 0.2738", found=f"{mpp:g}", remedy="mend the value"
        )
    there = [name for name in _FILES if (out / name).exists()]
    if there and not (out / REGISTRATION_FILE).exists():
        raise BadInput(
            out,
            expected="an empty folder, or one that `cellpair register` made",
            found=f"{', '.join(there)}, which would be overwritten",
            remedy="give another --out",
        )


def _in_words(registration: Registration) -> str:
    error = registration.error_um
    if error is None or registration.verdict == "fail":
        return ""
    return (
        f", cells {error.median_um:.2f} µm off in the median, as estimated, "
        f"{error.share_above_2_um:.1%} perhaps above {SURE_UM:g} µm"
    )


def _as_csv(affine: Affine) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(affine.matrix)
    return text.getvalue()
