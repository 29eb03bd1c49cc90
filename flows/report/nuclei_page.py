"""The page of a segmentation: the slide, its nuclei, and where something failed, in one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flows.report.embed import jpeg_uri
from flows.report.nuclei_parts import NucleiParts, nuclei_parts
from flows.report.render import write_page
from pairing.slide import Slide
from segmentation.config import SegmentationFacts

PAGE_FILE = "index.html"
_PICTURE_PX = 1000


@dataclass(frozen=True, slots=True)
class NucleiPage:
    """All that the template prints."""

    slide: str
    picture: str
    parts: NucleiParts


def write_nuclei_page(page: Path, nuclei: Path, slide: Slide, facts: SegmentationFacts) -> None:
    """Write the page about the table `nuclei` of a slide; the same nuclei give the same bytes."""
    parts = nuclei_parts(nuclei, facts, slide.size_px, slide.mpp)
    mpp = max(slide.size_px) * slide.mpp / _PICTURE_PX
    width, height = (max(1, round(n * slide.mpp / mpp)) for n in slide.size_px)
    picture = jpeg_uri(slide.read_at((0, 0, width, height), mpp))
    write_page(page, "nuclei.html", page=NucleiPage(slide.path.name, picture, parts))
