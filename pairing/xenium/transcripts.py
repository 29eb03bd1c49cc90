"""Stream transcripts from Parquet or csv.gz, in memory of one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pairing.xenium.columns import (
    NO_CELL,
    column_names,
    csv_options,
    encoded,
    is_csv,
    is_text,
    numbers_of,
    refuse_not_finite,
)
from pairing.xenium.features import (
    CATEGORY_NAMES,
    GENE,
    OTHER,
    FeatureKinds,
    category_of_codeword,
)
from pairing.xenium.files import parsed
from shards.errors import BadInput
from shards.schema import Gene

_TEXTS = ("cell_id", "feature_name", "codeword_category")
# Parquet says whether a transcript is a gene's since XOA 3.0, earlier ones by name alone.
_OPTIONAL = ("overlaps_nucleus", "codeword_category", "is_gene")
_CSV_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class TranscriptBatch:
    """Columns of consecutive transcripts, all of one length, in the instrument's order.

    `cell_index` int32 row of `read_cells` (-1 unassigned); `gene_index` int32 into `genes()` (-1
    where the transcript is no gene's); `category` uint8 into `category_names`; positions float32
    in the Xenium frame; `qv` float32 Phred; `overlaps_nucleus` bool, None where the table does
    not say it (every release of the software does, but nothing here needs it).
    """

    cell_index: npt.NDArray[np.int32]
    gene_index: npt.NDArray[np.int32]
    category: npt.NDArray[np.uint8]
    x_um: npt.NDArray[np.float32]
    y_um: npt.NDArray[np.float32]
    qv: npt.NDArray[np.float32]
    overlaps_nucleus: npt.NDArray[np.bool_] | None
    category_names: tuple[str, ...] = CATEGORY_NAMES


@dataclass(frozen=True, slots=True)
class TranscriptTable:
    """Transcripts in one or more files; `x` and `y` are their position columns.

    Raises BadInput on construction where a column is missing or of a type that isn't read.
    """

    paths: Sequence[Path]
    kinds: FeatureKinds
    x: str = "x_location"
    y: str = "y_location"

    def __post_init__(self) -> None:
        for path in self.paths:
            names = column_names(path)
            types = None
            if not is_csv(path):
                with parsed(path):
                    types = pq.read_schema(path)
            for name, (words, accepted) in self._required().items():
                if name not in names:
                    found = "no such column"
                elif types is not None and not accepted(types.field(name).type):
                    found = str(types.field(name).type)
                else:
                    continue
                raise BadInput(
                    f"{path}, column {name}",
                    expected=words,
                    found=found,
                    remedy="copy the table again, or export the run again with a current Xenium "
                    "Ranger",
                )

    def _required(self) -> dict[str, tuple[str, Any]]:
        text = ("text, bytes or whole numbers", is_text)
        number = ("a floating-point number", pa.types.is_floating)
        return {"cell_id": text, "feature_name": text, self.x: number, self.y: number, "qv": number}

    def _batches(self, path: Path, wanted: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
        present = set(column_names(path))
        columns = [c for c in wanted if c in present]
        return (self._csv_batches if is_csv(path) else _parquet_batches)(path, columns, rows)

    def _csv_batches(self, path: Path, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        types = {
            self.x: pa.float32(),
            self.y: pa.float32(),
            "qv": pa.float32(),
            "overlaps_nucleus": pa.uint8(),
            "is_gene": pa.bool_(),
        } | dict.fromkeys(_TEXTS, pa.dictionary(pa.int32(), pa.string()))
        options = csv_options({name: types[name] for name in columns}, columns)
        blocks = pa_csv.ReadOptions(block_size=_CSV_BLOCK_BYTES)
        with (
            parsed(path),
            pa_csv.open_csv(path, read_options=blocks, convert_options=options) as reader,
        ):
            for block in reader:
                for first in range(0, len(block), rows):
                    yield block.slice(first, rows)

    def genes_seen(self) -> tuple[Gene, ...]:
        """Genes of at least one transcript, by symbol: a panel for runs that name none."""
        seen: set[str] = set()
        columns = ["feature_name", "is_gene", "codeword_category"]
        for path in self.paths:
            for batch in self._batches(path, columns, 1_000_000):
                names, codes = encoded(path, "feature_name", batch.column("feature_name"))
                used = np.unique(codes[self._category(path, batch, names, codes) == GENE])
                seen.update(names.take(pa.array(used)).to_pylist())
        return tuple(Gene(symbol=name) for name in sorted(seen))

    def iter_batches(
        self, cell_ids: Sequence[str], genes: Sequence[Gene], rows: int
    ) -> Iterator[TranscriptBatch]:
        """All transcripts, `rows` at most at a time.

        Raises BadInput where a transcript names a cell or a gene that the bundle doesn't have,
        or has no position.
        """
        cell_set = pa.array(cell_ids, pa.string())
        gene_set = pa.array([gene.symbol for gene in genes], pa.string())
        for path in self.paths:
            first_row = 0
            for batch in self._batches(path, [*self._required(), *_OPTIONAL], rows):
                yield self._told(path, batch, first_row, cell_set, gene_set)
                first_row += len(batch)

    def _told(
        self,
        path: Path,
        batch: pa.RecordBatch,
        first_row: int,
        cell_set: pa.StringArray,
        gene_set: pa.StringArray,
    ) -> TranscriptBatch:
        cells, cell_codes = encoded(path, "cell_id", batch.column("cell_id"))
        names, codes = encoded(path, "feature_name", batch.column("feature_name"))
        category = self._category(path, batch, names, codes)
        of_name = _positions(names, gene_set)
        gene_index = np.where(category == GENE, of_name[codes], np.int32(-1))
        lost = codes[(category == GENE) & (gene_index < 0)]
        if len(lost):
            _raise_unknown(path, "gene", "the bundle's panel", names[int(lost[0])].as_py())
        of_cell = _positions(cells, cell_set)
        for code in np.unique(cell_codes[of_cell[cell_codes] < 0]).tolist():
            if cells[code].as_py() not in NO_CELL:
                _raise_unknown(path, "cell", "the bundle's cells", cells[code].as_py())
        x_um, y_um, qv = (
            numbers_of(path, name, batch, np.float32) for name in (self.x, self.y, "qv")
        )
        for name, values in ((self.x, x_um), (self.y, y_um), ("qv", qv)):
            refuse_not_finite(path, name, values, first_row)
        return TranscriptBatch(
            cell_index=of_cell[cell_codes],
            gene_index=gene_index,
            category=category,
            x_um=x_um,
            y_um=y_um,
            qv=qv,
            overlaps_nucleus=numbers_of(path, "overlaps_nucleus", batch, np.bool_)
            if "overlaps_nucleus" in batch.schema.names
            else None,
        )

    def _category(
        self, path: Path, batch: pa.RecordBatch, names: pa.Array, codes: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.uint8]:
        """Category of every row: `is_gene`, then `codeword_category`, then by name."""
        if "codeword_category" in batch.schema.names:
            column = batch.column("codeword_category")
            words, word_codes = encoded(path, "codeword_category", column)
            category = _codes(category_of_codeword(w) for w in words.to_pylist())[word_codes]
        else:
            category = _codes(self.kinds.category(n) for n in names.to_pylist())[codes]
        if "is_gene" in batch.schema.names:
            is_gene = numbers_of(path, "is_gene", batch, np.bool_)
            control = np.where(category == GENE, np.uint8(OTHER), category)
            category = np.where(is_gene, np.uint8(GENE), control)
        return category


def _parquet_batches(path: Path, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    texts = [c for c in columns if c in _TEXTS]
    with parsed(path), pq.ParquetFile(path, read_dictionary=texts) as file:
        yield from file.iter_batches(batch_size=rows, columns=columns)


def _codes(values: Iterator[int]) -> npt.NDArray[np.uint8]:
    return np.fromiter(values, np.uint8)


def _positions(values: pa.Array, among: pa.Array) -> npt.NDArray[np.int32]:
    found: npt.NDArray[np.int32] = pc.index_in(values, value_set=among).fill_null(-1).to_numpy()
    return found


def _raise_unknown(path: Path, kind: str, where: str, name: str) -> None:
    raise BadInput(
        path,
        expected=f"transcripts that name only {kind}s of {where}",
        found=f"{name!r}, which is not one",
        remedy="take all files of the bundle from one and the same run of the analysis software",
    )
