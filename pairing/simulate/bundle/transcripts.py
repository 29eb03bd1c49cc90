"""Writes the transcripts, field of view by field of view, and tallies them for the manifest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pairing.simulate.bundle.cells import (
    ROW_GROUP,
    cell_id_column,
    gzipped,
    in_layout,
    parquet_schema,
)
from pairing.simulate.bundle.layouts import TRAITS, LayoutFeatures
from pairing.simulate.params import Layout
from pairing.simulate.section import I64, Section, Transcripts

QV_MIN = 20.0
_NO_CELL = {True: pa.array([-1], pa.int32()), False: pa.array(["UNASSIGNED"])}
_FIRST_FOV = 65536  # upper half of transcript_id in the first field of view


@dataclass(slots=True)
class Tally:
    """What the manifest tells of the transcripts, `genes` of good quality alone."""

    good_of_feature: I64  # transcripts of good quality, in the order of the matrix
    n: int = 0
    n_good: int = 0
    genes: int = 0
    genes_in_cells: int = 0
    genes_in_nuclei: int = 0
    z_sums: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))

    def add(self, t: Transcripts, is_gene: npt.NDArray[np.bool_]) -> None:
        good = t.qv >= QV_MIN
        gene = good & is_gene[t.feature]
        self.n += len(t.feature)
        self.n_good += int(good.sum())
        self.genes += int(gene.sum())
        self.genes_in_cells += int((t.cell[gene] >= 0).sum())
        self.genes_in_nuclei += int(t.in_nucleus[gene].sum())
        self.good_of_feature += np.bincount(t.feature[good], minlength=len(is_gene))
        self.z_sums += [t.z_um[gene].sum(), (t.z_um[gene] ** 2).sum()]

    @property
    def z_deviation_um(self) -> float:
        mean, square = self.z_sums / max(self.genes, 1)
        return float(np.sqrt(max(square - mean**2, 0.0)))


def write_transcripts(
    folder: Path, section: Section, names: LayoutFeatures, layout: Layout
) -> Tally:
    """`transcripts.parquet`, and `transcripts.csv.gz` where the layout has it, block by block.

    Transcripts of features that the layout does not have are left out.
    """
    no_cell = _NO_CELL[TRAITS[layout].numbered_cells]
    ids = pa.concat_arrays([cell_id_column(section, layout), no_cell])
    tally = Tally(np.zeros(len(names.features), np.int64))
    with ExitStack() as stack:
        schema = in_layout(_SCHEMA.empty_table(), layout).schema
        schema = schema.set(schema.get_field_index("cell_id"), pa.field("cell_id", ids.type))
        stored = parquet_schema(schema, layout)
        parquet = stack.enter_context(
            pq.ParquetWriter(folder / "transcripts.parquet", stored, compression="zstd")
        )
        csv: list[pa_csv.CSVWriter] = []
        if TRAITS[layout].csv_copies:
            file = stack.enter_context(gzipped(folder / "transcripts.csv.gz"))
            csv.append(stack.enter_context(pa_csv.CSVWriter(file, schema)))
        for fov, t in enumerate(_of_layout(section, names)):
            tally.add(t, names.is_gene)
            if not len(t.feature):
                continue  # an empty row group is no reader's business
            table = in_layout(_table(t, fov, section.n_fov_columns, names, ids), layout)
            parquet.write_table(table.cast(stored), row_group_size=ROW_GROUP)
            for writer in csv:
                writer.write_table(table)
    return tally


_SCHEMA = pa.schema(
    {
        "transcript_id": pa.uint64(),
        "cell_id": pa.string(),
        "overlaps_nucleus": pa.uint8(),
        "feature_name": pa.string(),
        "x_location": pa.float32(),
        "y_location": pa.float32(),
        "z_location": pa.float32(),
        "qv": pa.float32(),
        "fov_name": pa.string(),
        "nucleus_distance": pa.float32(),
        "codeword_index": pa.int32(),
        "codeword_category": pa.string(),
        "is_gene": pa.bool_(),
    }
)


def _of_layout(section: Section, names: LayoutFeatures) -> Iterator[Transcripts]:
    """The blocks with features numbered as in the layout."""
    row_of = names.row_of(len(section.features))
    for t in section.transcripts():
        kept = row_of[t.feature] >= 0
        columns = {name: getattr(t, name)[kept] for name in Transcripts.__slots__}
        columns["feature"] = row_of[columns["feature"]]
        yield Transcripts(**columns)


def _table(
    t: Transcripts, fov: int, n_fov_columns: int, names: LayoutFeatures, ids: pa.Array
) -> pa.Table:
    n = len(t.feature)
    first = np.uint64(_FIRST_FOV + fov) << np.uint64(32)
    fov_name = f"{_letters(fov // n_fov_columns)}{fov % n_fov_columns + 1}"
    feature = pa.array(t.feature)
    return pa.table(
        {
            "transcript_id": first + np.arange(n, dtype=np.uint64),
            "cell_id": ids.take(pa.array(np.where(t.cell < 0, len(ids) - 1, t.cell))),
            "overlaps_nucleus": t.in_nucleus.astype(np.uint8),
            "feature_name": pa.array(f.name for f in names.features).take(feature),
            "x_location": t.x_um.astype(np.float32),
            "y_location": t.y_um.astype(np.float32),
            "z_location": t.z_um.astype(np.float32),
            "qv": t.qv.astype(np.float32),
            "fov_name": pa.repeat(fov_name, n),
            "nucleus_distance": t.nucleus_distance_um.astype(np.float32),
            "codeword_index": t.codeword.astype(np.int32),
            "codeword_category": pa.array(names.category).take(feature),
            "is_gene": pc.take(pa.array(names.is_gene), feature),
        }
    )


def _letters(row: int) -> str:
    """A … Z, then AA …: the row of a field of view."""
    return (_letters(row // 26 - 1) if row >= 26 else "") + chr(ord("A") + row % 26)
