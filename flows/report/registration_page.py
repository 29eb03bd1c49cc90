"""The page of a registration: verdict, pictures, errors, evidence, in one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from shapely import STRtree

from flows.config import PatchConfig
from flows.report.drawing import View
from flows.report.registration_parts import RegistrationParts, registration_parts
from flows.report.registration_words import meaning, next_steps
from flows.report.render import write_page
from flows.report.views import BEFORE, INSTRUMENT, Scene, side_by_side, three_zooms
from pairing.geometry import Points
from pairing.registration.gates import on_slide
from pairing.registration.given import read_alignment
from pairing.registration.record import (
    CELLS_FILE,
    REGISTRATION_FILE,
    Registration,
    read_cell_places,
    read_registration,
)
from pairing.slide import Slide, open_slide
from pairing.warp import Warp
from pairing.xenium import open_xenium
from shards.dataset import read_record
from shards.errors import BadInput

PAGE_FILE = "index.html"


@dataclass(frozen=True, slots=True)
class RegistrationPage:
    """All that the template prints.

    Without a transform `parts` is None, and `apart` shows slide and bundle instead of the views.
    """

    bundle: str
    slide: str
    alignment: str | None
    registration: Registration
    meaning: str
    next_steps: list[str]
    parts: RegistrationParts | None
    views: list[View]
    corners: list[View]
    apart: list[View]
    colours: dict[str, tuple[int, int, int]]


def write_registration_page(
    folder: Path, xenium: Path, slide: Path, mpp: float | None, alignment: Path | None = None
) -> Path:
    """Write `folder/index.html` about the registration in `folder`; returns its path.

    Opens bundle and slide for the pictures. `alignment` is the file that was refined, to be shown
    as it was before. The same registration gives the same bytes. Raises BadInput where the cells
    of the folder are not those of the bundle.
    """
    registration = read_record(folder / REGISTRATION_FILE, Registration)
    parts = None
    views: list[View] = []
    corners: list[View] = []
    apart: list[View] = []
    if registration.he_px_from_xenium_um is None:
        with open_xenium(xenium) as run, open_slide(slide, mpp=mpp) as opened:
            places = run.read_cells()[["x_um", "y_um"]].to_numpy(np.float64)
            if len(places):
                apart = side_by_side(opened.tolerant()[0], places)
    else:
        _, warp = read_registration(folder)
        cells = read_cell_places(folder)
        with open_xenium(xenium) as run:
            cells_um = _places_um(cells, run.read_cells(), xenium, folder)
            nuclei = run.read_nuclei()
            given = read_alignment(alignment, run.pixel_size_um)[1] if alignment else None
        fov_um = PatchConfig().fov_um
        with open_slide(slide, mpp=mpp) as opened:
            image = opened.tolerant()[0]
            parts = registration_parts(
                registration, warp, cells, cells_um, nuclei, image, given, fov_um
            )
            views, corners = _views(image, warp, cells, nuclei, fov_um)
    page = RegistrationPage(
        bundle=xenium.name,
        slide=slide.name,
        alignment=alignment.name if alignment else None,
        registration=registration,
        meaning=meaning(registration),
        next_steps=next_steps(registration),
        parts=parts,
        views=views,
        corners=corners,
        apart=apart,
        colours={"instrument": INSTRUMENT, "before": BEFORE},
    )
    write_page(folder / PAGE_FILE, "registration.html", page=page)
    return folder / PAGE_FILE


def _places_um(cells: pd.DataFrame, bundle: pd.DataFrame, xenium: Path, folder: Path) -> Points:
    """(n, 2) places of the registration's cells in the Xenium frame."""
    row = pd.Index(bundle["cell_id"]).get_indexer(cells["cell_id"])
    if (row < 0).any():
        raise BadInput(
            xenium,
            expected=f"the bundle that {folder / CELLS_FILE} is of",
            found=f"a bundle without {int((row < 0).sum()):,} of its {len(cells):,} cells",
            remedy="give the bundle that was registered",
        )
    places: Points = bundle[["x_um", "y_um"]].to_numpy(np.float64)[row]
    return places


def _views(
    slide: Slide, warp: Warp, cells: pd.DataFrame, nuclei: pd.DataFrame, fov_um: float
) -> tuple[list[View], list[View]]:
    """The instrument's nuclei on the H&E; none where no cell lies on it."""
    cells_px = cells[["x_px", "y_px"]].to_numpy()
    shown: npt.NDArray[np.bool_] = on_slide(cells_px, slide.size_px)
    if not shown.any():
        return [], []
    none = STRtree([])
    scene = Scene(
        slide=slide,
        grey_scale=None,
        fov_um=fov_um,
        cells_px=cells_px,
        shown_px=cells_px[shown],
        instrument_nuclei=STRtree(shapely.transform(nuclei["polygon"].to_numpy(object), warp)),
        he_matched=none,
        he_unmatched=none,
        donors=[],
    )
    return three_zooms(scene, with_patch=False)
