"""Simulated gene panels: real symbols, invented Ensembl ids, and every kind of control."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

Species = Literal["human", "mouse"]
_ENSEMBL_PREFIX: dict[Species, str] = {"human": "ENSG", "mouse": "ENSMUSG"}

# Symbols of real panels; what they stand for here is in biology.py, not in any atlas.
MARKERS: dict[str, str] = {
    "epithelial": (
        "EPCAM KRT8 KRT18 KRT19 CDH1 CLDN4 CLDN7 ELF3 TACSTD2 ESRP1 KRT7 ERBB3 DSP MUC1"
    ),
    "secretory": (
        "MUC2 TFF3 SPINK4 FCGBP CLCA1 AGR2 ZG16 REG4 ITLN1 GALNT12 KLF4 CREB3L1 SPDEF TFF1"
    ),
    "lymphocyte": ("CD3E CD3D CD2 TRAC IL7R CCR7 LTB CD8A GZMK NKG7 CD69 CD5 CD6 LCK"),
    "plasma": (
        "JCHAIN MZB1 IGKC IGHG1 SDC1 TNFRSF17 XBP1 DERL3 IGHA1 CD38 FCRL5 PRDM1 POU2AF1 FKBP11"
    ),
    "fibroblast": ("COL1A1 COL1A2 COL3A1 DCN LUM PDGFRA PDGFRB FAP POSTN THY1 FBLN1 SFRP2 MMP2 C7"),
    "endothelial": ("PECAM1 VWF CDH5 KDR FLT1 TEK EGFL7 CLDN5 PLVAP ESAM ROBO4 EMCN CLEC14A MMRN2"),
    "smooth_muscle": (
        "ACTA2 MYH11 TAGLN CNN1 DES LMOD1 SYNPO2 MYLK ACTG2 TPM2 PLN CASQ2 SMTN ITGA8"
    ),
    "macrophage": ("CD68 CD163 MRC1 CSF1R C1QA C1QB C1QC MARCO MSR1 APOE LYZ AIF1 CD14 TREM2"),
    "eosinophil": (
        "CLC PRG2 EPX RNASE2 RNASE3 CCR3 SIGLEC8 IL5RA ALOX15 HDC PRG3 ADGRE1 CEBPE GATA1"
    ),
}
STATE_UP = (
    "MKI67 TOP2A PCNA MYC CCND1 CDK1 CCNB1 MCM2 MCM6 TYMS RRM2 BIRC5 NOP56 NCL FBL POLR1A "
    "UBE2C CENPF TK1 E2F1 CDC20 AURKA STMN1 HMGB2"
)
STATE_DOWN = (
    "CDKN1A BTG1 BTG2 KLF2 KLF6 TXNIP FOS JUN JUNB DUSP1 ZFP36 IER2 EGR1 ATF3 GADD45B "
    "CDKN1B TSC22D3 FOXO1 FOXO3 RGS2 SESN3 PIK3IP1 NFKBIA MXD4"
)
# What a whole lineage has in common: these alone tell none of its types from the others.
LINEAGES: dict[tuple[str, ...], str] = {
    ("epithelial", "secretory"): "KRT20 CDH17 VIL1 LGALS4 PIGR GPA33",
    ("lymphocyte", "plasma", "macrophage", "eosinophil"): "PTPRC CD52 CORO1A LAPTM5 CD37 CD53",
    ("macrophage", "eosinophil"): "TYROBP FCER1G ITGAM CSF2RB S100A9",
    ("fibroblast", "endothelial", "smooth_muscle"): "SPARC CALD1 IGFBP7 COL4A1 COL4A2 VIM",
}
# Follow what surrounds the cell, in every type.
NICHE_UP = (
    "CXCL9 CXCL10 CXCL11 ISG15 IFIT1 IFIT3 MX1 OAS1 GBP1 GBP5 IDO1 HLA-DRA HLA-DPB1 CD74 "
    "CIITA SOCS3 ICAM1 VCAM1 IRF1 STAT1"
)
NICHE_DOWN = "VEGFA CA9 ADM NDRG1 BNIP3 PFKFB4 EGLN3 ANKRD37 SLC2A3 HK2 ANGPTL4 LOX"
# Of STATE_UP, what a dividing cell has most of; and what a dying one has left.
MITOTIC_UP = "MKI67 TOP2A CDK1 CCNB1 BIRC5 UBE2C CENPF CDC20 AURKA STMN1 HMGB2"
PYKNOTIC_UP = "BBC3 PMAIP1 BAX FAS DDIT3 TRIB3 CHAC1 HMOX1"
# A loose pattern for controls would drop these genes.
LOOKALIKES = "NEGR1 NANOG NANS BLNK BLK BLMH ANTXR1 DEPTOR DEPDC5 INTS1 UNC5B GENE1"
# Added to the predesigned panel by the laboratory, which names as it likes.
CUSTOM = "BLANKET1 Unassigned2A NegControlled1 INTERGENIC9 DEPP1 EGFP mCherry IL6"
OTHERS = (
    "ACTB GAPDH B2M TUBA1B EEF1A1 RPLP0 PPIA UBC HPRT1 TBP SDHA YWHAZ HSP90AB1 HSPA8 "
    "LMNA ENO1 LDHA PGK1 ALDOA TPI1 PKM ATP5F1B COX4I1 NDUFA4 CYCS SOD1 SOD2 PRDX1 TXN "
    "GPX1 CAT FTH1 FTL TFRC SLC2A1 SLC7A5 SLC3A2 SLC25A5 VDAC1 TOMM20 TIMM23 HSPD1 HSPE1 "
    "CALR CANX PDIA4 HSPA5 SEC61B SSR4 SRP14 KDELR2 LMAN1 RAB7A RAB5C LAMP1 "
    "LAMP2 CTSB CTSD CTSL PSAP GRN HEXB NPC2 SQSTM1 MAP1LC3B GABARAP ATG5 BECN1 MTOR RHEB "
    "TSC2 AKT1 PTEN KRAS EGFR NOTCH1 CTNNB1 APC LGR5 TGFB1 STAT3 JAK1 NFKB1 RELA TNF"
)
DOUBLE_CODEWORD_EVERY = 31  # every so many-th gene has two codewords


@dataclass(frozen=True, slots=True)
class ControlKind:
    """One kind of control: its three vocabularies, its rate and quality."""

    category: str  # codeword_category of transcripts.parquet
    feature_type: str  # of cell_feature_matrix.h5
    name: str  # format string of the feature's number
    n_features: int
    share: float  # transcripts of it per gene transcript of a cell
    good_share: float  # of them with qv ≥ 20


# Shares as in a real bundle (Prime 5K, mouse ileum), but for unassigned codewords: 28 % there, of
# a design with thousands of them. That bundle has too few good ones to tell their share.
CONTROL_KINDS: tuple[ControlKind, ...] = (
    ControlKind(
        "negative_control_probe",
        "Negative Control Probe",
        "NegControlProbe_{:05d}",
        20,
        0.0002,
        0.6,
    ),
    ControlKind(
        "genomic_control_probe", "Genomic Control", "Intergenic_Region_{}_part_1", 10, 0.0008, 0.6
    ),
    ControlKind(
        "negative_control_codeword",
        "Negative Control Codeword",
        "NegControlCodeword_{:04d}",
        41,
        0.001,
        0.02,
    ),
    ControlKind(
        "unassigned_codeword", "Unassigned Codeword", "UnassignedCodeword_{:04d}", 60, 0.005, 0.06
    ),
    ControlKind(
        "deprecated_codeword", "Deprecated Codeword", "DeprecatedCodeword_{:04d}", 4, 0.001, 0.1
    ),
)


@dataclass(frozen=True, slots=True)
class Feature:
    """One row of the matrix, in its order; `kind` is None for a gene."""

    id: str
    name: str
    category: str
    feature_type: str
    codewords: tuple[int, ...]
    kind: ControlKind | None


@cache
def base_genes() -> tuple[str, ...]:
    """Human symbols of the usual panel in alphabetical order, as the matrix has them."""
    programmes = (STATE_UP, STATE_DOWN, NICHE_UP, NICHE_DOWN, PYKNOTIC_UP)
    lists = [*MARKERS.values(), *LINEAGES.values(), *programmes, LOOKALIKES, CUSTOM, OTHERS]
    return tuple(sorted(symbol for words in lists for symbol in words.split()))


N_GENES = len(base_genes())
MIN_GENES = N_GENES - len(OTHERS.split())


def chosen_genes(n_genes: int) -> list[int]:
    """Numbers of a panel's genes, in alphabetical order of their symbols.

    Below N_GENES the base genes, those above invented ones. A smaller panel lacks genes that tell
    nothing of a cell's type; a larger one has them all, and more. One number is one gene in all.
    """
    base = base_genes()
    spare = [base.index(symbol) for symbol in OTHERS.split()]
    left_out = set(spare[::-1][: max(N_GENES - n_genes, 0)])
    numbers = [number for number in range(max(n_genes, N_GENES)) if number not in left_out]
    return sorted(numbers, key=human_symbol)


def human_symbol(number: int) -> str:
    base = base_genes()
    return base[number] if number < len(base) else f"SIMG{number - len(base) + 1:04d}"


def genes(n_genes: int = N_GENES, species: Species = "human") -> tuple[str, ...]:
    """Symbols of a panel as the matrix has them; mouse symbols have one capital."""
    symbols = [human_symbol(number) for number in chosen_genes(n_genes)]
    return tuple(symbols if species == "human" else [s[0] + s[1:].lower() for s in symbols])


def features(n_genes: int = N_GENES, species: Species = "human") -> tuple[Feature, ...]:
    """All rows of the matrix: genes, then each kind of control."""
    custom = {base_genes().index(symbol) for symbol in CUSTOM.split()}
    rows: list[Feature] = []
    codeword = 0
    named = zip(chosen_genes(n_genes), genes(n_genes, species), strict=True)
    for i, (number, symbol) in enumerate(named):
        n = 2 if i % DOUBLE_CODEWORD_EVERY == 0 else 1
        rows.append(
            Feature(
                # Real ids end below ENSG000004 and ENSMUSG000002: none of these is one of them.
                id=f"{_ENSEMBL_PREFIX[species]}{900000 + number:011d}",
                name=symbol,
                category="custom_gene" if number in custom else "predesigned_gene",
                feature_type="Gene Expression",
                codewords=tuple(range(codeword, codeword + n)),
                kind=None,
            )
        )
        codeword += n
    for kind in CONTROL_KINDS:
        for number in range(1, kind.n_features + 1):
            name = kind.name.format(number)
            rows.append(Feature(name, name, kind.category, kind.feature_type, (codeword,), kind))
            codeword += 1
    return tuple(rows)


def species_of(ids: Iterable[str]) -> Species:
    """Whose genes have these ids."""
    return "mouse" if any(id_.startswith(_ENSEMBL_PREFIX["mouse"]) for id_ in ids) else "human"
