"""Stream transcripts from Parquet or csv.gz: span by span, in memory of one batch."""

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
    parquet_batches,
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
from pairing.xenium.id_index import IdIndex
from shards.errors import BadInput
from shards.schema import Gene

_TEXTS = ("cell_id", "feature_name", "codeword_category")
# What tells the gene, or the kind of control, of a transcript. Parquet says whether it is a gene's
# since XOA 3.0, earlier ones by name alone.
FEATURE_COLUMNS = ("feature_name", "codeword_category", "is_gene")
_CSV_BLOCK_BYTES = 16 << 20
# Rows at a time: what is made of them stays in a processor's cache.
BATCH_ROWS = 1 << 18
# What one worker reads at a time is some seconds of work.
SPAN_ROWS = 4_000_000


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
class Span:
    """Consecutive row groups of one file, or the whole of a csv: what one worker reads.

    `row_groups` is half-open, None for a csv; `first_row` counts from the file's beginning.
    """

    name: str
    path: Path
    row_groups: tuple[int, int] | None
    first_row: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of a table as they are stored; each column is read when it is asked for.

    Methods raise BadInput where a value is missing, or names what the bundle does not have.
    """

    table: TranscriptTable
    path: Path
    first_row: int
    stored: pa.RecordBatch

    def __len__(self) -> int:
        return len(self.stored)

    def cell_index(self, cells: IdIndex) -> npt.NDArray[np.int32]:
        """The cell that the instrument gave each transcript to; -1 for none."""
        ids, codes = encoded(self.path, "cell_id", self.stored.column("cell_id"))
        of_cell = cells.find(ids)
        no_cell = pc.is_in(ids, value_set=pa.array(NO_CELL)).to_numpy(zero_copy_only=False)
        unknown = (of_cell < 0) & ~no_cell
        if unknown.any() and (lost := np.flatnonzero(unknown[codes])).size:
            _raise_unknown(self.path, "cell", "the bundle's cells", ids[codes[lost[0]]].as_py())
        found: npt.NDArray[np.int32] = of_cell[codes]
        return found

    def genes(self, symbols: pa.StringArray) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Index into `symbols` (-1 where the transcript is no gene's), and category."""
        names, codes = encoded(self.path, "feature_name", self.stored.column("feature_name"))
        category = self.table.category(self.path, self.stored, names, codes)
        of_name = pc.index_in(names, value_set=symbols).fill_null(-1).to_numpy()
        gene_index: npt.NDArray[np.int32] = of_name[codes]
        is_gene = category == GENE
        if (of_name < 0).any() and (lost := np.flatnonzero(is_gene & (gene_index < 0))).size:
            name = names[codes[lost[0]]].as_py()
            _raise_unknown(self.path, "gene", "the bundle's panel", name)
        gene_index[~is_gene] = -1
        return gene_index, category

    def numbers(self, name: str) -> npt.NDArray[np.float32]:
        """A column of finite numbers."""
        values = numbers_of(self.path, name, self.stored, np.float32)
        refuse_not_finite(self.path, name, values, self.first_row)
        return values


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

    def spans(self) -> list[Span]:
        """The table in parts of some SPAN_ROWS, each read apart; a csv can't be parted."""
        spans = []
        for number, path in enumerate(self.paths):
            if is_csv(path):
                spans.append(Span(f"span-{number:05d}-00000", path, None, 0))
                continue
            with parsed(path):
                metadata = pq.read_metadata(path)
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            ends = np.cumsum(sizes)
            first = 0
            while first < len(sizes):
                before = int(ends[first]) - sizes[first]
                last = max(first + 1, int(np.searchsorted(ends, before + SPAN_ROWS, side="right")))
                name = f"span-{number:05d}-{first:05d}"
                spans.append(Span(name, path, (first, last), before))
                first = last
        return spans

    def read(self, span: Span, wanted: Sequence[str], rows: int | None = None) -> Iterator[Rows]:
        """The `wanted` columns of a span, those of them that there are, some rows at a time.

        One thread decodes them: work on many spans at once is the caller's.
        """
        rows = rows or BATCH_ROWS
        present = set(column_names(span.path))
        columns = [c for c in wanted if c in present]
        if span.row_groups is None:
            batches = self._csv_batches(span.path, columns, rows)
        else:
            texts = [column for column in columns if column in _TEXTS]
            groups = range(*span.row_groups)
            batches = parquet_batches(span.path, columns, texts, rows, groups)
        first_row = span.first_row
        for batch in batches:
            yield Rows(self, span.path, first_row, batch)
            first_row += len(batch)

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
        for span in self.spans():
            for part in self.read(span, FEATURE_COLUMNS):
                column = part.stored.column("feature_name")
                names, codes = encoded(part.path, "feature_name", column)
                category = self.category(part.path, part.stored, names, codes)
                used = np.unique(codes[category == GENE])
                seen.update(names.take(pa.array(used)).to_pylist())
        return tuple(Gene(symbol=name) for name in sorted(seen))

    def iter_batches(
        self, cell_ids: Sequence[str], genes: Sequence[Gene], rows: int
    ) -> Iterator[TranscriptBatch]:
        """All transcripts, `rows` at most at a time.

        Raises BadInput where a transcript names a cell or a gene that the bundle doesn't have,
        or has no position.
        """
        cells = IdIndex.of(cell_ids)
        symbols = pa.array([gene.symbol for gene in genes], pa.string())
        wanted = ("cell_id", *FEATURE_COLUMNS, self.x, self.y, "qv", "overlaps_nucleus")
        for span in self.spans():
            for part in self.read(span, wanted, rows):
                gene_index, category = part.genes(symbols)
                overlaps = None
                if "overlaps_nucleus" in part.stored.schema.names:
                    overlaps = numbers_of(part.path, "overlaps_nucleus", part.stored, np.bool_)
                yield TranscriptBatch(
                    cell_index=part.cell_index(cells),
                    gene_index=gene_index,
                    category=category,
                    x_um=part.numbers(self.x),
                    y_um=part.numbers(self.y),
                    qv=part.numbers("qv"),
                    overlaps_nucleus=overlaps,
                )

    def category(
        self, path: Path, batch: pa.RecordBatch, names: pa.Array, codes: npt.NDArray[Any]
    ) -> npt.NDArray[np.uint8]:
        """Category of every row: `is_gene`, then `codeword_category`, then by name."""
        if "codeword_category" in batch.schema.names:
            column = batch.column("codeword_category")
            words, word_codes = encoded(path, "codeword_category", column)
            of_code, codes = _codes(category_of_codeword(w) for w in words.to_pylist()), word_codes
        else:
            of_code = _codes(self.kinds.category(n) for n in names.to_pylist())
        if "is_gene" not in batch.schema.names:
            category: npt.NDArray[np.uint8] = of_code[codes]
            return category
        others = np.flatnonzero(~numbers_of(path, "is_gene", batch, np.bool_))
        category = np.full(len(batch), GENE, np.uint8)
        category[others] = np.where(of_code == GENE, np.uint8(OTHER), of_code)[codes[others]]
        return category


def _codes(values: Iterator[int]) -> npt.NDArray[np.uint8]:
    return np.fromiter(values, np.uint8)


def _raise_unknown(path: Path, kind: str, where: str, name: str) -> None:
    raise BadInput(
        path,
        expected=f"transcripts that name only {kind}s of {where}",
        found=f"{name!r}, which is not one",
        remedy="take all files of the bundle from one and the same run of the analysis software",
    )
