"""Which features a run measured: from its matrix, else its panel, else its transcripts."""

from __future__ import annotations

import csv
import json
from functools import cached_property
from pathlib import Path

import pandas as pd

from pairing.xenium.features import GENE_TYPE, PROTEIN_TYPE, FeatureKinds, control_by_name
from pairing.xenium.files import BundleFiles, parsed
from pairing.xenium.matrix import matrix_name, read_features
from pairing.xenium.tables import genes_of
from shards.errors import BadInput
from shards.schema import Gene

PANEL = "gene_panel.json"
PANEL_TSV = "panel.tsv"  # of XOA 1.0


class BundlePanel:
    """The features of a bundle by every file that names them."""

    def __init__(self, path: Path, files: BundleFiles) -> None:
        self._path = path
        self._files = files
        self.has_matrix = matrix_name(files) is not None
        # Without any the genes have to be those among the transcripts.
        self.names_genes = self.has_matrix or bool({PANEL, PANEL_TSV} & files.names)

    @cached_property
    def features(self) -> pd.DataFrame:
        """name, id and feature_type of every row of the matrix; BadInput without a matrix."""
        return read_features(self._files)

    @cached_property
    def _targets(self) -> list[tuple[str, str, str]]:
        """(name, id, descriptor) of every target of the panel."""
        if PANEL in self._files.names:
            path = self._files.path(PANEL)
            with parsed(path):
                panel = json.loads(path.read_text("utf-8-sig"))
                types = [target["type"] for target in panel["payload"]["targets"]]
                return [
                    (t["data"]["name"], t["data"].get("id") or "", t["descriptor"]) for t in types
                ]
        if PANEL_TSV in self._files.names:
            return _read_panel_tsv(self._files.path(PANEL_TSV))
        return []

    @cached_property
    def kinds(self) -> FeatureKinds:
        types: dict[str, str] = {}
        if self.has_matrix:
            counted = self.features[self.features["feature_type"] != PROTEIN_TYPE]
            types = dict(zip(counted["name"], counted["feature_type"], strict=True))
        return FeatureKinds(types, {name: kind for name, _, kind in self._targets})

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """In the order of the matrix, else of the panel; empty where `names_genes` is False."""
        if self.has_matrix:
            rows = self.features[self.features["feature_type"] == GENE_TYPE]
            return genes_of(self._path, rows["name"], rows["id"])
        named = [(name, id_) for name, id_, kind in self._targets if kind == "gene"]
        return genes_of(self._path, [name for name, _ in named], [id_ for _, id_ in named])


def _read_panel_tsv(path: Path) -> list[tuple[str, str, str]]:
    """Targets of a table with a header, in which the columns Name and ID are looked for."""
    with parsed(path), path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    header = [column.strip().lower() for column in rows[0]] if rows else []
    if "name" not in header:
        raise BadInput(
            path,
            expected="a header with the column Name",
            found=", ".join(header) or "an empty file",
            remedy="copy the panel again from the instrument's output",
        )
    name_at = header.index("name")
    id_at = header.index("id") if "id" in header else name_at
    with parsed(path):
        named = [(row[name_at], row[id_at]) for row in rows[1:] if row]
    return [
        (name, id_, "gene" if control_by_name(name) is None else "control") for name, id_ in named
    ]
