"""A Xenium bundle made by hand, in any layout, and what the tests ask of any run."""

from __future__ import annotations

import gzip
import json
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import zarr
from scipy import io, sparse

from pairing.cells import read_counts
from pairing.counts import CountsQc, write_counts
from pairing.xenium import XeniumRun, open_xenium

# Genes that a loose pattern takes for controls, and controls of every kind.
LURES = ["NEGR1", "NANOG", "NANS", "BLANKET1", "ANTISENSE2", "UnassignedGene", "INTERGENIC1"]
CONTROLS = {
    "NegControlProbe_00042": ("negative_control_probe", "Negative Control Probe"),
    "NegControlCodeword_0500": ("negative_control_codeword", "Negative Control Codeword"),
    "UnassignedCodeword_0001": ("unassigned_codeword", "Unassigned Codeword"),
    "DeprecatedCodeword_0002": ("deprecated_codeword", "Deprecated Codeword"),
    "Intergenic_Region_4": ("genomic_control", "Genomic Control"),
    "BLANK_0001": ("other", "Blank Codeword"),
}
CELL_IDS = ["aaaaaaab-1", "aaaaaaac-1", "aaaaaaad-1"]
SQUARE = np.array([[0, 0], [4, 0], [4, 4], [0, 4], [0, 0]], np.float32)
# Text as the releases stored it in Parquet, and the numbers that XOA 1.0 had for identifiers.
TEXTS = {
    "text": pa.string(),
    "large text": pa.large_string(),
    "bytes": pa.binary(),
    "numbers": pa.int32(),
}


class Bundle:
    """A bundle of three cells, whose tables a test changes before it is written.

    `text` of TEXTS; with "numbers" the cells are 1, 2, 3 and no cell is -1. `as_csv` writes every
    table as csv.gz, `as_mex` the matrix as Matrix Market files; `row_group` rows of Parquet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text, self.as_csv, self.as_mex, self.row_group = "text", False, False, 1_000_000
        names = [*LURES, *CONTROLS]
        n = len(names)
        self.experiment: dict[str, Any] = {
            "pixel_size": 0.2125, "panel_organism": "Human", "analysis_sw_version": "R&D",
        }  # fmt: skip
        self.cells = pd.DataFrame(
            {
                "cell_id": CELL_IDS, "x_centroid": [2.0, 12, 22], "y_centroid": [2.0, 2, 2],
                "cell_area": [16.0, 16, 16], "nucleus_area": [32.0, 0.0, np.nan],
                "nucleus_count": [2, 0, 0],
            }
        )  # fmt: skip
        self.transcripts = pd.DataFrame(
            {
                "cell_id": [CELL_IDS[0], CELL_IDS[2], "UNASSIGNED", *[CELL_IDS[1]] * (n - 3)],
                "overlaps_nucleus": np.arange(n, dtype=np.uint8) % 2,
                "feature_name": names,
                "x_location": np.arange(n, dtype=np.float32),
                "y_location": np.arange(n, dtype=np.float32) / 2,
                "qv": np.linspace(15, 40, n).astype(np.float32),
                "fov_name": "A1",
                "nucleus_distance": np.float32(1.5),
                "codeword_category": ["predesigned_gene"] * len(LURES)
                + ["genomic_control_probe" if c == "genomic_control" else c
                   for c, _ in CONTROLS.values()],
                "is_gene": [True] * len(LURES) + [False] * len(CONTROLS),
            }
        )  # fmt: skip
        self.counted = self.transcripts.copy()  # what the matrix is made of
        self.nuclei = rings(
            (1, CELL_IDS[0], SQUARE), (2, CELL_IDS[0], SQUARE + 6), (3, "UNASSIGNED", SQUARE)
        )
        # name -> (identifier, feature type); None writes no matrix.
        self.features: dict[str, tuple[str, str]] | None = {
            name: (f"ENSG{i:011d}", "Gene Expression") for i, name in enumerate(LURES)
        } | {name: (name, kind) for name, (_, kind) in CONTROLS.items()}
        self.panel: dict[str, str] | None = None  # name -> descriptor
        # Rows of the matrix that follow: whole numbers that are no counts.
        self.proteins: tuple[str, ...] = ()

    @property
    def cell_ids(self) -> list[str]:
        """Identifiers as a run has to tell them."""
        return [self._id(i) for i in self.cells["cell_id"]]

    def write(self) -> Path:
        (self.folder / "morphology_focus").mkdir(parents=True)
        (self.folder / "experiment.xenium").write_text(json.dumps(self.experiment))
        self._write_table("cells", self.cells)
        self._write_table("transcripts", self.transcripts)
        self._write_table("nucleus_boundaries", self.nuclei)
        if self.features is not None:
            self._write_matrix(self.features)
        if self.panel is not None:
            targets = [
                {"type": {"data": {"name": name}, "descriptor": kind}}
                for name, kind in self.panel.items()
            ]
            text = json.dumps({"payload": {"targets": targets}})
            (self.folder / "gene_panel.json").write_text(text)
        return self.folder

    def write_masks(self, **arrays: npt.NDArray[Any]) -> None:
        """`cells.zarr.zip` of arrays by path, / as __; cell_id is added."""
        store = self.folder.with_name("masks.zarr")
        group = zarr.open_group(store, mode="w", zarr_format=2)
        if self.text == "numbers":
            group.create_array("cell_id", data=np.arange(1, 4, dtype=np.uint32))
        else:
            pairs = np.array([[1, 1], [2, 1], [3, 1]], np.uint32)  # CELL_IDS
            group.create_array("cell_id", data=pairs)
        for name, array in arrays.items():
            group.create_array(name.replace("__", "/"), data=array)
        zipped(self.folder / "cells.zarr.zip", store)

    def _id(self, cell_id: str) -> str:
        if self.text != "numbers":
            return cell_id
        return (
            "-1"
            if cell_id == "UNASSIGNED"
            else str(self.cells["cell_id"].tolist().index(cell_id) + 1)
        )

    def _write_table(self, stem: str, frame: pd.DataFrame) -> None:
        if self.text == "numbers":
            frame = frame.assign(cell_id=[self._id(i) for i in frame["cell_id"]])
        # Not by from_pandas, which leaves NaN out.
        table = pa.table({c: pa.array(frame[c], from_pandas=False) for c in frame})
        if self.as_csv:
            with gzip.open(self.folder / f"{stem}.csv.gz", "wb", 1) as file:
                pa_csv.write_csv(table, file)
            return
        for i, field in enumerate(table.schema):
            if pa.types.is_string(field.type) or pa.types.is_null(field.type):  # of no rows
                numbered = self.text == "numbers" and field.name != "cell_id"
                kind = TEXTS["bytes" if numbered else self.text]
                table = table.set_column(i, field.name, table.column(i).cast(kind))
        pq.write_table(table, self.folder / f"{stem}.parquet", row_group_size=self.row_group)

    def _write_matrix(self, features: dict[str, tuple[str, str]]) -> None:
        ids = self.cells["cell_id"].tolist()
        good = self.counted[self.counted["qv"] >= 20]
        good = good[good["cell_id"].isin(ids)]
        row = good["cell_id"].map({c: i for i, c in enumerate(ids)})
        column = good["feature_name"].map({f: i for i, f in enumerate(features)})
        shape = (len(ids), len(features))
        counts = sparse.csr_matrix((np.ones(len(good), np.int32), (row, column)), shape=shape)
        intensities = np.full((len(ids), len(self.proteins)), 5000, np.int32)
        matrix = sparse.csr_matrix(sparse.hstack([counts, intensities]))
        rows = [(i, name, kind) for name, (i, kind) in features.items()]
        rows += [(name, name, "Protein Expression") for name in self.proteins]
        if self.as_mex:
            self._write_mex(rows, matrix)
            return
        with h5py.File(self.folder / "cell_feature_matrix.h5", "w") as file:
            for key in ("data", "indices", "indptr"):
                file[f"matrix/{key}"] = getattr(matrix, key)
            file["matrix/shape"] = matrix.shape[::-1]
            file["matrix/barcodes"] = np.array([self._id(i) for i in ids], "S")
            for i, key in enumerate(("id", "name", "feature_type")):
                file[f"matrix/features/{key}"] = np.array([row[i] for row in rows], "S")

    def _write_mex(self, rows: list[tuple[str, str, str]], matrix: sparse.csr_matrix) -> None:
        folder = self.folder / "cell_feature_matrix"
        folder.mkdir()
        for name, lines in (
            ("features.tsv.gz", ["\t".join(row) for row in rows]),
            ("barcodes.tsv.gz", self.cell_ids),
        ):
            (folder / name).write_bytes(gzip.compress("".join(f"{x}\n" for x in lines).encode()))
        with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
            io.mmwrite(file, matrix.T.tocoo())


def rings(*described: tuple[int, str, npt.NDArray[Any]]) -> pd.DataFrame:
    """The vertex table of (label_id, cell_id, vertices) each."""
    return pd.concat(
        [
            pd.DataFrame({"cell_id": c, "vertex_x": v[:, 0], "vertex_y": v[:, 1], "label_id": i})
            for i, c, v in described
        ]
    )


def zipped(path: Path, bundle: Path, top: str = "", more: dict[str, str] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for file in sorted(bundle.rglob("*")):
            if file.is_file():
                out.write(file, top + file.relative_to(bundle).as_posix())
        for name, text in (more or {}).items():
            out.writestr(name, text)
    return path


def counted(run: XeniumRun, rows: int = 1_000_000) -> Any:
    """(cells, genes) counts at qv >= 20 by the transcripts' own cell."""
    counts = np.zeros((run.n_cells, len(run.genes())), np.int64)
    for batch in run.iter_transcripts(rows):
        kept = (batch.qv >= 20) & (batch.cell_index >= 0) & (batch.gene_index >= 0)
        np.add.at(counts, (batch.cell_index[kept], batch.gene_index[kept]), 1)
    return counts


def looked_up(run: XeniumRun) -> tuple[int, int, int]:
    """Transcripts in whose cell they are by the label raster, on an edge of it, and elsewhere.

    On an edge: the raster shows the cell within 1/64 µm, to which positions are rounded.
    """
    labels = run.read_labels("cell")
    assert labels is not None
    raster, row = np.asarray(labels[:]), run.label_cell_index("cell")
    height, width = raster.shape
    inside = near = total = 0
    for batch in run.iter_transcripts():
        shown = {}
        for dy in (0, -1, 1):
            for dx in (0, -1, 1):
                x = np.floor((batch.x_um.astype(float) + dx / 64) / run.pixel_size_um).astype(int)
                y = np.floor((batch.y_um.astype(float) + dy / 64) / run.pixel_size_um).astype(int)
                label = raster[np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)]
                shown[dy, dx] = row[label] == batch.cell_index
        agrees = shown[0, 0]
        inside += int(agrees.sum())
        near += int((np.any(list(shown.values()), axis=0) & ~agrees).sum())
        total += len(agrees)
    return inside, near, total - inside - near


@dataclass(frozen=True)
class Counts:
    """(cells, genes) as they were written, and what was told of them."""

    matrix: sparse.csr_matrix
    qc: CountsQc


def count_by_cell(run: XeniumRun, qv_min: float) -> Counts:
    """What `write_counts` writes of all cells."""
    with tempfile.TemporaryDirectory() as folder:
        out, kept = Path(folder, "out"), Path(folder, "kept")
        out.mkdir()
        kept.mkdir()
        stays = np.ones(run.n_cells, bool)
        n_counts, qc = write_counts(out, kept, run, qv_min, stays, map)
        stored = read_counts(out, len(run.genes()))
        matrix = sparse.csr_matrix(stored, copy=True)
    assert matrix.has_canonical_format
    np.testing.assert_array_equal(np.asarray(matrix.sum(axis=1)).ravel(), n_counts)
    assert (qc.n_entries, qc.n_counts) == (matrix.nnz, n_counts.sum())
    return Counts(matrix, qc)


def read_all(path: Path) -> None:
    """All that a run is asked for, but for its image."""
    with open_xenium(path) as run:
        count_by_cell(run, 20)
        list(run.iter_transcripts())
        run.read_cells()
        run.read_nuclei()
        run.read_cell_polygons()
        run.read_control_counts()
        for kind in ("cell", "nucleus"):
            labels = run.read_labels(kind)
            if labels is not None:
                labels[:]
                run.label_cell_index(kind)
