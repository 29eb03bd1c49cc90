"""The same picture in another file: exports of one slide that differ in resolution."""

from __future__ import annotations

import re
from pathlib import Path

from pairing.slide import open_slide
from shards.errors import BadInput

_SUFFIXES = re.compile(r"(\.ome)?\.(tiff?|btf|tf[28]|svs|ndpi|mrxs|scn|bif|vms)$", re.IGNORECASE)


def sibling_of_mpp(path: Path, mpp: float, tolerance: float) -> tuple[str, float] | None:
    """Name and µm per pixel of the file beside a slide, of its stem, that has about this `mpp`.

    Data sets ship `he_image.tif` beside `he_image.ome.tif`, of another resolution, and one
    alignment for both; it belongs to one of them. `tolerance` is a share of `mpp`. None where no
    such file says that it has it.
    """
    stem = _SUFFIXES.sub("", path.name)
    for other in sorted(path.parent.iterdir()):
        if other.name == path.name or not other.is_file():
            continue
        if _SUFFIXES.sub("", other.name) != stem or not _SUFFIXES.search(other.name):
            continue
        try:
            with open_slide(other) as slide:
                found = slide.mpp
        except BadInput:
            continue  # a file that can't be used is none to recommend
        if abs(found / mpp - 1) <= tolerance:
            return other.name, found
    return None
