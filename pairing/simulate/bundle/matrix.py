"""The cell-feature matrix as HDF5 and as Matrix Market files, with rows of protein expression."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
from scipy import sparse

from pairing.simulate.bundle.cells import gzipped
from pairing.simulate.bundle.layouts import GENE_TYPE, LayoutFeatures

# Named as the instrument names them: some are symbols of genes too, and so twice in the matrix.
PROTEINS = ("CD3E", "CD8A", "CD68", "CD163", "CD14", "PCNA", "CD20", "Ki-67", "PanCK", "Vimentin")
# Protein rows hold whole numbers: intensity × this.
PROTEIN_SCALING_FACTOR = 1000.0
PROTEIN_TYPE = "Protein Expression"
_MTX_ENTRIES = 2_000_000  # written at a time

Row = tuple[str, str, str]  # id, name and feature type


def matrix_rows(names: LayoutFeatures) -> list[Row]:
    """One row of the matrix for each feature of a layout."""
    return [(f.id, f.name, f.feature_type) for f in names.features]


def protein_rows() -> list[Row]:
    """Rows of protein expression; they follow those of the features."""
    return [(name, name, PROTEIN_TYPE) for name in PROTEINS]


def protein_matrix(
    names: LayoutFeatures, matrix: sparse.csr_matrix, prefix: npt.NDArray[np.uint32]
) -> sparse.csr_matrix:
    """(n, n_proteins) intensities × PROTEIN_SCALING_FACTOR, drawn from the cells' ids.

    A protein follows the counts of the gene of its name, over a background that every cell has.
    """
    rng = np.random.default_rng(np.random.SeedSequence(prefix.tolist()))
    column = {f.name: i for i, f in enumerate(names.features) if f.feature_type == GENE_TYPE}
    drawn = []
    for protein in PROTEINS:
        counts = np.zeros(len(prefix))
        if protein in column:
            counts = matrix[:, [column[protein]]].toarray()[:, 0]
        noise = np.exp(0.4 * rng.standard_normal(len(prefix)))
        drawn.append(np.rint((2 + 6 * counts) * noise * PROTEIN_SCALING_FACTOR))
    return sparse.csr_matrix(np.stack(drawn, axis=1).astype(np.int32))


def write_matrix(
    folder: Path, rows: list[Row], barcodes: npt.NDArray[np.str_], matrix: sparse.csr_matrix
) -> None:
    """`cell_feature_matrix.h5` and the folder `cell_feature_matrix/`; `matrix` is (n, rows)."""
    _write_h5(folder / "cell_feature_matrix.h5", rows, barcodes, matrix)
    (folder / "cell_feature_matrix").mkdir()
    _write_matrix_market(folder / "cell_feature_matrix", rows, barcodes, matrix)


def _write_h5(
    path: Path, rows: list[Row], barcodes: npt.NDArray[np.str_], by_cell: sparse.csr_matrix
) -> None:
    # Cells × features by rows is features × cells by columns, which is what the file holds.
    arrays = {
        "barcodes": barcodes.astype("S"),
        "data": by_cell.data.astype("<i4"),
        "indices": by_cell.indices.astype("<i8"),
        "indptr": by_cell.indptr.astype("<i8"),
        "shape": np.array(by_cell.shape[::-1], "<i4"),
        "features/id": np.array([id_ for id_, _, _ in rows], "S"),
        "features/name": np.array([name for _, name, _ in rows], "S"),
        "features/feature_type": np.array([kind for _, _, kind in rows], "S"),
        "features/genome": np.full(len(rows), b"Unknown"),
    }
    with h5py.File(path, "w") as file:
        file.attrs["filetype"] = "matrix"
        file.attrs["version"] = 2
        file.attrs["library_ids"] = np.array([b"0000000_0000000"])
        file.attrs["original_gem_groups"] = np.array([1])
        if any(kind == PROTEIN_TYPE for _, _, kind in rows):
            file.attrs["protein_scaling_factor"] = PROTEIN_SCALING_FACTOR
        for name, array in arrays.items():
            # HDF5 has no chunks of nothing: a section may be without a single count.
            packed = {"chunks": True, "compression": "gzip"} if len(array) else {}
            file.create_dataset(f"matrix/{name}", data=array, **packed)
        file.create_dataset("matrix/features/_all_tag_keys", data=np.array([b"genome"]))


def _write_matrix_market(
    folder: Path, rows: list[Row], barcodes: npt.NDArray[np.str_], by_cell: sparse.csr_matrix
) -> None:
    with gzipped(folder / "features.tsv.gz") as file:
        file.writelines(("\t".join(row) + "\n").encode() for row in rows)
    with gzipped(folder / "barcodes.tsv.gz") as file:
        file.writelines(f"{barcode}\n".encode() for barcode in barcodes)
    n_cells, n_features = by_cell.shape
    cell = np.repeat(np.arange(1, n_cells + 1), np.diff(by_cell.indptr))
    schema = pa.schema({"feature": pa.int64(), "cell": pa.int64(), "count": pa.int64()})
    options = pa_csv.WriteOptions(include_header=False, delimiter=" ")
    with gzipped(folder / "matrix.mtx.gz") as file:
        file.write(b"%%MatrixMarket matrix coordinate integer general\n%\n")
        file.write(f"{n_features} {n_cells} {by_cell.nnz}\n".encode())
        with pa_csv.CSVWriter(file, schema, write_options=options) as writer:
            for first in range(0, by_cell.nnz, _MTX_ENTRIES):
                part = slice(first, first + _MTX_ENTRIES)
                entries = (by_cell.indices[part] + 1, cell[part], by_cell.data[part])
                columns = [pa.array(e.astype(np.int64)) for e in entries]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
