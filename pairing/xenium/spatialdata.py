"""A Xenium run in a SpatialData store, as spatialdata-io writes it.

Read with zarr, anndata and pyarrow: importing spatialdata takes seconds for the little needed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
import shapely
import zarr
from scipy import sparse

from pairing.slide import Slide
from pairing.slide_sources import ArrayLevel
from pairing.xenium.features import GENE_TYPE, PROTEIN_TYPE, FeatureKinds
from pairing.xenium.files import parsed
from pairing.xenium.nuclei import nuclei_of_masks, nuclei_of_polygons
from pairing.xenium.polygons import PolygonTable
from pairing.xenium.rasters import LabelRaster, StoredRaster, label_owners
from pairing.xenium.store_versions import check_versions
from pairing.xenium.tables import cells_table, check_cells, genes_of, row_of_cell
from pairing.xenium.transcripts import TranscriptBatch, TranscriptTable
from shards.errors import BadInput
from shards.schema import Gene

_ALL = slice(None)
_POINTS = "points/transcripts"
_IMAGES = ("images/morphology_focus", "images/morphology_mip")
_SPECIES_OF_PREFIX = {"ENSG": "human", "ENSMUSG": "mouse"}


class StoreRun:
    """A run read from a store; the methods are documented in `pairing.xenium.XeniumRun`."""

    layout = "SpatialData store"

    def __init__(self, path: Path) -> None:
        self.path = path
        # Consolidated metadata may name arrays that are not there, which then read as zeros.
        with parsed(path):
            root = zarr.open_group(path, mode="r", use_consolidated=False)
        check_versions(path, root)
        tables = sorted(p.name for p in (path / "tables").iterdir() if p.is_dir())
        if "table" not in tables:
            self._raise("tables/table", f"tables: {', '.join(tables) or 'none'}")
        table = root["tables/table"]
        self._root: Any = root
        self._table: Any = table
        self.has_transcripts = _POINTS in root
        self.provenance: dict[str, str] = {}
        self.notes: tuple[str, ...] = ()
        self._names_genes = isinstance(table, zarr.Group) and "var" in table
        if not self._names_genes:
            self.notes = (
                "the store's table names no genes (tables/table/var is missing): the panel is the "
                "genes among its transcripts, and genes without any count as unmeasured",
            )

    @cached_property
    def pixel_size_um(self) -> float:
        """µm per pixel, from where transcripts and image lie in the store's common frame."""
        if not self.has_transcripts:
            self._raise(_POINTS, "none, and so no pixel size")
        return self._scale(self._image) / self._scale(_POINTS)

    @property
    def species(self) -> str | None:
        prefixes = {g.ensembl.rstrip("0123456789") for g in self.genes() if g.ensembl}
        return _SPECIES_OF_PREFIX.get(prefixes.pop()) if len(prefixes) == 1 else None

    @cached_property
    def n_cells(self) -> int:
        return len(self._obs)

    @cached_property
    def _obs(self) -> pd.DataFrame:
        with parsed(self.path / "tables/table/obs"):
            obs: pd.DataFrame = _element(self._table["obs"])
        return obs

    @cached_property
    def _var(self) -> pd.DataFrame:
        with parsed(self.path / "tables/table/var"):
            var: pd.DataFrame = _element(self._table["var"])
        return var

    @cached_property
    def _is_gene(self) -> npt.NDArray[np.bool_]:
        if "feature_types" not in self._var:
            return np.ones(len(self._var), dtype=bool)
        return (self._var["feature_types"] == GENE_TYPE).to_numpy(bool)

    def genes(self) -> tuple[Gene, ...]:
        return self._genes

    @cached_property
    def _genes(self) -> tuple[Gene, ...]:
        if not self._names_genes:
            return self.transcripts.genes_seen()
        var = self._var[self._is_gene]
        ids = var["gene_ids"] if "gene_ids" in var else pd.Series("", index=var.index)
        return genes_of(self.path, var.index.astype(str), ids.astype(str))

    @cached_property
    def _rows(self) -> pd.DataFrame:
        """The cells; n_nuclei only where the table says it, which XOA does since 2.0."""
        for column in ("cell_id", "cell_area", "nucleus_area"):
            if column not in self._obs:
                self._raise(f"the column {column} in tables/table/obs", "none")
        with parsed(self.path / "tables/table/obsm/spatial"):
            x_um, y_um = np.asarray(_element(self._table["obsm/spatial"]), np.float64).T[:2]
        cells = pd.DataFrame(
            {
                "cell_id": self._obs["cell_id"].to_numpy(object),
                "x_um": x_um,
                "y_um": y_um,
                "cell_area_um2": self._obs["cell_area"].to_numpy(np.float64),
                "nucleus_area_um2": self._obs["nucleus_area"].to_numpy(np.float64),
            }
        )
        if "nucleus_count" in self._obs:
            cells["n_nuclei"] = self._obs["nucleus_count"].to_numpy()
        check_cells(self.path, cells)
        return cells

    def read_cells(self) -> pd.DataFrame:
        if "n_nuclei" in self._rows:
            return cells_table(self._rows)
        owner = self.read_nuclei()["cell_index"].to_numpy()
        n_nuclei = np.bincount(owner[owner >= 0], minlength=self.n_cells)
        return cells_table(self._rows.assign(n_nuclei=n_nuclei))

    def read_nuclei(self) -> pd.DataFrame:
        polygon, cell_index = self._shapes("nucleus_boundaries")
        n = len(polygon)
        mean_um = shapely.get_coordinates(shapely.centroid(polygon))
        ids = np.full(n, None, object)
        polygons = PolygonTable(np.full(n, -1), ids, polygon, mean_um, np.ones(n, bool))
        labels = self.read_labels("nucleus")
        if labels is None:
            return nuclei_of_polygons(polygons, cell_index)
        owner = self.label_cell_index("nucleus")
        return nuclei_of_masks(labels, owner, polygons, self.pixel_size_um)

    def read_cell_polygons(self) -> list[shapely.Polygon | None]:
        result: list[shapely.Polygon | None] = [None] * self.n_cells
        if "shapes/cell_boundaries" in self._root:
            polygon, cell_index = self._shapes("cell_boundaries")
            for i, p in zip(cell_index.tolist(), polygon, strict=True):
                if i >= 0:
                    result[i] = p
        return result

    def _shapes(self, name: str) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.int64]]:
        """Polygons of an element in µm, and the row of the cell that each belongs to."""
        element = f"shapes/{name}"
        if element not in self._root:
            self._raise(element, "none")
        if self._scale(element) != self._scale(_POINTS):
            self._raise(f"{element} in µm, like the transcripts", "another scale")
        path = self.path / element / "shapes.parquet"
        with parsed(path):
            table = pq.read_table(path)
        owner = "cell_id" if "cell_id" in table.column_names else "__index_level_0__"
        if owner not in table.column_names:
            self._raise(f"the cell of each polygon in {element}", "no cell_id and no index")
        polygon = shapely.from_wkb(table.column("geometry").to_numpy())
        if not (shapely.get_type_id(polygon) == shapely.GeometryType.POLYGON).all():
            self._raise(f"polygons in {element}", "other geometries among them")
        cell_ids = np.array(table.column(owner).to_pylist(), dtype=object)
        return polygon, row_of_cell(self.path, self._rows["cell_id"], cell_ids)

    @cached_property
    def transcripts(self) -> TranscriptTable:
        files = (self.path / _POINTS / "points.parquet").glob("part.*.parquet")
        paths = sorted(files, key=lambda p: int(p.name.split(".")[1]))
        if not paths:
            self._raise(f"{_POINTS}/points.parquet/part.*.parquet", "none")
        kinds = FeatureKinds()
        if self._names_genes and "feature_types" in self._var:
            types = self._var["feature_types"]
            kinds = FeatureKinds(dict(types[types != PROTEIN_TYPE]))
        return TranscriptTable(paths, kinds, x="x", y="y")

    def iter_transcripts(self, batch_rows: int = 1_000_000) -> Iterator[TranscriptBatch]:
        return self.transcripts.iter_batches(
            self._rows["cell_id"].tolist(), self.genes(), batch_rows
        )

    def read_matrix(self, cells: slice = _ALL) -> sparse.csr_matrix | None:
        return self._counts[cells] if self._names_genes else None

    @cached_property
    def _counts(self) -> sparse.csr_matrix:
        matrix = sparse.csr_matrix(_element(self._table["X"]))[:, np.flatnonzero(self._is_gene)]
        counts = matrix.astype(np.int64)
        if (counts != matrix).nnz:
            self._raise("raw counts in tables/table/X", "numbers that are not whole")
        counts.sort_indices()
        return counts

    def read_control_counts(self) -> pd.DataFrame | None:
        columns = {
            "control_probe_counts": "Negative Control Probe",
            "control_codeword_counts": "Negative Control Codeword",
            "unassigned_codeword_counts": "Unassigned Codeword",
            "deprecated_codeword_counts": "Deprecated Codeword",
            "genomic_control_counts": "Genomic Control",
        }
        present = {k: v for k, v in columns.items() if k in self._obs}
        counts = self._obs[list(present)].rename(columns=present).reset_index(drop=True)
        return counts[sorted(present.values())]

    def read_labels(self, kind: Literal["cell", "nucleus"]) -> LabelRaster | None:
        element = f"labels/{kind}_labels"
        if element not in self._root:
            return None
        if self._scale(element) != self._scale(self._image):
            self._raise(f"{element} on the pixels of the image", "another scale")
        array = self._root[f"{element}/{self._multiscale(element)[0]}"]
        return StoredRaster(self.path / element, array)

    def label_cell_index(self, kind: Literal["cell", "nucleus"]) -> npt.NDArray[np.int64]:
        cells, nuclei = self.read_labels("cell"), self.read_labels("nucleus")
        if cells is None or "cell_labels" not in self._obs:
            self._raise("labels/cell_labels and its values in tables/table/obs", "none")
        value = self._obs["cell_labels"].to_numpy(np.int64)
        row = np.full(int(value.max(initial=0)) + 1, -1)
        row[value] = np.arange(len(value))
        if kind == "cell":
            return row
        if nuclei is None:
            self._raise("labels/nucleus_labels", "none")
        owner = label_owners(nuclei, cells)
        return row[np.where(owner < len(row), owner, 0)]

    def open_morphology(self) -> AbstractContextManager[Slide]:
        names = [
            c.get("label", "")
            for c in self._attrs(self._image).get("omero", {}).get("channels", [])
        ]
        dapi = [i for i, name in enumerate(names) if "dapi" in str(name).lower()]
        # A store without channel names has the instrument's order, DAPI first.
        channel = dapi[0] if dapi else 0
        levels = [
            ArrayLevel(self._root[f"{self._image}/{path}"], channel=channel)
            for path in self._multiscale(self._image)
        ]
        return nullcontext(Slide(self.path / self._image, self.pixel_size_um, levels, fill=0))

    @cached_property
    def _image(self) -> str:
        for element in _IMAGES:
            if element in self._root:
                return element
        self._raise(" or ".join(_IMAGES), "neither")

    def _attrs(self, element: str) -> dict[str, Any]:
        attrs = dict(self._root[element].attrs)
        # Stores in zarr 3 keep what describes the image under one key.
        return dict(attrs.get("ome", attrs))

    def _multiscale(self, element: str) -> list[str]:
        """Paths of the levels of an image or label element, finest first."""
        return [d["path"] for d in self._attrs(element)["multiscales"][0]["datasets"]]

    def _scale(self, element: str) -> float:
        """Factor from an element's own units (pixels or µm) to the store's common frame."""
        attrs = self._attrs(element)
        described = attrs["multiscales"][0] if "multiscales" in attrs else attrs
        transforms = described["coordinateTransformations"]
        chosen = ([t for t in transforms if t["output"]["name"] == "global"] or transforms)[0]
        kind = chosen["type"]
        if kind == "identity":
            return 1.0
        if kind == "scale":
            axes = [axis["name"] for axis in chosen["input"]["axes"]]
            factor = dict(zip(axes, chosen["scale"], strict=True))
            if factor["x"] == factor["y"]:
                return float(factor["x"])
        self._raise(f"{element} placed by one scale", f"a transformation of type {kind}")

    def _raise(self, expected: str, found: str) -> NoReturn:
        raise BadInput(
            self.path,
            expected=expected,
            found=found,
            remedy="write the store again with a current spatialdata-io, or give the bundle itself",
        )


def _element(stored: Any) -> Any:
    # A second and a half of anndata that no bundle of the instrument's own needs.
    from anndata.io import read_elem

    return read_elem(stored)
