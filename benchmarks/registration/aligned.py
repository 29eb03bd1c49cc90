"""One registration of one pair, beside the truth."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from benchmarks.registration.pairs import Pair
from pairing.geometry import Affine
from pairing.registration.automatic import Alignment, align, hold_out
from pairing.registration.gates import Finding, mpp_findings

F64 = npt.NDArray[np.float64]
# A cell is right if it is nearer than this to its true place, and called right if estimated so.
RIGHT_UM = 2.0
# The transform as a whole is a wrong one if it is as far off as a cell is wide.
WRONG_UM = 5.0


@dataclass(frozen=True, slots=True)
class Aligned:
    """What came of a pair: errors and estimates are of its cells on tissue that is there.

    The verdict is of the nuclei and of the pixel size that the transform implies, as the stage
    gives it.
    """

    pair: Pair
    alignment: Alignment
    verdict: str
    reasons: tuple[str, ...]
    error_um: F64
    estimate_um: F64
    seconds: float

    @property
    def passes(self) -> bool:
        return self.verdict == "pass"

    @property
    def median_um(self) -> float:
        return float(np.median(self.error_um))

    @property
    def p95_um(self) -> float:
        return float(np.quantile(self.error_um, 0.95))

    @property
    def is_wrong(self) -> bool:
        """Passed, and not where the cells are."""
        return self.passes and self.median_um > WRONG_UM


def aligned(pair: Pair, given: Affine | None = None, mpp: float | None = None) -> Aligned:
    """The registration of a pair; `mpp` overrules what the slide says of itself."""
    started_s = time.monotonic()
    alignment = align(pair.um, hold_out(pair.cell_ids), partial(pair.open, mpp), given)
    seconds = time.monotonic() - started_s
    verdict, reasons = _judged(pair, alignment, mpp or pair.mpp)
    there = pair.take(~pair.missing)
    warp = alignment.he_px_from_xenium_um
    if warp is None:
        # Cells without a place are as far off as can be, and nobody says otherwise.
        nowhere = np.full(len(there.um), np.inf)
        return Aligned(pair, alignment, verdict, reasons, nowhere, nowhere, seconds)
    error_um = there.error_um(warp(there.um))
    estimate_um = alignment.error_um(there.um)
    return Aligned(pair, alignment, verdict, reasons, error_um, estimate_um, seconds)


def _judged(pair: Pair, alignment: Alignment, mpp: float) -> tuple[str, tuple[str, ...]]:
    """The worse of what nuclei and pixel size say, and why."""
    found: list[Finding] = []
    if alignment.implied_mpp is not None:
        found = list(mpp_findings(pair.slide, mpp, alignment.implied_mpp, automatic=True))
    said = {alignment.verdict, *(finding.verdict for finding in found)}
    worst = next(v for v in ("fail", "not_assessable", "doubtful", "pass") if v in said)
    return worst, (*alignment.reasons, *(finding.words for finding in found))
