"""What a cell expresses, given its type, state, surroundings and donor: the generative model.

The log rate of a gene is
`base + marker[type] + state_slope[type] * (state - 0.5) + niche_slope[type] * (niche - 0.5)
+ phase[phase] + donor`; rates are normalised over the panel to the cell's profile. Each rate varies
from cell to cell as a gamma whose shape is the profile times `concentration`, so that given its
total the counts that a cell makes are Dirichlet-multinomial. Quality is independent of gene and
cell: the counts of good quality are of the same kind.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pairing.simulate.celltypes import CELL_TYPES
from pairing.simulate.panel import (
    LINEAGES,
    MARKERS,
    MITOTIC_UP,
    N_GENES,
    NICHE_DOWN,
    NICHE_UP,
    PYKNOTIC_UP,
    STATE_DOWN,
    STATE_UP,
    Species,
    base_genes,
    chosen_genes,
    genes,
)

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

TYPES = tuple(t.name for t in CELL_TYPES)
PHASES = ("interphase", "mitotic", "pyknotic")

# The biology is one: all donors and seeds share these numbers, drawn from this seed.
_BIOLOGY_SEED = 20240529
BASE_LOG_SPREAD = 0.9
MORE_LOG_MEAN = -2.5  # of genes that only large panels have: 5,000 of them make half of all counts
MARKER_LOG_FOLD = (0.9, 1.9)
LINEAGE_LOG_FOLD = (0.5, 1.2)
STATE_LOG_FOLD = (0.9, 1.8)  # from state 0 to 1, up or down
STATE_LOG_FOLD_OF_TYPE = 0.35
NICHE_LOG_FOLD = (0.9, 1.8)
NICHE_LOG_FOLD_OF_TYPE = 0.3
MITOTIC_LOG_FOLD = (1.2, 2.2)
PYKNOTIC_LOG_FOLD = (1.0, 2.0)
PHASE_DEPTH = (1.0, 1.3, 0.25)
DONOR_LOG_SPREAD = 0.25
CONCENTRATION = 300.0
AMBIENT_SHARE = 0.06

CELL_DEPTH_LOG_SPREAD = 0.55
DONOR_DEPTH_LOG_SPREAD = 0.15


@dataclass(frozen=True, slots=True)
class ExpressionModel:
    """Parameters over T types, P phases and G genes (in panel order); see the module."""

    genes: npt.NDArray[np.str_]  # (G,)
    types: npt.NDArray[np.str_]  # (T,)
    phases: npt.NDArray[np.str_]  # (P,)
    base: F64  # (G,)
    marker: F64  # (T, G)
    state_slope: F64  # (T, G)
    niche_slope: F64  # (T, G)
    phase: F64  # (P, G)
    phase_depth: F64  # (P,), factor of the total
    donor: F64  # (G,)
    concentration: F64  # ()
    ambient: F64  # (G,), sums to 1: the mean profile of the donor's cells
    ambient_share: F64  # (), of all transcripts on the tissue

    def profile(self, type_index: I64, state: F64, niche: F64, phase: I64) -> F64:
        """(n, G) probabilities of the gene of a transcript that each of n cells makes."""
        rate = np.exp(
            self.base
            + self.marker[type_index]
            + self.state_slope[type_index] * (state[:, None] - 0.5)
            + self.niche_slope[type_index] * (niche[:, None] - 0.5)
            + self.phase[phase]
            + self.donor
        )
        return np.asarray(rate / rate.sum(axis=1, keepdims=True))

    def write(self, path: Path) -> None:
        """As an npz of plain arrays, one a field."""
        np.savez(path, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def read(cls, path: Path) -> ExpressionModel:
        with np.load(path, allow_pickle=False) as stored:
            return cls(**{f.name: stored[f.name] for f in fields(cls)})


def draw_model(
    rng: np.random.Generator, type_share: F64, n_genes: int = N_GENES, species: Species = "human"
) -> ExpressionModel:
    """The model of one donor: the common biology and the donor's own factors from `rng`.

    `type_share` (T,) is the make-up of the donor's tissue: what is ambient in it comes from it. A
    gene is of the same biology in every panel that has it.
    """
    columns = np.array(chosen_genes(n_genes))
    base, marker, state_slope, niche_slope, phase = (
        np.take(np.concatenate(parts, axis=-1), columns, axis=-1)
        for parts in zip(_base_biology(), _more_biology(max(n_genes - N_GENES, 0)), strict=True)
    )
    donor = DONOR_LOG_SPREAD * rng.standard_normal(max(n_genes, N_GENES))[columns]
    common = type_share @ np.exp(base + marker + donor)
    return ExpressionModel(
        genes=np.array(genes(n_genes, species)),
        types=np.array(TYPES),
        phases=np.array(PHASES),
        base=base,
        marker=marker,
        state_slope=state_slope,
        niche_slope=niche_slope,
        phase=phase,
        phase_depth=np.array(PHASE_DEPTH),
        donor=donor,
        concentration=np.array(CONCENTRATION),
        ambient=common / common.sum(),
        ambient_share=np.array(AMBIENT_SHARE),
    )


def _base_biology() -> tuple[F64, F64, F64, F64, F64]:
    """base (G,), marker, state_slope, niche_slope (T, G) and phase (P, G) of the usual panel."""
    symbols = np.array(base_genes())
    biology = np.random.default_rng(_BIOLOGY_SEED)
    n_types, n_genes = len(TYPES), len(symbols)

    def folds(words: str, log_fold: tuple[float, float]) -> F64:
        members = np.isin(symbols, words.split())
        return np.where(members, biology.uniform(*log_fold, n_genes), 0.0)

    base = BASE_LOG_SPREAD * biology.standard_normal(n_genes)
    marker = np.stack([folds(MARKERS[name], MARKER_LOG_FOLD) for name in TYPES])
    for lineage, words in LINEAGES.items():
        marker[np.isin(TYPES, lineage)] += folds(words, LINEAGE_LOG_FOLD)
    state_slope = STATE_LOG_FOLD_OF_TYPE * biology.standard_normal((n_types, n_genes))
    state_slope += folds(STATE_UP, STATE_LOG_FOLD) - folds(STATE_DOWN, STATE_LOG_FOLD)
    niche_slope = NICHE_LOG_FOLD_OF_TYPE * biology.standard_normal((n_types, n_genes))
    niche_slope += folds(NICHE_UP, NICHE_LOG_FOLD) - folds(NICHE_DOWN, NICHE_LOG_FOLD)
    phase = np.stack(
        [
            np.zeros(n_genes),
            folds(MITOTIC_UP, MITOTIC_LOG_FOLD),
            folds(PYKNOTIC_UP, PYKNOTIC_LOG_FOLD),
        ]
    )
    return base, marker, state_slope, niche_slope, phase


def _more_biology(n_genes: int) -> tuple[F64, F64, F64, F64, F64]:
    """The same of the invented genes: rare, and markers of nothing."""
    drawn = np.random.default_rng([_BIOLOGY_SEED, 1]).standard_normal((n_genes, 1 + 2 * len(TYPES)))
    state, niche = drawn[:, 1:].T.reshape(2, len(TYPES), n_genes)
    return (
        MORE_LOG_MEAN + BASE_LOG_SPREAD * drawn[:, 0],
        np.zeros((len(TYPES), n_genes)),
        STATE_LOG_FOLD_OF_TYPE * state,
        NICHE_LOG_FOLD_OF_TYPE * niche,
        np.zeros((len(PHASES), n_genes)),
    )


def draw_depth(rng: np.random.Generator, n: int, donor: I64) -> F64:
    """(n,) factor of the number of transcripts that each cell makes, median 1.

    `donor` (n,) is the donor of each cell: how many transcripts are detected differs between
    donors, as tissue is fixed well or badly, and between the cells of one.
    """
    of_donor = DONOR_DEPTH_LOG_SPREAD * rng.standard_normal(int(donor.max()) + 1)
    return np.asarray(np.exp(of_donor[donor] + CELL_DEPTH_LOG_SPREAD * rng.standard_normal(n)))
