"""A Xenium bundle as Xenium Onboard Analysis writes it: a folder, or a zip of one."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
import shapely
import zarr
from scipy import sparse

from pairing.slide import Slide, open_plane
from pairing.xenium.files import MANIFEST, BundleFiles, ZipFiles, parsed
from pairing.xenium.shapes import LabelRaster, label_moments, nuclei_table, read_polygons
from pairing.xenium.tables import (
    cell_id_text,
    checked_cells,
    genes_of,
    row_of_cell,
)
from pairing.xenium.transcripts import (
    GENE_TYPE,
    FeatureKinds,
    TranscriptBatch,
    TranscriptTable,
)
from shards.errors import BadInput
from shards.schema import Gene

TRANSCRIPTS, CELLS = "transcripts.parquet", "cells.parquet"
CELL_POLYGONS, NUCLEUS_POLYGONS = "cell_boundaries.parquet", "nucleus_boundaries.parquet"
MATRIX, MASKS, PANEL = "cell_feature_matrix.h5", "cells.zarr.zip", "gene_panel.json"
# Of cells.zarr.zip: masks/0 and polygon_sets/0 are nuclei, /1 cells.
_MASK_OF = {"nucleus": 0, "cell": 1}
# The DAPI image of the layouts since XOA 1.0; in a folder of channels it sorts first.
_DAPI = (
    r"morphology_focus/ch0000_dapi\.ome\.tif",
    r"morphology_focus/morphology_focus_0000\.ome\.tif",
    r"morphology_focus\.ome\.tif",
    r"morphology_mip\.ome\.tif",
)
_NO_CELL = 0xFFFFFFFF


class BundleRun:
    """A run read from a bundle; the methods are documented in `pairing.xenium.XeniumRun`."""

    def __init__(self, path: Path, files: BundleFiles, stack: ExitStack) -> None:
        self.path = path
        self._files = files
        self._stack = stack
        self._manifest = _read_manifest(path, files)
        if CELLS not in files.names:
            self._raise_missing(CELLS, "export the run with XOA 2.0 or later")
        pixel_size = self._manifest.get("pixel_size")
        if not isinstance(pixel_size, int | float) or not pixel_size > 0:
            raise BadInput(
                f"{path}, {MANIFEST}",
                expected="pixel_size: µm per pixel of the morphology image",
                found=repr(pixel_size),
                remedy=f"copy the instrument's own {MANIFEST}",
            )
        self.pixel_size_um = float(pixel_size)
        organism = str(self._manifest.get("panel_organism", "")).strip().lower()
        self.species = organism if organism in {"human", "mouse"} else None
        self.has_transcripts = TRANSCRIPTS in files.names
        self.notes: tuple[str, ...] = ()
        if not {MATRIX, PANEL} & files.names:
            self.notes = ("the bundle names no panel: the genes are those among its transcripts",)

    @property
    def layout(self) -> str:
        masks = "with label masks" if MASKS in self._files.names else "without label masks"
        zipped = "zipped " if isinstance(self._files, ZipFiles) else ""
        return f"{zipped}Xenium bundle {masks}"

    @property
    def provenance(self) -> dict[str, str]:
        ranger = self._manifest.get("xenium_ranger") or {}
        software = f"xenium-ranger {ranger['version']}" if "version" in ranger else None
        found = {
            "software": software or self._manifest.get("analysis_sw_version"),
            "panel": self._manifest.get("panel_name"),
        }
        return {key: str(value) for key, value in found.items() if value}

    @cached_property
    def n_cells(self) -> int:
        path = self._files.path(CELLS)
        with parsed(path):
            return int(pq.read_metadata(path).num_rows)

    @cached_property
    def _features(self) -> pd.DataFrame:
        """name, id and feature_type of every row of the matrix, in its order."""
        path = self._files.path(MATRIX)
        with parsed(path), h5py.File(path) as file:
            group = file["matrix/features"]
            columns = {k: group[k].asstr()[:] for k in ("name", "id", "feature_type")}
        return pd.DataFrame(columns)

    @cached_property
    def _targets(self) -> list[tuple[str, str | None, str]]:
        """(name, id, descriptor) of every target of the gene panel."""
        path = self._files.path(PANEL)
        with parsed(path):
            panel = json.loads(path.read_text("utf-8"))
            types = [target["type"] for target in panel["payload"]["targets"]]
            return [(t["data"]["name"], t["data"].get("id"), t["descriptor"]) for t in types]

    @cached_property
    def _kinds(self) -> FeatureKinds:
        names = self._files.names
        return FeatureKinds(
            dict(zip(self._features["name"], self._features["feature_type"], strict=True))
            if MATRIX in names
            else {},
            {name: kind for name, _, kind in self._targets} if PANEL in names else {},
        )

    @cached_property
    def _genes(self) -> tuple[Gene, ...]:
        if MATRIX in self._files.names:
            rows = self._features[self._features["feature_type"] == GENE_TYPE]
            return genes_of(self.path, rows["name"], rows["id"])
        if PANEL in self._files.names:
            named = [(name, id_) for name, id_, kind in self._targets if kind == "gene"]
            return genes_of(self.path, [n for n, _ in named], [i or "" for _, i in named])
        return self._transcripts.genes_seen()

    def genes(self) -> tuple[Gene, ...]:
        return self._genes

    @cached_property
    def _cells(self) -> pd.DataFrame:
        path = self._files.path(CELLS)
        wanted = {
            "cell_id": "cell_id",
            "x_centroid": "x_um",
            "y_centroid": "y_um",
            "cell_area": "cell_area_um2",
            "nucleus_area": "nucleus_area_um2",
            "nucleus_count": "n_nuclei",
        }
        with parsed(path):
            missing = set(wanted) - set(pq.read_schema(path).names)
        if missing:
            self._raise_missing(f"{CELLS}, {', '.join(sorted(missing))}", "export with XOA >= 2.0")
        with parsed(path):
            cells = pq.read_table(path, columns=list(wanted)).to_pandas().rename(columns=wanted)
        return checked_cells(self.path, cells)

    def read_cells(self) -> pd.DataFrame:
        return self._cells.copy()

    def read_nuclei(self) -> pd.DataFrame:
        if NUCLEUS_POLYGONS not in self._files.names:
            self._raise_missing(NUCLEUS_POLYGONS, "copy it into the bundle")
        polygons = read_polygons(self._files.path(NUCLEUS_POLYGONS))
        if len(polygons.label_id) and polygons.label_id[0] < 0:
            self._raise_missing(f"{NUCLEUS_POLYGONS}, label_id", "export with XOA 2.0 or later")
        masks = self.read_labels("nucleus")
        if masks is None:
            owner = self._cell_index(polygons.cell_id)
            return nuclei_table(polygons.label_id, owner, polygons, None, self.pixel_size_um)
        owner = self.label_cell_index("nucleus")[1:]
        label_id = np.arange(1, len(owner) + 1)
        moments = label_moments(masks)
        return nuclei_table(label_id, owner, polygons, moments, self.pixel_size_um)

    def read_cell_polygons(self) -> list[shapely.Polygon | None]:
        result: list[shapely.Polygon | None] = [None] * self.n_cells
        if CELL_POLYGONS in self._files.names:
            polygons = read_polygons(self._files.path(CELL_POLYGONS))
            for i, polygon in zip(
                self._cell_index(polygons.cell_id), polygons.polygon, strict=True
            ):
                if i >= 0:
                    result[i] = polygon
        return result

    def _cell_index(self, cell_id: npt.NDArray[np.object_]) -> npt.NDArray[np.int64]:
        return row_of_cell(self.path, self._cells["cell_id"], cell_id)

    @cached_property
    def _transcripts(self) -> TranscriptTable:
        if not self.has_transcripts:
            self._raise_missing(TRANSCRIPTS, "copy it into the bundle")
        return TranscriptTable([self._files.path(TRANSCRIPTS)], self._kinds)

    def iter_transcripts(self, batch_rows: int = 1_000_000) -> Iterator[TranscriptBatch]:
        return self._transcripts.iter_batches(
            self._cells["cell_id"].tolist(), self.genes(), batch_rows
        )

    def read_matrix(self) -> sparse.csr_matrix | None:
        if MATRIX not in self._files.names:
            return None
        is_gene = (self._features["feature_type"] == GENE_TYPE).to_numpy()
        matrix = self._whole_matrix[:, np.flatnonzero(is_gene)].tocsr()
        matrix.sort_indices()
        return matrix

    def read_control_counts(self) -> pd.DataFrame | None:
        if MATRIX not in self._files.names:
            return None
        kinds = self._features["feature_type"]
        return pd.DataFrame(
            {
                kind: np.asarray(self._whole_matrix[:, rows].sum(axis=1)).ravel()
                for kind, rows in sorted(kinds.groupby(kinds).indices.items())
                if kind != GENE_TYPE
            }
        )

    @cached_property
    def _whole_matrix(self) -> sparse.csr_matrix:
        """(cells, features) of the h5, which lies there as CSC of its transpose."""
        path = self._files.path(MATRIX)
        with parsed(path), h5py.File(path) as file:
            group = file["matrix"]
            parts = [group[k][:] for k in ("data", "indices", "indptr")]
            n_features, n_cells = group["shape"][:]
            barcodes = group["barcodes"].asstr()[:]
        matrix = sparse.csr_matrix(tuple(parts), shape=(n_cells, n_features), dtype=np.int64)
        row = row_of_cell(self.path, self._cells["cell_id"], barcodes)
        if not np.array_equal(np.sort(row), np.arange(self.n_cells)):
            raise BadInput(
                f"{self.path}, {MATRIX}",
                expected=f"the {self.n_cells} cells of {CELLS}",
                found=f"{len(barcodes)} barcodes that are not the same cells",
                remedy="take all files of the bundle from one run of the analysis software",
            )
        return matrix[np.argsort(row)]

    def read_labels(self, kind: Literal["cell", "nucleus"]) -> LabelRaster | None:
        if MASKS not in self._files.names:
            return None
        array: LabelRaster = self._masks[f"masks/{_MASK_OF[kind]}"]
        return array

    def label_cell_index(self, kind: Literal["cell", "nucleus"]) -> npt.NDArray[np.int64]:
        if MASKS not in self._files.names:
            self._raise_missing(MASKS, "copy it into the bundle")
        owner = self._masks[f"polygon_sets/{_MASK_OF[kind]}/cell_index"][:].astype(np.int64)
        owner[(owner == _NO_CELL) | (owner == -1)] = -1
        if len(owner) and not (owner.min() >= -1 and owner.max() < self.n_cells):
            raise BadInput(
                f"{self.path}, {MASKS}",
                expected=f"owners among the {self.n_cells} cells",
                found=f"cell_index from {owner.min()} to {owner.max()}",
                remedy="take all files of the bundle from one run of the analysis software",
            )
        return np.concatenate([np.array([-1]), owner])

    @cached_property
    def _masks(self) -> Any:
        path = self._files.path(MASKS)
        with parsed(path), zipfile.ZipFile(path):
            pass  # zarr hides what is wrong with a zip behind an error of its own
        store = zarr.storage.ZipStore(path, mode="r", read_only=True)
        self._stack.callback(store.close)
        group: Any = zarr.open_group(store, mode="r", zarr_format=2)
        if "polygon_sets" not in group:
            self._raise_missing(f"{MASKS}, polygon_sets", "export with XOA 2.0 or later")
        ids = cell_id_text(group["cell_id"][:])
        if not np.array_equal(ids, self._cells["cell_id"].to_numpy(object)):
            raise BadInput(
                f"{self.path}, {MASKS}",
                expected=f"the cells of {CELLS} in the same order",
                found=f"{len(ids)} cells that differ",
                remedy="take all files of the bundle from one run of the analysis software",
            )
        return group

    def open_morphology(self) -> AbstractContextManager[Slide]:
        for pattern in _DAPI:
            for name in sorted(self._files.names):
                if re.fullmatch(pattern, name):
                    return open_plane(self._files.path(name), mpp=self.pixel_size_um)
        self._raise_missing("morphology_focus (the DAPI image)", "copy it into the bundle")

    def _raise_missing(self, what: str, remedy: str) -> NoReturn:
        software = self.provenance.get("software", "unknown software")
        raise BadInput(
            self.path, expected=what, found=f"none (written by {software})", remedy=remedy
        )


def _read_manifest(path: Path, files: BundleFiles) -> dict[str, Any]:
    try:
        manifest = json.loads(files.path(MANIFEST).read_text("utf-8"))
    except ValueError as error:
        raise BadInput(
            f"{path}, {MANIFEST}",
            expected="a JSON object",
            found=str(error),
            remedy=f"copy the instrument's own {MANIFEST}",
        ) from error
    return dict(manifest)
