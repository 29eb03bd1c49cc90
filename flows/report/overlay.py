"""What lies over the image of a run: the instrument's nuclei, the H&E's, and pictures of both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
import shapely
from shapely import STRtree

from flows.config import CurateConfig
from flows.pipeline import CuratedRun
from flows.report.drawing import View
from flows.report.views import Scene, three_zooms
from pairing import patches
from pairing.annotations import CSV_SUFFIX, Outline, area_of, read_regions
from pairing.geometry import Affine
from pairing.registration.record import read_cell_errors
from pairing.slide import Slide, open_slide
from pairing.warp import Warp
from pairing.xenium import open_xenium
from segmentation.config import NUCLEI_FILE


@dataclass(frozen=True, slots=True)
class Nuclei:
    """Nuclei of a run: the bundle's own table in µm, and those found on the H&E in slide pixels.

    `he_id`, `he_polygons_px` and `has_cell` are of one length, 0 where none were looked for.
    """

    instrument: pd.DataFrame
    he_id: npt.NDArray[np.int64]
    he_polygons_px: npt.NDArray[np.object_]
    has_cell: npt.NDArray[np.bool_]

    def he_centroids_px(self) -> pd.DataFrame:
        """x and y by nucleus id, of the outlines."""
        xy = shapely.get_coordinates(shapely.centroid(self.he_polygons_px))
        return pd.DataFrame(xy, index=self.he_id, columns=["x", "y"])


def read_nuclei(curated: CuratedRun, table: pd.DataFrame) -> Nuclei:
    """The nuclei of a curated run; `table` is of its cells artifact.

    Rows of cells are those of `table`, or of the registration where cells are H&E nuclei.
    Nuclei of cells that it lacks, of withdrawn donors, are left out.
    """
    with open_xenium(curated.config.xenium) as xenium:
        instrument = xenium.read_nuclei()
        cell_ids = xenium.read_cells()["cell_id"]
    known = pd.Index(table["cell_id"])
    if curated.built["cells"].summary["unit"] == "he_nuclei":  # whose ids are others
        known = read_cell_errors(curated.built["registration"].folder).index
    row = np.append(known.get_indexer(cell_ids), -1)  # the last: of no cell
    had_cell = instrument["cell_index"] >= 0
    instrument = instrument.assign(cell_index=row[instrument["cell_index"].to_numpy()])
    instrument = instrument[~had_cell | (instrument["cell_index"] >= 0)]
    if "nuclei" not in curated.built:
        return Nuclei(instrument, np.zeros(0, np.int64), np.zeros(0, object), np.zeros(0, bool))
    found = pq.read_table(
        curated.built["nuclei"].folder / NUCLEI_FILE, columns=["nucleus_id", "polygon_px"]
    )
    he_id = found["nucleus_id"].to_numpy()
    return Nuclei(
        instrument=instrument,
        he_id=he_id,
        he_polygons_px=shapely.from_wkb(found["polygon_px"].to_pylist()),
        has_cell=np.isin(he_id, table["he_nucleus_id"].dropna().to_numpy()),
    )


def pictures(
    config: CurateConfig,
    curated: CuratedRun,
    he_px_from_xenium_um: Warp | None,
    nuclei: Nuclei,
    table: pd.DataFrame,
    kept: npt.NDArray[np.bool_],
) -> tuple[list[View], list[View]]:
    """The views of `views.three_zooms`, on the image that the patches were cut from."""
    grey = curated.built["patches"].summary["grey_scale"]
    polygons_um = nuclei.instrument["polygon"].to_numpy(object)
    with open_image(curated, he_px_from_xenium_um) as slide:
        image_px_from_xenium_um = _image_px_from_xenium_um(slide, he_px_from_xenium_um)
        cells_px = image_px_from_xenium_um(table[["x_um", "y_um"]].to_numpy())
        return three_zooms(
            Scene(
                slide=slide,
                grey_scale=tuple(grey) if grey else None,
                fov_um=config.patch.fov_um,
                cells_px=cells_px,
                shown_px=cells_px[kept],
                instrument_nuclei=STRtree(shapely.transform(polygons_um, image_px_from_xenium_um)),
                he_matched=STRtree(nuclei.he_polygons_px[nuclei.has_cell]),
                he_unmatched=STRtree(nuclei.he_polygons_px[~nuclei.has_cell]),
                donors=_donor_outlines(curated),
            )
        )


@contextmanager
def open_image(curated: CuratedRun, he_px_from_xenium_um: Warp | None) -> Iterator[Slide]:
    """The image that the patches of a run are cut from, as its page may show it.

    What of it is damaged, and what is of withdrawn donors, is shown as glass.
    """
    run = curated.config
    with ExitStack() as stack:
        if run.slide is not None:
            opened = stack.enter_context(open_slide(run.slide, mpp=run.mpp))
        else:
            opened = stack.enter_context(patches.open_run_morphology(run.xenium))
        slide, _ = opened.tolerant()
        if curated.withdrawn:
            assert run.donors is not None
            with open_xenium(run.xenium) as xenium:
                cells = xenium.read_cells()
            centres_px = _image_px_from_xenium_um(slide, he_px_from_xenium_um)(
                cells[["x_um", "y_um"]].to_numpy()
            )
            slide = slide.without(
                area_of(run.donors, curated.withdrawn, cells["cell_id"].tolist(), centres_px)
            )
        yield slide


def _image_px_from_xenium_um(slide: Slide, he_px_from_xenium_um: Warp | None) -> Warp:
    return he_px_from_xenium_um or Warp(Affine.scale(1 / slide.mpp))


def _donor_outlines(curated: CuratedRun) -> list[Outline]:
    donors = curated.config.donors
    if donors is None or donors.suffix.lower() == CSV_SUFFIX:
        return []
    return [outline for donor, outline in read_regions(donors) if donor not in curated.withdrawn]
