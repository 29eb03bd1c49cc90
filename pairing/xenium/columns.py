"""Columns of a bundle's tables: Parquet or csv.gz, text in whatever type a release wrote it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pairing.xenium.files import BundleFiles, parsed
from shards.errors import BadInput

# Of a transcript or a nucleus outside cells: text since XOA 1.3, a number before.
NO_CELL = ("UNASSIGNED", "-1")

# Of Parquet as much as is decoded at a time is also read at a time, of row groups of any size.
_READ_BYTES = 1 << 20

_TEXT = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,  # XOA before 1.5 wrote text as bytes
    pa.types.is_large_binary,
    pa.types.is_integer,  # identifiers of XOA 1.0
)


def find_table(files: BundleFiles, stem: str) -> str | None:
    """Name of the table: the Parquet file, else its csv.gz copy, which XOA wrote until 2.0."""
    for name in (f"{stem}.parquet", f"{stem}.csv.gz"):
        if name in files.names:
            return name
    return None


def is_csv(path: Path) -> bool:
    return path.name.endswith(".csv.gz")


def column_names(path: Path) -> list[str]:
    """Names of the columns of a Parquet or csv.gz table."""
    with parsed(path):
        if is_csv(path):
            with pa_csv.open_csv(path) as reader:
                names: list[str] = reader.schema.names
            return names
        return list(pq.read_schema(path).names)


def csv_options(types: Mapping[str, pa.DataType], columns: Sequence[str]) -> pa_csv.ConvertOptions:
    """`columns` in their `types`; nothing but an empty number is taken for missing."""
    return pa_csv.ConvertOptions(
        column_types=dict(types),
        include_columns=list(columns),
        null_values=["", "NaN", "nan"],
        strings_can_be_null=False,
    )


def read_table(path: Path, texts: Sequence[str], numbers: Sequence[str]) -> pa.Table:
    """The named columns of a whole table; texts are dictionaries or plain, see `encoded`.

    Raises BadInput where one is missing.
    """
    wanted = _require(path, texts, numbers)
    with parsed(path):
        if is_csv(path):
            types = dict.fromkeys(texts, pa.string()) | dict.fromkeys(numbers, pa.float64())
            return pa_csv.read_csv(path, convert_options=csv_options(types, wanted))
        # As dictionaries: each of a million cells is named in 25 rows of its outline.
        return pq.read_table(path, columns=wanted, read_dictionary=list(texts))


def read_rows(
    path: Path, texts: Sequence[str], numbers: Sequence[str], n_rows: int
) -> Iterator[pa.Table]:
    """As `read_table`, so many rows at a time; a csv all at once."""
    if is_csv(path):
        yield read_table(path, texts, numbers)
        return
    for batch in parquet_batches(path, _require(path, texts, numbers), texts, n_rows):
        yield pa.Table.from_batches([batch])


def parquet_batches(
    path: Path,
    columns: list[str],
    texts: Sequence[str],
    n_rows: int,
    row_groups: Sequence[int] | None = None,
) -> Iterator[pa.RecordBatch]:
    """These columns, so many rows at a time, on one thread; `texts` as dictionaries."""
    # Not buffered ahead: that would hold a whole row group, which may be the whole file.
    with (
        parsed(path),
        pq.ParquetFile(
            path, read_dictionary=list(texts), pre_buffer=False, buffer_size=_READ_BYTES
        ) as file,
    ):
        yield from file.iter_batches(
            batch_size=n_rows,
            row_groups=None if row_groups is None else list(row_groups),
            columns=columns,
            use_threads=False,
        )


def _require(path: Path, texts: Sequence[str], numbers: Sequence[str]) -> list[str]:
    wanted = [*texts, *numbers]
    missing = set(wanted) - set(column_names(path))
    if missing:
        raise BadInput(
            path,
            expected=f"the columns {', '.join(wanted)}",
            found=f"none called {', '.join(sorted(missing))}",
            remedy="copy the table again, or export the run again with a current Xenium Ranger",
        )
    return wanted


def is_text(kind: pa.DataType) -> bool:
    """Whether `encoded` makes text of a column of this type."""
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(accepts(value) for accepts in _TEXT)


def encoded(
    path: Path, name: str, column: pa.Array | pa.ChunkedArray
) -> tuple[pa.StringArray, npt.NDArray[np.integer[Any]]]:
    """Distinct values of a text column, and for each row which one it is.

    Bytes are UTF-8, whole numbers become their decimal text. Raises BadInput on other types and
    on empty rows.
    """
    if not is_text(column.type):
        raise BadInput(
            f"{path}, column {name}",
            expected="text, bytes or whole numbers",
            found=str(column.type),
            remedy="copy the table again, or export the run again with a current Xenium Ranger",
        )
    _refuse_nulls(path, name, column)
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if not isinstance(column, pa.DictionaryArray):
        column = column.dictionary_encode()
    with parsed(path):
        values, codes = column.dictionary, column.indices.to_numpy()
        values.validate(full=True)
        # Damaged pages may hold codes of no value.
        if len(codes) and not (codes.min() >= 0 and codes.max() < len(values)):
            raise ValueError(f"codes from {codes.min()} to {codes.max()} of {len(values)} values")
        return values.cast(pa.string()), codes


def text_of(path: Path, name: str, table: pa.Table) -> npt.NDArray[np.object_]:
    """A text column as strings; see `encoded`."""
    values, codes = encoded(path, name, table.column(name))
    text: npt.NDArray[np.object_] = values.to_numpy(zero_copy_only=False)[codes]
    return text


def floats_of(path: Path, name: str, table: pa.Table) -> npt.NDArray[np.float64]:
    """A column of numbers, NaN where it is empty; BadInput where it holds something else."""
    with parsed(path):
        numbers: npt.NDArray[np.float64] = table.column(name).cast(pa.float64()).to_numpy()
    return numbers


def numbers_of(
    path: Path, name: str, batch: pa.RecordBatch, dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """A column of numbers or booleans as `dtype`; BadInput on empty rows."""
    column = batch.column(name)
    _refuse_nulls(path, name, column)
    # Booleans are bit-packed in Arrow and have to be copied.
    values: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values.astype(dtype, copy=False)


def _refuse_nulls(path: Path, name: str, column: pa.Array | pa.ChunkedArray) -> None:
    if column.null_count:
        raise BadInput(
            f"{path}, column {name}",
            expected="a value in every row",
            found=f"{column.null_count} empty rows",
            remedy="export the bundle again",
        )


def refuse_not_finite(path: Path, name: str, values: npt.NDArray[Any], first_row: int) -> None:
    """BadInput where a value is NaN or infinite; `first_row` is the row of the first value."""
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise BadInput(
            f"{path}, column {name}",
            expected="a finite number in every row",
            found=f"{values[bad[0]]} in row {first_row + bad[0]} and in {len(bad) - 1} later rows",
            remedy="copy the table again, or export the run again",
        )
