"""What differs between the layouts of a bundle, stated once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pairing.simulate.panel import Feature
from pairing.simulate.params import Layout

I64 = npt.NDArray[np.int64]

LAYOUTS: tuple[Layout, ...] = get_args(Layout)  # from old to new
GENE_TYPE = "Gene Expression"


@dataclass(frozen=True, slots=True)
class Traits:
    """One layout; what each of its fields stands for in the files is told in docs/formats.md."""

    software: str  # analysis_sw_version of the manifest
    format_version: int  # major_version of the manifest
    text: pa.DataType  # of text in Parquet files
    numbered_cells: bool  # ids 1 … n, and -1 for no cell, instead of text and UNASSIGNED
    csv_copies: bool  # of every Parquet file
    json_panel: bool  # gene_panel.json, else panel.tsv
    max_vertices: int  # of a closed polygon, its first vertex repeated
    own_nuclei: bool  # nuclei have labels of their own, else the label of their cell
    morphology: Literal["single", "numbered", "named"]  # files of the focus image


TRAITS: dict[Layout, Traits] = {
    "xoa-1.0": Traits(
        "Xenium-1.0.1", 3, pa.binary(), True, True, False, 13, False, "single"
    ),
    "xoa-1.3": Traits(
        "xenium-1.3.0.5", 4, pa.binary(), False, True, True, 13, False, "single"
    ),
    "xoa-2.0": Traits(
        "xenium-2.0.0.6-35-ga7e17149a", 5, pa.large_string(), False, True, True, 25, True,
        "numbered",
    ),
    "xoa-3.0": Traits(
        "xenium-3.0.0.15", 5, pa.string(), False, False, True, 25, True, "numbered"
    ),
    "xoa-4.0": Traits(
        "xenium-4.0.1.0", 6, pa.string(), False, False, True, 25, True, "named"
    ),
}  # fmt: skip

# Columns that were not there from the beginning, of any table.
_COLUMN_SINCE: dict[str, Layout] = {
    "unassigned_codeword_counts": "xoa-1.3",
    "deprecated_codeword_counts": "xoa-1.3",
    "fov_name": "xoa-2.0",
    "nucleus_distance": "xoa-2.0",
    "codeword_index": "xoa-2.0",
    "nucleus_count": "xoa-2.0",
    "segmentation_method": "xoa-2.0",
    "label_id": "xoa-2.0",
    "codeword_category": "xoa-3.0",
    "is_gene": "xoa-3.0",
    "genomic_control_counts": "xoa-3.0",
}


def is_since(layout: Layout, first: Layout) -> bool:
    """Whether `layout` is `first` or a later one."""
    return LAYOUTS.index(layout) >= LAYOUTS.index(first)


def columns_of(names: list[str], layout: Layout) -> list[str]:
    """Those of the names of columns that the layout has."""
    return [n for n in names if n not in _COLUMN_SINCE or is_since(layout, _COLUMN_SINCE[n])]


@dataclass(frozen=True, slots=True)
class LayoutFeatures:
    """A section's features that a layout has: their rows in the section, and their names in it."""

    rows: I64  # ascending
    features: tuple[Feature, ...]

    @property
    def is_gene(self) -> npt.NDArray[np.bool_]:
        return np.array([f.feature_type == GENE_TYPE for f in self.features])

    @property
    def category(self) -> npt.NDArray[np.str_]:
        return np.array([f.category for f in self.features])

    def row_of(self, n_features: int) -> I64:
        """For each feature of the section its row in the layout, -1 where it has none."""
        row = np.full(n_features, -1)
        row[self.rows] = np.arange(len(self.rows))
        return row


def features_of(features: tuple[Feature, ...], layout: Layout) -> LayoutFeatures:
    """The features as a layout names them.

    Genomic controls came with XOA 3.0 and are left out before. XOA 1.0 has antisense probes among
    the negative controls and one kind of codeword that is no target's, the blank one.
    """
    rows = [
        i
        for i, f in enumerate(features)
        if f.feature_type != "Genomic Control" or is_since(layout, "xoa-3.0")
    ]
    named = [features[i] for i in rows]
    if layout == "xoa-1.0":
        named = _as_in_first_release(named)
    return LayoutFeatures(np.array(rows, np.int64), tuple(named))


def _as_in_first_release(features: list[Feature]) -> list[Feature]:
    genes = iter([f.name for f in features if f.feature_type == GENE_TYPE])
    named = []
    n_probes = 0
    for f in features:
        if f.feature_type in ("Unassigned Codeword", "Deprecated Codeword"):
            name = f"BLANK_{f.codewords[0]:04d}"
            f = replace(f, id=name, name=name, feature_type="Blank Codeword")
        elif f.feature_type == "Negative Control Probe":
            n_probes += 1
            if n_probes % 2:
                name = f"antisense_{next(genes)}"
                f = replace(f, id=name, name=name)
        named.append(f)
    return named
