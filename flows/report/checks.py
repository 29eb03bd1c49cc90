"""The minute's judgement of a run: what was found beside what is good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from flows.report.cell_figures import CellFigures
from flows.report.maps import FitMaps
from pairing.match_rate import MatchRate
from pairing.registration.evidence import Evidence
from pairing.registration.gates import LEAD_DOUBTFUL, MPP_DOUBTFUL, SHARE_DOUBTFUL
from pairing.registration.place import CLEAR_EVIDENCE, SURE_UM
from pairing.registration.record import ErrorFigures, Registration, Verdict
from shards.schema import Totals

Mark = Literal["good", "look", "bad", "none"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the minute's judgement: what, what was found, what is good, how it stands."""

    what: str
    found: str
    good: str
    mark: Mark


def run_checks(
    registration: Registration | None,
    totals: Totals,
    figures: CellFigures,
    fit: FitMaps | None,
    summary: dict[str, Any],
    patches_summary: dict[str, Any],
) -> list[Check]:
    """The checks of one run, by the limits of the stages; "none" where a person has to judge.

    What is wrong comes first, then what wants a look.

    `summary` is of the cells artifact, `patches_summary` of the patches artifact.
    """
    checks = [
        *(_registration_checks(registration) if registration else []),
        *_match_checks(figures, summary),
        *(_fit_checks(fit) if fit else []),
        *_counts_checks(summary["counts"]),
        Check(
            "Patches over the image's border",
            _share(patches_summary["n_edge"], patches_summary["n_cut"]),
            "few: only cells at the border",
            "none",
        ),
        Check(
            "Patches over damaged places of the file",
            _share(patches_summary["n_on_damaged_tile"], patches_summary["n_cut"]),
            "0",
            "look" if patches_summary["n_on_damaged_tile"] else "good",
        ),
        *_donor_checks(totals),
        Check(
            "Cells kept", _share(totals.kept, totals.seen) + _most_dropped(totals), "most", "none"
        ),
    ]
    return sorted(checks, key=lambda check: {"bad": 0, "look": 1}.get(check.mark, 2))


def _registration_checks(registration: Registration) -> list[Check]:
    marks: dict[Verdict, Mark] = {
        "pass": "good",
        "doubtful": "look",
        "not_assessable": "look",
        "fail": "bad",
    }
    assert registration.implied_mpp is not None  # a run without a transform has no page
    off = registration.implied_mpp / registration.slide_mpp - 1
    checks = [
        Check("Alignment", registration.verdict.replace("_", " "), "pass",
              marks[registration.verdict]),
        Check(
            "Pixel size that the alignment implies",
            f"{registration.implied_mpp:.4f} µm, stated are {registration.slide_mpp:.4f} "
            f"({off:+.1%})",
            f"within {MPP_DOUBTFUL:.0%}",
            "good" if abs(off) <= MPP_DOUBTFUL else "look",
        ),
        Check(
            "Cells on the slide",
            f"{registration.share_on_slide:.1%}",
            f"at least {SHARE_DOUBTFUL:.0%}",
            "good" if registration.share_on_slide >= SHARE_DOUBTFUL else "look",
        ),
    ]  # fmt: skip
    if registration.evidence is not None:
        checks.append(_evidence_check(registration.evidence))
    if registration.error_um is not None:
        checks.append(_error_check(registration.error_um))
    if registration.density_correlation:
        lead = density_lead(registration)
        checks.append(
            Check(
                "Cell density on stained tissue",
                f"r = {registration.density_correlation['given']:.2f}, {lead:+.2f} before the "
                "best wrong variant",
                f"ahead by at least {LEAD_DOUBTFUL}",
                "good" if lead >= LEAD_DOUBTFUL else "look",
            )
        )
    return checks


def _evidence_check(evidence: Evidence) -> Check:
    return Check(
        "Nuclei held out of the fit that match the H&E's",
        f"{evidence.share:.0%} of {evidence.n_held_out:,}, by chance {evidence.chance:.0%}",
        f"evidence of at least {CLEAR_EVIDENCE}: it is {evidence.evidence:.2f}",
        "good" if evidence.evidence >= CLEAR_EVIDENCE else "look",
    )


def _error_check(error: ErrorFigures) -> Check:
    return Check(
        "Estimated error of the cells",
        f"{error.median_um:.1f} µm in the median, {error.p95_um:.1f} µm for 95 of 100; "
        f"{error.share_above_2_um:.1%} above {SURE_UM:g} µm",
        "less than a micron, few cells above",
        "none",
    )


def density_lead(registration: Registration) -> float:
    """By how much the transform as given correlates better than the best of its variants."""
    others = [r for name, r in registration.density_correlation.items() if name != "given"]
    return registration.density_correlation["given"] - max(others)


def _match_checks(figures: CellFigures, summary: dict[str, Any]) -> list[Check]:
    if figures.n_matched is None:
        return []
    found, good = _share(figures.n_matched, summary["n_cells"]), "most"
    if figures.median_iou is not None:
        found += f"; median IoU {figures.median_iou:.2f}, {figures.median_distance_um:.1f} µm apart"
    mark: Mark = "none"
    if summary["match"] is not None:
        rate = MatchRate.model_validate(summary["match"])
        found += f"; {rate.found:.0%} of their nuclei"
        good = (
            f"near the {rate.predicted:.0%} of the nuclei that the alignment's error allows, far "
            f"from the {rate.by_chance:.0%} of chance"
        )
        mark = "look" if rate.faults else "good"
    return [Check("Cells with an H&E nucleus", found, good, mark)]


def _fit_checks(fit: FitMaps) -> list[Check]:
    checks = [
        Check(
            "Steady shift of the H&E nuclei",
            fit.shift_in_words,
            "less than a micron or two",
            "none",
        )
    ]
    if fit.distance_range_um is not None and fit.match_range is not None:
        near_um, far_um = fit.distance_range_um
        least, most = fit.match_range
        checks.append(
            Check(
                "The fit from place to place",
                f"{near_um:.1f} to {far_um:.1f} µm apart; {least:.0%} to {most:.0%} of the cells "
                "matched",
                "alike everywhere: see the maps",
                "none",
            )
        )
    return checks


def _donor_checks(totals: Totals) -> list[Check]:
    if "no_donor" not in totals.dropped:
        return []
    return [
        Check(
            "Cells of a donor",
            _share(totals.seen - totals.dropped["no_donor"], totals.seen),
            "as many as the file of donors is meant to hold",
            "none",
        )
    ]


def _most_dropped(totals: Totals) -> str:
    reason = max(totals.dropped, key=lambda name: totals.dropped[name], default=None)
    if reason is None or not totals.dropped[reason]:
        return ""
    return f"; most others dropped for {reason.replace('_', ' ')}, {totals.dropped[reason]:,}"


def _counts_checks(qc: dict[str, Any]) -> list[Check]:
    mismatches = qc["matrix_mismatches"]
    checks = []
    if mismatches is not None:
        checks.append(
            Check(
                "Counts against the bundle's matrix",
                f"{mismatches:,} of {qc['n_entries']:,} entries differ",
                "0",
                "bad" if mismatches else "good",
            )
        )
    inside = sum(qc["by_category"].values())
    if inside:
        controls = sum(n for name, n in qc["by_category"].items() if name.startswith("negative_"))
        checks.append(
            Check("Negative controls in cells", _share(controls, inside, 3), "next to none", "none")
        )
    return checks


def _share(part: int, whole: int, digits: int = 1) -> str:
    return f"{part:,} of {whole:,}" + (f" ({part / whole:.{digits}%})" if whole else "")
