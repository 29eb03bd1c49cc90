"""A dataset as AnnData on disk, one file a species, written shard by shard.

anndata's own writer lays out every element from the first shard; later shards are appended to the
arrays that it made, so that files are read as any other and memory is that of one shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem
from scipy import sparse

from flows.built import cellpair_version
from flows.export.cells_table import Columns, neighbor_graph
from flows.export.genes import JoinedGenes
from flows.export.source import Part, Progress, Source

# Of numbers, 256 KiB: larger chunks fall out of the cache of HDF5 between two shards.
_CHUNK: Final = 1 << 15
_PACKED: Final[Mapping[str, Any]] = MappingProxyType(
    {"compression": "gzip", "compression_opts": 1, "shuffle": True}
)
_FLAT: Final = {"maxshape": (None,), "chunks": (_CHUNK,), **_PACKED}
_POINTS: Final = {"maxshape": (None, 2), "chunks": (_CHUNK, 2), **_PACKED}
# A sparse matrix is made to grow by anndata itself.
_SPARSE: Final = {"chunks": (_CHUNK,), **_PACKED}

# Names that squidpy knows.
DISTANCES, CONNECTIVITIES = "spatial_distances", "spatial_connectivities"
_GRAPHS = {
    "connectivities_key": CONNECTIVITIES,
    "distances_key": DISTANCES,
}


def write_h5ad(path: Path, source: Source, species: str) -> tuple[int, int, int]:
    """Write the samples of one species; returns samples, genes, and genes that some panel lacks.

    `X` holds raw counts over the union of the panels; `varm["measured"]` says which panel has which
    gene. Rows are run by run, in the order of the shards. Neighbours that are no rows are left out
    of the graphs.
    """
    parts = [part for part in source.parts if part.manifest.species == species]
    panel_ids = dict.fromkeys(part.manifest.panel_id for part in parts)
    genes = JoinedGenes.of([source.panels[panel_id] for panel_id in panel_ids])
    columns = Columns.of(source, parts)
    n_rows = sum(part.shard.n_samples for part in parts)
    n_entries = {
        "X": sum(part.most_counts() for part in parts),
        "obsp": sum(part.most_neighbors() for part in parts),
    }
    with h5py.File(path, "w") as file, Progress(parts, path.name) as progress:
        file.attrs["encoding-type"], file.attrs["encoding-version"] = "anndata", "0.1.0"
        write_elem(file, "var", genes.var())
        write_elem(file, "varm", {"measured": genes.measured().set_axis(genes.var().index)})
        write_elem(file, "uns", {"cellpair": facts(source, parts), "spatial_neighbors": _GRAPHS})
        for empty in ("layers", "varp"):
            write_elem(file, empty, {})
        rows: _Rows | None = None
        run, row_of_cell, first = "", pd.Index([]), 0
        for part in parts:
            if part.manifest.run != run:  # neighbours are of the same run, whose rows are together
                run = part.manifest.run
                first = 0 if rows is None else rows.n
                row_of_cell = _cells_of_run(parts, run)
            chunk = _Chunk.of(source, part, columns, genes, row_of_cell, first, n_rows)
            if rows is None:
                rows = _Rows(file, chunk, n_entries)
            else:
                rows.append(chunk)
            progress.add(part.shard.n_samples)
    return n_rows, len(genes.genes), int((~genes.measured().all(axis=1)).sum())


def facts(source: Source, parts: Sequence[Part]) -> dict[str, Any]:
    """`uns["cellpair"]`: of which dataset these samples are, and what each run's patches show."""
    return {
        "version": cellpair_version(),
        "dataset": source.dataset.name,
        "fingerprint": source.dataset.fingerprint,
        "patch": {p.manifest.run: p.manifest.patch.model_dump() for p in parts},
    }


def joined_counts(part: Part, source: Source, genes: JoinedGenes) -> sparse.csr_matrix:
    """(samples, genes) int32 CSR of a part over the joined genes."""
    panel = source.panels[part.manifest.panel_id]
    counts = part.read_counts(len(panel.genes))
    place = genes.places[panel.panel_id].astype(np.int32)
    joined = sparse.csr_matrix(
        (counts.data, place[counts.indices], counts.indptr),
        shape=(counts.shape[0], len(genes.genes)),
    )
    joined.sort_indices()
    return joined


def index_type(most: int) -> type[np.int32 | np.int64]:
    """The type of columns and pointers of a sparse matrix of so many entries at most.

    scipy wants one for both, so it is chosen before the first row is written.
    """
    return np.int32 if most <= np.iinfo(np.int32).max else np.int64


def _cells_of_run(parts: Sequence[Part], run: str) -> pd.Index:
    of_run = [part for part in parts if part.manifest.run == run]
    return pd.Index(
        np.concatenate([part.read_table(["cell_id"])["cell_id"].to_numpy() for part in of_run])
    )


class _Chunk:
    """What one part adds to a file."""

    def __init__(
        self, obs: pd.DataFrame, counts: sparse.csr_matrix, distances_um: sparse.csr_matrix
    ) -> None:
        self.obs = obs
        connected = distances_um.copy()
        connected.data = np.ones_like(connected.data)
        self.sparse = {
            "X": counts,
            f"obsp/{DISTANCES}": distances_um,
            f"obsp/{CONNECTIVITIES}": connected,
        }
        self.points = {
            "spatial": obs[["x_um", "y_um"]].to_numpy(),
            "spatial_px": obs[["x_px", "y_px"]].to_numpy(),
        }

    @classmethod
    def of(
        cls,
        source: Source,
        part: Part,
        columns: Columns,
        genes: JoinedGenes,
        row_of_cell: pd.Index,
        first: int,
        n_rows: int,
    ) -> _Chunk:
        distances_um = neighbor_graph(part, row_of_cell, n_rows)
        distances_um.indices = distances_um.indices + first
        return cls(columns.obs(source, part), joined_counts(part, source, genes), distances_um)


class _Rows:
    """The elements of a file that grow with its rows; `n` of them are there.

    `n_entries` is what the sparse matrices of X and of obsp will hold at most.
    """

    def __init__(self, file: h5py.File, chunk: _Chunk, n_entries: Mapping[str, int]) -> None:
        self._file = file
        self.n = len(chunk.obs)
        write_elem(file, "obs", chunk.obs, dataset_kwargs=_FLAT)
        write_elem(file, "obsm", chunk.points, dataset_kwargs=_POINTS)
        write_elem(file, "obsp", {})
        for name, matrix in chunk.sparse.items():
            dtype = index_type(n_entries[name.partition("/")[0]])
            matrix.indices = matrix.indices.astype(dtype)
            matrix.indptr = matrix.indptr.astype(dtype)
            write_elem(file, name, matrix, dataset_kwargs=_SPARSE)

    def append(self, chunk: _Chunk) -> None:
        obs = self._file["obs"]
        _extend(obs["_index"], chunk.obs.index.to_numpy())
        for name, column in chunk.obs.items():
            values = column.array
            if isinstance(values, pd.Categorical):
                _extend(obs[name]["codes"], values.codes)
            elif isinstance(values, pd.arrays.IntegerArray):
                _extend(obs[name]["values"], values.to_numpy(np.int64, na_value=0))
                _extend(obs[name]["mask"], values.isna())
            else:
                _extend(obs[name], column.to_numpy())
        for name, points in chunk.points.items():
            _extend(self._file["obsm"][name], points)
        self.n += len(chunk.obs)
        for name, matrix in chunk.sparse.items():
            group = self._file[name]
            before = len(group["data"])
            _extend(group["data"], matrix.data)
            _extend(group["indices"], matrix.indices)
            _extend(group["indptr"], matrix.indptr[1:].astype(np.int64) + before)
            group.attrs["shape"] = (self.n, matrix.shape[1])


def _extend(array: h5py.Dataset, values: Any) -> None:
    n = len(array)
    array.resize(n + len(values), axis=0)
    array[n:] = values
