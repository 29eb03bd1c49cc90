"""What a feature of a run is: a gene, or which kind of control."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

CATEGORY_NAMES = (
    "gene",
    "negative_control_probe",
    "negative_control_codeword",
    "unassigned_codeword",
    "deprecated_codeword",
    "genomic_control",
    "other",
)
GENE, OTHER = CATEGORY_NAMES.index("gene"), CATEGORY_NAMES.index("other")
_BY_CODEWORD = {
    "predesigned_gene": "gene",
    "custom_gene": "gene",
    "negative_control_probe": "negative_control_probe",
    "genomic_control_probe": "genomic_control",
    "negative_control_codeword": "negative_control_codeword",
    "unassigned_codeword": "unassigned_codeword",
    "deprecated_codeword": "deprecated_codeword",
}
# Feature types of the matrix. Proteins (XOA 4.0) are intensities, and are named like genes.
GENE_TYPE, PROTEIN_TYPE = "Gene Expression", "Protein Expression"
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


def category_of_codeword(word: str) -> int:
    """Index into CATEGORY_NAMES of a `codeword_category` of the transcripts."""
    return CATEGORY_NAMES.index(_BY_CODEWORD.get(word, "other"))


def control_by_name(name: str) -> int | None:
    """Index into CATEGORY_NAMES by the prefix that controls have; None for any other name."""
    for prefix, category in _BY_PREFIX:
        if prefix.match(name):
            return CATEGORY_NAMES.index(category)
    return None


@dataclass(frozen=True, slots=True)
class FeatureKinds:
    """What the bundle says of a feature by its name, where the transcripts don't say it."""

    feature_types: Mapping[str, str] = field(default_factory=dict)  # of the matrix, no proteins
    descriptors: Mapping[str, str] = field(default_factory=dict)  # of the gene panel

    def category(self, name: str) -> int:
        """Index into CATEGORY_NAMES: by feature type, then panel descriptor, then prefix."""
        if name in self.feature_types:
            return CATEGORY_NAMES.index(_BY_FEATURE_TYPE.get(self.feature_types[name], "other"))
        if self.descriptors.get(name) == "gene":
            return GENE
        control = control_by_name(name)
        if control is not None:
            return control
        return OTHER if name in self.descriptors else GENE
