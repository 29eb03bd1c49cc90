"""A Xenium bundle as Xenium Onboard Analysis writes it: a folder, or a zip of one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
import shapely
from scipy import sparse
from tifffile import TiffFile

from pairing.slide import Slide, open_plane
from pairing.xenium.columns import column_names, find_table, floats_of, is_csv, read_table, text_of
from pairing.xenium.features import GENE_TYPE, PROTEIN_TYPE
from pairing.xenium.files import BundleFiles, ZipFiles, parsed
from pairing.xenium.manifest import read_manifest
from pairing.xenium.masks import Masks
from pairing.xenium.matrix import H5, matrix_name, read_barcodes, read_matrix
from pairing.xenium.nuclei import nuclei_of_masks, nuclei_of_polygons
from pairing.xenium.panel import BundlePanel
from pairing.xenium.polygons import NO_POLYGONS, PolygonTable, read_polygons
from pairing.xenium.rasters import LabelRaster
from pairing.xenium.tables import cells_table, check_cells, row_of_cell
from pairing.xenium.transcripts import TranscriptBatch, TranscriptTable
from shards.errors import BadInput
from shards.schema import Gene

_TRANSCRIPTS, _CELLS, _MASKS = "transcripts", "cells", "cells.zarr.zip"
_ALL = slice(None)
_CELL_POLYGONS, _NUCLEUS_POLYGONS = "cell_boundaries", "nucleus_boundaries"
# The DAPI image of the layouts since XOA 1.0. A manifest may list images that are not there.
_DAPI = (
    r"morphology_focus/ch\d{4}_dapi\.ome\.tif",
    r"morphology_focus/morphology_focus_0000\.ome\.tif",
    r"morphology_focus\.ome\.tif",
    r"morphology_mip\.ome\.tif",
)


class BundleRun:
    """A run read from a bundle; the methods are documented in `pairing.xenium.XeniumRun`."""

    def __init__(self, path: Path, files: BundleFiles, stack: ExitStack) -> None:
        self.path = path
        self._files = files
        self._stack = stack
        manifest = read_manifest(path, files)
        self.pixel_size_um = manifest.pixel_size_um
        self.species = manifest.species
        self.provenance = manifest.provenance
        self._panel = BundlePanel(path, files)
        self.has_transcripts = find_table(files, _TRANSCRIPTS) is not None
        self._table(_CELLS)

    @property
    def layout(self) -> str:
        masks = "with label masks" if _MASKS in self._files.names else "without label masks"
        zipped = "zipped " if isinstance(self._files, ZipFiles) else ""
        return f"{zipped}Xenium bundle {masks}"

    @cached_property
    def notes(self) -> tuple[str, ...]:
        notes = []
        if not self._panel.names_genes:
            notes.append("the bundle names no panel: the genes are those among its transcripts")
        if not self.has_transcripts:
            notes.append("the bundle has no transcripts: the counts are the instrument's matrix")
        if self._tells_rings_by_closure:
            notes.append(
                "the outlines of nuclei have no label_id: those of one cell were told apart where "
                "they close"
            )
        return tuple(notes)

    @cached_property
    def n_cells(self) -> int:
        path = self._table(_CELLS)
        if is_csv(path):
            return len(self._rows)
        with parsed(path):
            return int(pq.read_metadata(path).num_rows)

    def genes(self) -> tuple[Gene, ...]:
        return self._genes

    @cached_property
    def _genes(self) -> tuple[Gene, ...]:
        return self._panel.genes if self._panel.names_genes else self.transcripts.genes_seen()

    @cached_property
    def _rows(self) -> pd.DataFrame:
        """The cells table; n_nuclei only where it says so, which is since XOA 2.0."""
        path = self._table(_CELLS)
        wanted = {
            "x_um": "x_centroid",
            "y_um": "y_centroid",
            "cell_area_um2": "cell_area",
            "nucleus_area_um2": "nucleus_area",
        }
        if "nucleus_count" in column_names(path):
            wanted["n_nuclei"] = "nucleus_count"
        table = read_table(path, ["cell_id"], list(wanted.values()))
        columns = {name: floats_of(path, column, table) for name, column in wanted.items()}
        rows = pd.DataFrame({"cell_id": text_of(path, "cell_id", table), **columns})
        check_cells(path, rows)
        return rows

    def read_cells(self) -> pd.DataFrame:
        if "n_nuclei" in self._rows:
            return cells_table(self._rows)
        return cells_table(self._rows.assign(n_nuclei=self._n_nuclei_counted))

    @cached_property
    def _n_nuclei_counted(self) -> npt.NDArray[np.int64]:
        """Nuclei by masks or outlines, else by the area that they have: in 1.x a cell has one."""
        if _MASKS in self._files.names or find_table(self._files, _NUCLEUS_POLYGONS):
            owner = self.read_nuclei()["cell_index"].to_numpy()
            return np.bincount(owner[owner >= 0], minlength=len(self._rows))
        return (self._rows["nucleus_area_um2"].to_numpy() > 0).astype(np.int64)

    def read_nuclei(self) -> pd.DataFrame:
        polygons = self._nucleus_polygons()
        if self._masks is not None:
            row_of_label = self._masks.row_of_label("nucleus")
            labels = self._masks.labels("nucleus")
            return nuclei_of_masks(
                labels, row_of_label, polygons or NO_POLYGONS, self.pixel_size_um
            )
        if polygons is None:
            self._raise_missing(f"{_NUCLEUS_POLYGONS}.parquet or {_MASKS}", "copy one into it")
        return nuclei_of_polygons(polygons, self._cell_index(polygons.cell_id))

    def _nucleus_polygons(self) -> PolygonTable | None:
        name = find_table(self._files, _NUCLEUS_POLYGONS)
        has_labels = name is not None and "label_id" in column_names(self._files.path(name))
        if not has_labels and self._masks is not None:
            outlines = self._masks.outlines("nucleus")
            if outlines is not None:
                return outlines
        if name is None:
            return None
        polygons = read_polygons(self._files.path(name))
        if not has_labels and "n_nuclei" in self._rows:
            # Early builds of 2.0: cells of several nuclei, and no label to tell their rings by.
            several = self._rows["cell_id"][self._rows["n_nuclei"] > 1]
            doubtful = polygons.cell_id[~polygons.closed & np.isin(polygons.cell_id, several)]
            if len(doubtful):
                self._raise_missing(
                    f"{name}, label_id (or closed rings)", "copy cells.zarr.zip too"
                )
        return polygons

    @property
    def _tells_rings_by_closure(self) -> bool:
        """Whether cells may have several nuclei of which nothing but their vertices tells."""
        name = find_table(self._files, _NUCLEUS_POLYGONS)
        if name is None or "n_nuclei" not in self._rows:
            return False
        if "label_id" in column_names(self._files.path(name)):
            return False
        return self._masks is None or not self._masks.has_outlines

    def read_cell_polygons(self) -> list[shapely.Polygon | None]:
        result: list[shapely.Polygon | None] = [None] * self.n_cells
        name = find_table(self._files, _CELL_POLYGONS)
        if name is not None:
            polygons: PolygonTable | None = read_polygons(self._files.path(name))
        else:
            polygons = None if self._masks is None else self._masks.outlines("cell")
        if polygons is not None:
            owner = self._cell_index(polygons.cell_id).tolist()
            for i, polygon in zip(owner, polygons.polygon, strict=True):
                if i >= 0:
                    result[i] = polygon
        return result

    def _cell_index(self, cell_id: npt.NDArray[np.object_]) -> npt.NDArray[np.int64]:
        return row_of_cell(self.path, self._rows["cell_id"], cell_id)

    @cached_property
    def transcripts(self) -> TranscriptTable:
        return TranscriptTable([self._table(_TRANSCRIPTS)], self._panel.kinds)

    def iter_transcripts(self, batch_rows: int = 1_000_000) -> Iterator[TranscriptBatch]:
        return self.transcripts.iter_batches(
            self._rows["cell_id"].tolist(), self.genes(), batch_rows
        )

    def read_matrix(self, cells: slice = _ALL) -> sparse.csr_matrix | None:
        if not self._panel.has_matrix:
            return None
        is_gene = (self._panel.features["feature_type"] == GENE_TYPE).to_numpy()
        order = self._barcode_of_cell
        in_order = np.array_equal(order, np.arange(self.n_cells))
        if cells != _ALL and in_order and matrix_name(self._files) == H5:
            some = read_matrix(self._files, cells)
        else:
            some = self._whole_matrix[cells]
        matrix = some[:, np.flatnonzero(is_gene)].tocsr()
        matrix.sort_indices()
        return matrix

    def read_control_counts(self) -> pd.DataFrame | None:
        if not self._panel.has_matrix:
            return None
        kinds = self._panel.features["feature_type"]
        return pd.DataFrame(
            {
                kind: np.asarray(self._whole_matrix[:, rows].sum(axis=1)).ravel()
                for kind, rows in sorted(kinds.groupby(kinds).indices.items())
                if kind not in (GENE_TYPE, PROTEIN_TYPE)
            }
        )

    @cached_property
    def _barcode_of_cell(self) -> npt.NDArray[np.int64]:
        """Which row of the stored matrix is that of each cell."""
        barcodes = read_barcodes(self._files)
        row = row_of_cell(self.path, self._rows["cell_id"], barcodes)
        if not np.array_equal(np.sort(row), np.arange(self.n_cells)):
            raise BadInput(
                f"{self.path}, {matrix_name(self._files)}",
                expected=f"the {self.n_cells} cells of the cells table",
                found=f"{len(barcodes)} barcodes that are not the same cells",
                remedy="take all files of the bundle from one run of the analysis software",
            )
        return np.argsort(row)

    @cached_property
    def _whole_matrix(self) -> sparse.csr_matrix:
        """(cells, features), cells in the order of the cells table."""
        return read_matrix(self._files)[self._barcode_of_cell]

    def read_labels(self, kind: Literal["cell", "nucleus"]) -> LabelRaster | None:
        return None if self._masks is None else self._masks.labels(kind)

    def label_cell_index(self, kind: Literal["cell", "nucleus"]) -> npt.NDArray[np.int64]:
        if self._masks is None:
            self._raise_missing(_MASKS, "copy it into the bundle")
        return self._masks.row_of_label(kind)

    @cached_property
    def _masks(self) -> Masks | None:
        if _MASKS not in self._files.names:
            return None
        path = self._files.path(_MASKS)
        masks = Masks(path, self._stack, self._rows, self.pixel_size_um)
        image = self._dapi()
        if image is not None:
            # The header is enough, and unpacks no image of gigabytes from a zip.
            with (
                parsed(self.path / image),
                self._files.open(image) as file,
                TiffFile(file, is_ome=False) as tiff,
            ):
                shape = tiff.pages.first.shape
            if shape != masks.shape:
                raise BadInput(
                    f"{self.path}, {_MASKS}",
                    expected=f"masks of the size of {image}, {shape[1]} x {shape[0]} px",
                    found=f"{masks.shape[1]} x {masks.shape[0]} px",
                    remedy="take all files of the bundle from one run of the analysis software",
                )
        return masks

    def _dapi(self) -> str | None:
        """Name of the DAPI image."""
        for pattern in _DAPI:
            found = [n for n in self._files.names if re.fullmatch(pattern, n, re.IGNORECASE)]
            if found:
                return min(found)
        return None

    def open_morphology(self) -> AbstractContextManager[Slide]:
        image = self._dapi()
        if image is None:
            self._raise_missing("morphology_focus (the DAPI image)", "copy it into the bundle")
        return open_plane(self._files.path(image), mpp=self.pixel_size_um)

    def _table(self, stem: str) -> Path:
        name = find_table(self._files, stem)
        if name is None:
            self._raise_missing(f"{stem}.parquet or {stem}.csv.gz", "copy it into the bundle")
        return self._files.path(name)

    def _raise_missing(self, what: str, remedy: str) -> NoReturn:
        software = self.provenance.get("software", "unknown software")
        raise BadInput(
            self.path, expected=what, found=f"none (written by {software})", remedy=remedy
        )
