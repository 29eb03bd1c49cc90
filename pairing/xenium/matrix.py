"""The instrument's own counts: `cell_feature_matrix.h5`, or the same as Matrix Market files."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import io, sparse

from pairing.xenium.files import BundleFiles, parsed
from shards.errors import BadInput

H5 = "cell_feature_matrix.h5"
_FEATURES, _BARCODES, _ENTRIES = (
    f"cell_feature_matrix/{name}"
    for name in ("features.tsv.gz", "barcodes.tsv.gz", "matrix.mtx.gz")
)

_ALL = slice(None)


def matrix_name(files: BundleFiles) -> str | None:
    """Name of the file that the counts are read from; None where the bundle has no matrix."""
    if H5 in files.names:
        return H5
    return _ENTRIES if {_FEATURES, _BARCODES, _ENTRIES} <= files.names else None


def read_features(files: BundleFiles) -> pd.DataFrame:
    """name, id and feature_type of every row of the matrix, in its order."""
    if H5 in files.names:
        path = files.path(H5)
        with parsed(path), h5py.File(path) as file:
            group = file["matrix/features"]
            return pd.DataFrame({k: group[k].asstr()[:] for k in ("name", "id", "feature_type")})
    path = files.path(_FEATURES)
    # Of a gene called NA and one in quotes nothing may be lost.
    rows = [row[:3] for row in _read_tsv(path)]
    if any(len(row) < 3 for row in rows):
        raise BadInput(
            path,
            expected="id, name and feature type in every row",
            found=f"{min(len(row) for row in rows)} columns",
            remedy="copy the file again",
        )
    return pd.DataFrame(rows, columns=["id", "name", "feature_type"], dtype=object)


def read_barcodes(files: BundleFiles) -> npt.NDArray[np.object_]:
    """The cell of every column of the matrix, in its order."""
    if H5 in files.names:
        path = files.path(H5)
        with parsed(path), h5py.File(path) as file:
            barcodes: npt.NDArray[np.object_] = file["matrix/barcodes"].asstr()[:]
            return barcodes
    return np.array([row[0] for row in _read_tsv(files.path(_BARCODES))], object)


def read_matrix(files: BundleFiles, cells: slice = _ALL) -> sparse.csr_matrix:
    """(cells, features) counts, int64: of all cells, or of consecutive ones of an H5 file.

    Both files hold (features, cells). Protein rows are intensities, scaled to whole numbers.
    """
    if H5 in files.names:
        path = files.path(H5)
        with parsed(path), h5py.File(path) as file:
            group = file["matrix"]
            n_features, n_cells = group["shape"][:].tolist()
            first, end, _ = cells.indices(n_cells)
            # CSC of the transpose is CSR of what is asked for.
            indptr = group["indptr"][first : end + 1]
            entries = slice(int(indptr[0]), int(indptr[-1]))
            parts = (group["data"][entries], group["indices"][entries], indptr - indptr[0])
            matrix = sparse.csr_matrix(parts, shape=(end - first, n_features), dtype=np.int64)
            expected = len(group["barcodes"]), len(group["features/name"])
    else:
        path = files.path(_ENTRIES)
        with parsed(path):
            matrix = sparse.csr_matrix(io.mmread(path).T, dtype=np.int64)
        n_cells = matrix.shape[0]
        expected = len(read_barcodes(files)), len(read_features(files))
    if (n_cells, matrix.shape[1]) != expected:
        raise BadInput(
            path,
            expected=f"counts of {expected[1]} features in {expected[0]} cells",
            found=f"{matrix.shape[1]} features in {n_cells} cells",
            remedy="take all files of the matrix from one run of the analysis software",
        )
    return matrix


def _read_tsv(path: Path) -> list[list[str]]:
    with parsed(path), gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
