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


def read_matrix(files: BundleFiles) -> tuple[sparse.csr_matrix, npt.NDArray[np.object_]]:
    """(cells, features) counts, int64, and the barcode of every row of it.

    Both files hold (features, cells). Protein rows are intensities, scaled to whole numbers.
    """
    if H5 in files.names:
        path = files.path(H5)
        with parsed(path), h5py.File(path) as file:
            group = file["matrix"]
            # CSC of the transpose is CSR of what is asked for.
            parts = tuple(group[k][:] for k in ("data", "indices", "indptr"))
            shape = tuple(group["shape"][:][::-1])
            barcodes = group["barcodes"].asstr()[:]
            matrix = sparse.csr_matrix(parts, shape=shape, dtype=np.int64)
    else:
        path = files.path(_ENTRIES)
        with parsed(path):
            matrix = sparse.csr_matrix(io.mmread(path).T, dtype=np.int64)
        barcodes = np.array([row[0] for row in _read_tsv(files.path(_BARCODES))], object)
    n_features = len(read_features(files))
    if matrix.shape != (len(barcodes), n_features):
        raise BadInput(
            path,
            expected=f"counts of {n_features} features in {len(barcodes)} cells",
            found=f"{matrix.shape[1]} features in {matrix.shape[0]} cells",
            remedy="take all files of the matrix from one run of the analysis software",
        )
    return matrix, barcodes


def _read_tsv(path: Path) -> list[list[str]]:
    with parsed(path), gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
