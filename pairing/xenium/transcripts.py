"""Stream transcripts from Parquet, and tell genes from controls."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pairing.xenium.files import parsed
from shards.errors import BadInput
from shards.schema import Gene

UNASSIGNED = "UNASSIGNED"
_TEXTS = ("cell_id", "feature_name", "codeword_category")

CATEGORY_NAMES = (
    "gene",
    "negative_control_probe",
    "negative_control_codeword",
    "unassigned_codeword",
    "deprecated_codeword",
    "genomic_control",
    "other",
)
_GENE, _OTHER = CATEGORY_NAMES.index("gene"), CATEGORY_NAMES.index("other")
_BY_CODEWORD = {
    "predesigned_gene": "gene",
    "custom_gene": "gene",
    "negative_control_probe": "negative_control_probe",
    "genomic_control_probe": "genomic_control",
    "negative_control_codeword": "negative_control_codeword",
    "unassigned_codeword": "unassigned_codeword",
    "deprecated_codeword": "deprecated_codeword",
}
GENE_TYPE = "Gene Expression"
_BY_FEATURE_TYPE = {
    GENE_TYPE: "gene",
    "Negative Control Probe": "negative_control_probe",
    "Negative Control Codeword": "negative_control_codeword",
    "Unassigned Codeword": "unassigned_codeword",
    "Deprecated Codeword": "deprecated_codeword",
    "Genomic Control": "genomic_control",
}
# The last resort, anchored: a substring would take NEGR1, NANOG, NANS and BLANKET1 for controls.
_BY_PREFIX = (
    (re.compile(r"NegControlProbe_|antisense_"), "negative_control_probe"),
    (re.compile(r"NegControlCodeword_"), "negative_control_codeword"),
    (re.compile(r"UnassignedCodeword_"), "unassigned_codeword"),
    (re.compile(r"DeprecatedCodeword_"), "deprecated_codeword"),
    (re.compile(r"Intergenic_Region_|GenomicControl"), "genomic_control"),
    (re.compile(r"BLANK_"), "other"),
)


@dataclass(frozen=True, slots=True)
class TranscriptBatch:
    """Columns of consecutive transcripts, all of one length, in the instrument's order.

    `cell_index` int32 row of `read_cells` (-1 unassigned); `gene_index` int32 into `genes()` (-1
    where the transcript is no gene's); `category` uint8 into `category_names`; positions float32
    in the Xenium frame; `qv` float32 Phred; `overlaps_nucleus` bool.
    """

    cell_index: npt.NDArray[np.int32]
    gene_index: npt.NDArray[np.int32]
    category: npt.NDArray[np.uint8]
    x_um: npt.NDArray[np.float32]
    y_um: npt.NDArray[np.float32]
    qv: npt.NDArray[np.float32]
    overlaps_nucleus: npt.NDArray[np.bool_]
    category_names: tuple[str, ...] = CATEGORY_NAMES


@dataclass(frozen=True, slots=True)
class FeatureKinds:
    """What the bundle says of a feature by its name, where the transcripts don't say it."""

    feature_types: Mapping[str, str] = field(default_factory=dict)  # of the matrix
    descriptors: Mapping[str, str] = field(default_factory=dict)  # of the gene panel

    def category(self, name: str) -> int:
        """Index into CATEGORY_NAMES: by feature type, then panel descriptor, then prefix."""
        if name in self.feature_types:
            return CATEGORY_NAMES.index(_BY_FEATURE_TYPE.get(self.feature_types[name], "other"))
        if self.descriptors.get(name) == "gene":
            return _GENE
        for prefix, category in _BY_PREFIX:
            if prefix.match(name):
                return CATEGORY_NAMES.index(category)
        return _OTHER if name in self.descriptors else _GENE


@dataclass(frozen=True, slots=True)
class TranscriptTable:
    """Transcripts in one or more Parquet files; `x` and `y` are their position columns.

    Raises BadInput on construction where a column is missing or of a type that isn't read.
    """

    paths: Sequence[Path]
    kinds: FeatureKinds
    x: str = "x_location"
    y: str = "y_location"

    def __post_init__(self) -> None:
        for path in self.paths:
            with parsed(path):
                schema = pq.read_schema(path)
            for name, (words, accepted) in self._required().items():
                found = schema.field(name).type if name in schema.names else None
                if found is None or not accepted(_value_type(found)):
                    raise BadInput(
                        f"{path}, column {name}",
                        expected=words,
                        found="no such column" if found is None else f"{found}",
                        remedy="layouts of XOA 2.0 and later are read; export the run again "
                        "with a current Xenium Ranger",
                    )

    def _required(self) -> dict[str, tuple[str, Any]]:
        text = ("text", lambda t: pa.types.is_string(t) or pa.types.is_large_string(t))
        number = ("a floating-point number", pa.types.is_floating)
        flag = ("0 or 1", lambda t: pa.types.is_integer(t) or pa.types.is_boolean(t))
        return {
            "cell_id": text,
            "feature_name": text,
            self.x: number,
            self.y: number,
            "qv": number,
            "overlaps_nucleus": flag,
        }

    def _batches(self, columns: list[str], rows: int) -> Iterator[tuple[Path, pa.RecordBatch]]:
        for path in self.paths:
            present = set(pq.read_schema(path).names)
            wanted = [c for c in columns if c in present]
            encoded = [c for c in _TEXTS if c in present]
            with parsed(path), pq.ParquetFile(path, read_dictionary=encoded) as file:
                for batch in file.iter_batches(batch_size=rows, columns=wanted):
                    yield path, batch

    def genes_seen(self) -> tuple[Gene, ...]:
        """Genes of at least one transcript, by symbol: a panel for runs that name none."""
        seen: set[str] = set()
        columns = ["feature_name", "is_gene", "codeword_category"]
        for path, batch in self._batches(columns, 1_000_000):
            names, codes = _encoded(path, batch, "feature_name")
            used = np.unique(codes[self._category(path, batch, names, codes) == _GENE])
            seen.update(names.take(pa.array(used)).to_pylist())
        return tuple(Gene(symbol=name) for name in sorted(seen))

    def iter_batches(
        self, cell_ids: Sequence[str], genes: Sequence[Gene], rows: int
    ) -> Iterator[TranscriptBatch]:
        """All transcripts, `rows` at most at a time.

        Raises BadInput where a transcript names a cell or a gene that the bundle doesn't have.
        """
        cell_set = pa.array(cell_ids, pa.string())
        gene_set = pa.array([gene.symbol for gene in genes], pa.string())
        columns = [*self._required(), "is_gene", "codeword_category"]
        for path, batch in self._batches(columns, rows):
            cells, cell_codes = _encoded(path, batch, "cell_id")
            names, codes = _encoded(path, batch, "feature_name")
            category = self._category(path, batch, names, codes)
            of_name = _positions(names, gene_set)
            gene_index = np.where(category == _GENE, of_name[codes], np.int32(-1))
            lost = codes[(category == _GENE) & (gene_index < 0)]
            if len(lost):
                _raise_unknown(path, "gene", "the bundle's panel", names[int(lost[0])].as_py())
            of_cell = _positions(cells, cell_set)
            for code in np.unique(cell_codes[of_cell[cell_codes] < 0]).tolist():
                if cells[code].as_py() != UNASSIGNED:
                    _raise_unknown(path, "cell", "the bundle's cells", cells[code].as_py())
            yield TranscriptBatch(
                cell_index=of_cell[cell_codes],
                gene_index=gene_index,
                category=category,
                x_um=_numbers(batch, self.x, np.float32),
                y_um=_numbers(batch, self.y, np.float32),
                qv=_numbers(batch, "qv", np.float32),
                overlaps_nucleus=_numbers(batch, "overlaps_nucleus", np.bool_),
            )

    def _category(
        self, path: Path, batch: pa.RecordBatch, names: pa.Array, codes: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.uint8]:
        """Category of every row: `is_gene`, then `codeword_category`, then by name."""
        if "codeword_category" in batch.schema.names:
            words, word_codes = _encoded(path, batch, "codeword_category")
            known = [_BY_CODEWORD.get(w, "other") for w in words.to_pylist()]
            category = _codes(CATEGORY_NAMES.index(k) for k in known)[word_codes]
        else:
            category = _codes(self.kinds.category(n) for n in names.to_pylist())[codes]
        if "is_gene" in batch.schema.names:
            is_gene = _numbers(batch, "is_gene", np.bool_)
            control = np.where(category == _GENE, np.uint8(_OTHER), category)
            category = np.where(is_gene, np.uint8(_GENE), control)
        return category


def _codes(values: Iterator[int]) -> npt.NDArray[np.uint8]:
    return np.fromiter(values, np.uint8)


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _encoded(
    path: Path, batch: pa.RecordBatch, name: str
) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """Distinct values of a text column as strings, and for each row which one it is."""
    column = batch.column(name)
    if column.null_count:
        raise BadInput(
            f"{path}, column {name}",
            expected="a value in every row",
            found=f"{column.null_count} empty rows",
            remedy="export the bundle again",
        )
    if not isinstance(column, pa.DictionaryArray):
        column = column.dictionary_encode()
    return column.dictionary.cast(pa.string()), column.indices.to_numpy().astype(np.int64)


def _positions(values: pa.Array, among: pa.Array) -> npt.NDArray[np.int32]:
    found: npt.NDArray[np.int32] = pc.index_in(values, value_set=among).fill_null(-1).to_numpy()
    return found


def _numbers(batch: pa.RecordBatch, name: str, dtype: Any) -> npt.NDArray[Any]:
    # Booleans are bit-packed in Arrow and have to be copied.
    values: npt.NDArray[Any] = batch.column(name).to_numpy(zero_copy_only=False)
    return values.astype(dtype)


def _raise_unknown(path: Path, kind: str, where: str, name: str) -> None:
    raise BadInput(
        path,
        expected=f"transcripts that name only {kind}s of {where}",
        found=f"{name!r}, which is not one",
        remedy="take all files of the bundle from one and the same run of the analysis software",
    )
