"""What is made of a run's registration and of its match rate: a refusal, or a warning."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from flows.config import RunConfig
from pairing.match_rate import MatchRate
from pairing.registration.record import Registration
from shards.errors import BadInput

log = logging.getLogger("cellpair")


def require_accepted(run: RunConfig, registration: Registration, accept: Sequence[str]) -> None:
    """Warns of the verdict's reasons; raises BadInput unless it is one of `accept`.

    A given alignment that can't be assessed is taken as it is.
    """
    for reason in registration.reasons:
        log.warning("%s registration %s: %s", run.id, registration.verdict, reason)
    automatic = registration.method == "auto"
    accepted = tuple(accept) if automatic else (*accept, "not_assessable")
    found_none = registration.he_px_from_xenium_um is None
    if found_none or registration.verdict not in accepted:
        remedy = "check the alignment file and the slide"
        if automatic:
            remedy = (
                "look at it by `cellpair register`, check that slide and run are of one "
                "section, or give the alignment that Xenium Explorer exports"
            )
        raise BadInput(
            f"run {run.id}, alignment" if automatic else run.alignment,
            expected="a place of the cells on the slide"
            if found_none
            else f"an alignment whose verdict is one of {', '.join(accepted)}",
            found=f"{registration.verdict}: {'; '.join(registration.reasons)}",
            remedy=remedy
            if found_none
            else f"{remedy}; or accept the verdict knowingly by registration.accept",
        )


def tell_match_rate(run: RunConfig, rate: MatchRate, *, refined: bool) -> None:
    """Warn where fewer nuclei match than the registration's error explains."""
    remedy = "look at the outlines and the map of matches on the page of the run"
    if not refined:
        remedy += '; let registration.refine be true, or set alignment = "auto"'
    for fault in rate.faults:
        log.warning("%s matches: %s; %s", run.id, fault, remedy)
