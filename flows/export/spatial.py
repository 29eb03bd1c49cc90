"""A run as a SpatialData store: outlines of cells and H&E nuclei, and the table of the samples.

Frames are `xenium_um` and the pixels of the image that the patches were cut from: `he_px` (level 0
of the slide), or `morphology_px`. What SpatialData can say of two frames is an affine. Where the
registration has a field on top of it, the affine alone is off by as much as `Placed.residual_um`
tells, and the element `cells_he` holds the outlines carried by the whole registration.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anndata
import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
import shapely
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import Affine as SpatialAffine
from spatialdata.transformations import Identity

from flows.export.bundles import Bundles
from flows.export.cells_table import Columns
from flows.export.genes import JoinedGenes
from flows.export.h5ad import facts, joined_counts
from flows.export.record import Outlines
from flows.export.source import Part, Progress, Source
from pairing.cells import read_cells
from pairing.geometry import Affine
from pairing.registration.record import read_registration
from pairing.warp import Warp
from pairing.xenium import open_xenium
from segmentation.config import NUCLEI_FILE
from shards.artifact import RECORD_FILE, ArtifactRecord
from shards.dataset import read_record
from shards.errors import BadInput

XENIUM_UM: Final = "xenium_um"
HE_PX: Final = "he_px"
MORPHOLOGY_PX: Final = "morphology_px"

_QUARTER_SEGMENTS = 8  # of a circle
_CARRIED_AT_A_TIME = 20_000
_NUCLEUS_COLUMNS = [
    *("nucleus_id", "area_um2", "eccentricity", "haematoxylin", "score", "polygon_px"),
]


@dataclass(frozen=True, slots=True)
class Placed:
    """How a run lies on its image.

    `residual_um` is by how much the affine alone misplaces the exported cells: median, 95th
    percentile and most, 0 where the affine is all there is.
    """

    frame: str
    image_px_from_xenium_um: Warp
    residual_um: tuple[float, float, float]


def write_store(
    path: Path, source: Source, parts: tuple[Part, ...], outlines: Outlines, bundles: Bundles
) -> Placed:
    """Write the samples of one run as a SpatialData store; memory grows with the run's cells.

    Elements: `cells` (µm), `cells_he` and `he_nuclei` (pixels, of runs that have them), and
    `table`, which annotates `cells` by cell_id. Raises BadInput where an artifact or the bundle
    that they need is not there.
    """
    with Progress(parts, path.name) as progress:
        table = _table(source, parts, progress)
    artifacts = _Artifacts.of(source, parts[0].manifest.run)
    placed = _placed(artifacts, parts, table.obs)
    polygons_um, is_circle = _cell_polygons(artifacts, table.obs, outlines, bundles)
    px_from_um = placed.image_px_from_xenium_um.affine
    cells = pd.DataFrame({"is_circle": is_circle}, index=table.obs["cell_id"].to_numpy())
    shapes = {"cells": _shapes(polygons_um, cells, XENIUM_UM, placed.frame, px_from_um)}
    if placed.image_px_from_xenium_um.shift is not None:
        carried = _carried(polygons_um, placed.image_px_from_xenium_um)
        shapes["cells_he"] = _shapes(carried, cells, placed.frame, XENIUM_UM, px_from_um.inverse)
    nuclei = _nuclei(artifacts, table.obs)
    if nuclei is not None:
        shapes["he_nuclei"] = _shapes(*nuclei, placed.frame, XENIUM_UM, px_from_um.inverse)
    off_um = dict(zip(("median", "p95", "max"), placed.residual_um, strict=True))
    store = SpatialData.init_from_elements(
        {**shapes, "table": table},
        attrs={"cellpair": {**facts(source, parts), "affine_residual_um": off_um}},
    )
    # Said, or anndata warns of what its next release will do without, once an array.
    with anndata.settings.override(auto_shard_zarr_v3=False):
        store.write(path)
    return placed


def _table(source: Source, parts: tuple[Part, ...], progress: Progress) -> anndata.AnnData:
    genes = JoinedGenes.of([source.panels[parts[0].manifest.panel_id]])
    columns = Columns.of(source, parts)
    frames, matrices = [], []
    for part in parts:
        frames.append(columns.obs(source, part))
        matrices.append(joined_counts(part, source, genes))
        progress.add(part.shard.n_samples)
    obs = pd.concat(frames)  # texts of the same categories stay such
    obs["region"] = pd.Categorical(["cells"] * len(obs))
    table = anndata.AnnData(
        X=sparse.vstack(matrices, format="csr"),
        obs=obs,
        var=genes.var(),
        obsm={"spatial": obs[["x_um", "y_um"]].to_numpy()},
        uns={"cellpair": facts(source, parts)},
    )
    return TableModel.parse(table, region="cells", region_key="region", instance_key="cell_id")


@dataclass(frozen=True, slots=True)
class _Artifacts:
    """The artifacts that a run's shards were made from, by stage; and the record of its cells."""

    run: str
    folders: dict[str, Path]
    cells: ArtifactRecord
    has_donors_by_file: bool

    @classmethod
    def of(cls, source: Source, run: str) -> _Artifacts:
        (entry,) = (entry for entry in source.dataset.runs if entry.run == run)
        shards = read_record(source.root / entry.path / RECORD_FILE, ArtifactRecord)
        stages = (source.root / entry.path).parent.parent
        folders = {stage: stages / stage / name for stage, name in shards.parents.items()}
        cells = read_record(folders["cells"] / RECORD_FILE, ArtifactRecord)
        folders |= {stage: stages / stage / name for stage, name in cells.parents.items()}
        return cls(run, folders, cells, "donors" in shards.inputs)


def _placed(artifacts: _Artifacts, parts: tuple[Part, ...], obs: pd.DataFrame) -> Placed:
    um, px = obs[["x_um", "y_um"]].to_numpy(), obs[["x_px", "y_px"]].to_numpy()
    if "registration" not in artifacts.folders:
        # The instrument's own image, whose pixels are its µm by one factor.
        scale = Affine.scale(float((px * um).sum() / (um * um).sum()))
        return Placed(MORPHOLOGY_PX, Warp(scale), (0.0, 0.0, 0.0))
    registration, warp = read_registration(artifacts.folders["registration"])
    off_um = np.hypot(*(warp(um) - warp.affine(um)).T) * registration.slide_mpp
    median, p95 = np.quantile(off_um, [0.5, 0.95])
    return Placed(HE_PX, warp, (float(median), float(p95), float(off_um.max())))


def _cell_polygons(
    artifacts: _Artifacts, obs: pd.DataFrame, outlines: Outlines, bundles: Bundles
) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.bool_]]:
    """Outlines in µm, and which are circles of the cell's area around the patch's centre."""
    cells = read_cells(artifacts.folders["cells"]).set_index("cell_id")
    radius_um = np.sqrt(cells["cell_area_um2"].loc[obs["cell_id"]].to_numpy() / np.pi)
    polygon = np.full(len(obs), None, dtype=object)
    if outlines == "instrument":
        with open_xenium(bundles.find(artifacts.run, artifacts.cells.inputs["xenium"])) as run:
            row = pd.Index(run.read_cells()["cell_id"]).get_indexer(obs["cell_id"])
            polygon[:] = np.array(run.read_cell_polygons(), dtype=object)[row]
    circle = shapely.is_missing(polygon)
    if not (radius_um[circle] > 0).all():
        raise BadInput(
            f"run {artifacts.run}",
            expected="an outline or an area for every cell",
            found=f"{np.count_nonzero(~(radius_um[circle] > 0))} cells with neither",
            remedy="export h5ad, which needs neither",
        )
    centre = shapely.points(obs["x_um"].to_numpy()[circle], obs["y_um"].to_numpy()[circle])
    polygon[circle] = shapely.buffer(centre, radius_um[circle], quad_segs=_QUARTER_SEGMENTS)
    return polygon, circle


def _carried(polygons: npt.NDArray[np.object_], warp: Warp) -> npt.NDArray[np.object_]:
    """Every vertex by the whole registration; some polygons at a time, for the memory."""
    parts = range(0, len(polygons), _CARRIED_AT_A_TIME)
    return np.concatenate(
        [shapely.transform(polygons[i : i + _CARRIED_AT_A_TIME], warp) for i in parts]
    )


def _nuclei(
    artifacts: _Artifacts, obs: pd.DataFrame
) -> tuple[npt.NDArray[np.object_], pd.DataFrame] | None:
    """The nuclei found on the slide, in its pixels, each with the sample it is matched to.

    Of a run of several donors only matched ones: whose the others are, nobody says.
    """
    if "nuclei" not in artifacts.folders:
        return None
    table = pq.read_table(artifacts.folders["nuclei"] / NUCLEI_FILE, columns=_NUCLEUS_COLUMNS)
    nuclei = table.drop(["polygon_px"]).to_pandas().set_index("nucleus_id")
    matched = obs[obs["nucleus_id"].notna()].set_index("nucleus_id")["cell_id"]
    nuclei["cell_id"] = matched.reindex(nuclei.index).to_numpy()
    shown = nuclei["cell_id"].notna() | (not artifacts.has_donors_by_file)
    polygon = shapely.from_wkb(table["polygon_px"].to_numpy()[shown.to_numpy()])
    return (polygon, nuclei[shown]) if shown.any() else None


def _shapes(
    polygons: npt.NDArray[np.object_],
    columns: pd.DataFrame,
    frame: str,
    other_frame: str,
    other_from_frame: Affine,
) -> gpd.GeoDataFrame:
    """Polygons of one frame, with the affine by which they lie in the other."""
    axes = ("x", "y")
    affine = SpatialAffine(other_from_frame.array, input_axes=axes, output_axes=axes)
    return ShapesModel.parse(
        gpd.GeoDataFrame(columns, geometry=polygons),
        transformations={frame: Identity(), other_frame: affine},
    )
