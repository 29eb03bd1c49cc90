"""A verdict in words: what it means, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator

from flows.report.registration_parts import stretch_of
from pairing.geometry import Affine
from pairing.registration.gates import MPP_DOUBTFUL, MPP_FAIL, SHARE_DOUBTFUL
from pairing.registration.place import CLEAR_EVIDENCE, SCALES, SURE_UM
from pairing.registration.record import Registration

# Fewer unsure cells than this are on the rims of any section.
_FEW = 0.05
_EXPORT = "export the alignment from Xenium Explorer and give it"


def meaning(registration: Registration) -> str:
    """One sentence on what the verdict says of the cells' places."""
    match registration.verdict:
        case "pass":
            error = registration.error_um
            if error is not None and error.share_above_2_um > _FEW:
                return (
                    "Most cells lie on their nuclei; each says how far off it may be, and "
                    f"{error.share_above_2_um:.0%} may be nowhere near."
                )
            return "The cells lie on their nuclei; each says how far off it may be."
        case "doubtful":
            return "The cells may lie on their nuclei, but not surely, or not everywhere."
        case "fail" if registration.he_px_from_xenium_um is None:
            return "No place on the slide was found where the nuclei of the bundle fit."
        case "fail":
            return "The cells must not be cut from the slide by this transform as it stands."
        case "not_assessable" if registration.method != "auto":
            return "Nothing speaks for or against it: the alignment was taken as given."
        case "not_assessable":
            return "There are too few nuclei to find a place by, or to judge one."


def next_steps(registration: Registration) -> list[str]:
    """What a person does now, the most urgent first."""
    return [
        *_on_the_pixel_size(registration),
        *_on_the_verdict(registration),
        *_on_the_cells(registration),
    ]


def _on_the_pixel_size(registration: Registration) -> Iterator[str]:
    implied_mpp, stated_mpp = registration.implied_mpp, registration.slide_mpp
    if implied_mpp is None or abs(implied_mpp / stated_mpp - 1) <= MPP_DOUBTFUL:
        return
    assert registration.he_px_from_xenium_um is not None
    stretch = stretch_of(Affine.of(registration.he_px_from_xenium_um))
    if stretch > MPP_FAIL:
        yield (
            f"One axis came out {stretch:.0%} larger than the other. A wrong pixel size does not "
            "do that, but a fold or a tear of a small section does: look at the map of errors "
            "before you set another pixel size."
        )
    if registration.method == "auto":
        yield (
            f"The slide states a pixel size of {stated_mpp:.4f} µm, the nuclei say "
            f"{implied_mpp:.4f}: register again with mpp = {implied_mpp:.4f}."
        )
    else:
        yield (
            f"The slide states a pixel size of {stated_mpp:.4f} µm, the alignment implies "
            f"{implied_mpp:.4f}. If the alignment is of another file of this slide, give that "
            f"file; if the slide states it wrong, set mpp = {implied_mpp:.4f}."
        )


def _on_the_verdict(registration: Registration) -> Iterator[str]:
    evidence = registration.evidence
    match registration.verdict:
        case "pass":
            yield "Look at the close views once: outlines sit on nuclei. Then use it."
        case "doubtful":
            yield (
                "Look at the views: where outlines sit on nuclei, it is right. Where they do, it "
                'can be used; curate accepts "doubtful" unless registration.accept says otherwise.'
            )
            if evidence is not None and evidence.evidence < CLEAR_EVIDENCE:
                yield (
                    "Few nuclei agree. A blurred scan, a pale stain and the section after do "
                    f"that: scan again, or {_EXPORT}."
                )
        case "fail":
            if registration.method != "auto":
                yield (
                    "Check that the alignment is of this slide and this bundle, or register with "
                    'alignment = "auto".'
                )
            if evidence is None or evidence.evidence < CLEAR_EVIDENCE:
                yield (
                    "Check that slide and bundle are of the same section. The section after, "
                    "another stain and a fluorescence picture do not fit, and should not."
                )
            if registration.he_px_from_xenium_um is None:
                yield (
                    f"Check the pixel size, stated as {registration.slide_mpp:g} µm: sizes from "
                    f"{min(SCALES):g} to {max(SCALES):g} times that were tried, no others."
                )
            if registration.method == "auto":
                yield f"If it is the same section: {_EXPORT}."
        case "not_assessable" if registration.method != "auto":
            yield "Judge by eye, in all views: nothing else does."
        case "not_assessable":
            yield f"An automatic registration is not used without evidence: {_EXPORT}."


def _on_the_cells(registration: Registration) -> Iterator[str]:
    has_place = registration.he_px_from_xenium_um is not None
    if has_place and registration.share_on_slide < SHARE_DOUBTFUL:
        yield (
            f"Only {registration.share_on_slide:.0%} of the cells lie on the slide: check that it "
            "shows the whole section. The others get no picture."
        )
    error = registration.error_um
    if error is not None and error.share_above_2_um > 0:
        yield (
            f"Leave out the cells whose error_um is above {SURE_UM:g} where the exact place "
            f"matters ({error.share_above_2_um:.1%}): the map of errors shows where they lie. A "
            "streak of them is a fold or a tear, a patch of them tissue that one side lacks."
        )
