"""Cells and outlines as tables: `cells` and both `_boundaries`, with their ids."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from scipy import sparse

from pairing.simulate.bundle.layouts import TRAITS, LayoutFeatures, columns_of
from pairing.simulate.params import Layout
from pairing.simulate.polygons import taken, thinned
from pairing.simulate.section import F64, I64, Rings, Section

METHODS = ("Segmented by nucleus expansion of 5.0µm", "Segmented by interior stain (18S)")
ROW_GROUP = 100_000
_GZIP_LEVEL = 1  # a csv of 40 million transcripts takes minutes at the usual 9


def cell_id_strings(prefix: npt.NDArray[np.uint32], layout: Layout) -> npt.NDArray[np.str_]:
    """Ids of cells as text: 10x's code of eight nibbles as letters a to p, then the suffix `-1`.

    XOA 1.0 numbers its cells from 1 and its barcodes are those numbers.
    """
    if TRAITS[layout].numbered_cells:
        return np.arange(1, len(prefix) + 1).astype(np.str_)
    nibbles = (prefix[:, None] >> np.arange(28, -1, -4, dtype=np.uint32)) & 15
    letters = (nibbles + ord("a")).astype(np.uint8)
    text = np.ascontiguousarray(letters).view("S8")[:, 0].astype("U8")
    return np.char.add(text, "-1")


def cell_id_column(section: Section, layout: Layout) -> pa.Array:
    """Ids as in the tables, in file order: text, or int32 in XOA 1.0."""
    if TRAITS[layout].numbered_cells:
        return pa.array(np.arange(1, len(section.prefix) + 1, dtype=np.int32))
    return pa.array(cell_id_strings(section.prefix, layout))


def cells_table(
    section: Section, names: LayoutFeatures, matrix: sparse.csr_matrix, layout: Layout
) -> pa.Table:
    """All columns that a layout may have, one row a cell; `matrix` (n, len(names.features))."""

    def counts(*categories: str) -> I64:
        columns = np.flatnonzero(np.isin(names.category, categories))
        return np.asarray(matrix[:, columns].sum(axis=1)).ravel().astype(np.int64)

    n = len(section.prefix)
    n_nuclei = np.bincount(section.cell_of_nucleus, minlength=n)
    nucleus_um2 = np.bincount(section.cell_of_nucleus, weights=section.nuclei.area_um2, minlength=n)
    return pa.table(
        {
            "cell_id": cell_id_column(section, layout),
            "x_centroid": section.cells.x_um,
            "y_centroid": section.cells.y_um,
            "transcript_counts": counts("predesigned_gene", "custom_gene"),
            "control_probe_counts": counts("negative_control_probe"),
            "genomic_control_counts": counts("genomic_control_probe"),
            "control_codeword_counts": counts("negative_control_codeword"),
            "unassigned_codeword_counts": counts("unassigned_codeword"),
            "deprecated_codeword_counts": counts("deprecated_codeword"),
            "total_counts": np.asarray(matrix.sum(axis=1)).ravel().astype(np.int64),
            "cell_area": section.cells.area_um2,
            "nucleus_area": np.where(n_nuclei > 0, nucleus_um2, np.nan),
            "nucleus_count": n_nuclei.astype(np.int64),
            "segmentation_method": np.array(METHODS)[(n_nuclei == 0).astype(int)],
        }
    )


def nuclei_of_layout(section: Section, layout: Layout) -> tuple[Rings, I64]:
    """Outlines of nuclei as a layout tells them, and the row of each one's cell.

    Before XOA 2.0 a cell was an expanded nucleus and had one: of several, the largest stands for
    all.
    """
    owner = section.cell_of_nucleus
    rows = np.arange(len(owner))
    if not TRAITS[layout].own_nuclei:
        largest_first = np.lexsort((-section.nuclei.area_um2, owner))
        _, first = np.unique(owner[largest_first], return_index=True)
        rows = largest_first[first]
    rings = thinned(taken(section.nucleus_rings, rows), TRAITS[layout].max_vertices)
    return rings, owner[rows]


def boundaries_table(rings: Rings, ids: pa.Array) -> pa.Table:
    """One row a vertex; `ids` of the owner of each ring, and its number as its label."""
    size = np.diff(rings.start)
    ring = np.repeat(np.arange(len(size)), size)
    vertices = rings.vertices_um.astype(np.float32)
    return pa.table(
        {
            "cell_id": ids.take(pa.array(ring)),
            "vertex_x": vertices[:, 0],
            "vertex_y": vertices[:, 1],
            "label_id": ring + 1,
        }
    )


def nucleus_centroids_um(section: Section) -> tuple[F64, F64]:
    """(x, y) of the mean pixel of all nuclei of a cell; 0 where it has none."""
    n, owner, area = len(section.prefix), section.cell_of_nucleus, section.nuclei.area_um2
    total = np.bincount(owner, weights=area, minlength=n)
    weight = np.divide(1, total, out=np.zeros(n), where=total > 0)
    x, y = np.zeros(n), np.zeros(n)
    np.add.at(x, owner, area * section.nuclei.x_um * weight[owner])
    np.add.at(y, owner, area * section.nuclei.y_um * weight[owner])
    return x, y


def in_layout(table: pa.Table, layout: Layout) -> pa.Table:
    """The columns that a layout has, text as text."""
    return table.select(columns_of(table.column_names, layout))


def parquet_schema(schema: pa.Schema, layout: Layout) -> pa.Schema:
    """The same columns with text as the layout stores it in Parquet."""
    return pa.schema(
        [f.with_type(TRAITS[layout].text) if pa.types.is_string(f.type) else f for f in schema]
    )


def write_table(table: pa.Table, folder: Path, stem: str, layout: Layout) -> None:
    """`stem`.parquet, and `stem`.csv.gz beside it where the layout has copies."""
    table = in_layout(table, layout)
    cast = table.cast(parquet_schema(table.schema, layout))
    pq.write_table(cast, folder / f"{stem}.parquet", compression="zstd", row_group_size=ROW_GROUP)
    if TRAITS[layout].csv_copies:
        with gzipped(folder / f"{stem}.csv.gz") as file:
            pa_csv.write_csv(table, file)


@contextmanager
def gzipped(path: Path) -> Iterator[gzip.GzipFile]:
    """A gzip file to write to that holds neither its name nor the time."""
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", _GZIP_LEVEL, raw, mtime=0) as zipped,
    ):
        yield zipped
