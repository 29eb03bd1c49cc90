"""What a cell expresses, given its type, its state and its donor: the generative model.

The log rate of a gene is `base + marker[type] + slope[type] * (state - 0.5) + donor`; rates are
normalised over the panel, and a share of every cell's transcripts is ambient. Given its total, a
cell's counts are multinomial. Quality is independent of gene and cell, so that the counts of
good quality are multinomial too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pairing.simulate.celltypes import CELL_TYPES
from pairing.simulate.panel import MARKERS, STATE_DOWN, STATE_UP, genes

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

# The biology is one: all donors and seeds share these numbers, drawn from this seed.
_BIOLOGY_SEED = 20240529
MARKER_LOG_FOLD = (0.9, 1.9)
STATE_LOG_FOLD = (0.8, 1.6)  # from state 0 to 1, up or down
STATE_LOG_FOLD_OF_TYPE = 0.35
DONOR_LOG_SPREAD = 0.25
AMBIENT_SHARE = 0.10
COUNTS_PER_CELL = 110.0  # median, at qv ≥ 20
COUNTS_LOG_SPREAD = 0.45


@dataclass(frozen=True, slots=True)
class ExpressionModel:
    """Parameters over T types and G genes (in panel order); see the module."""

    genes: npt.NDArray[np.str_]  # (G,)
    types: npt.NDArray[np.str_]  # (T,)
    base: F64  # (G,)
    marker: F64  # (T, G)
    slope: F64  # (T, G)
    donor: F64  # (G,)
    ambient: F64  # (G,), sums to 1
    ambient_share: F64  # ()
    type_share: F64  # (T,), of the section's cells

    def profile(self, type_index: I64, state: F64) -> F64:
        """(n, G) probabilities of a transcript's gene, for n cells."""
        log_rate = (
            self.base
            + self.marker[type_index]
            + self.slope[type_index] * (state[:, None] - 0.5)
            + self.donor
        )
        rate = np.exp(log_rate - log_rate.max(axis=1, keepdims=True))
        own = rate / rate.sum(axis=1, keepdims=True)
        return np.asarray((1 - self.ambient_share) * own + self.ambient_share * self.ambient)

    def write(self, path: Path) -> None:
        """As an npz of plain arrays, one a field."""
        np.savez(path, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def read(cls, path: Path) -> ExpressionModel:
        with np.load(path, allow_pickle=False) as stored:
            return cls(**{f.name: stored[f.name] for f in fields(cls)})


def draw_model(rng: np.random.Generator, type_share: F64) -> ExpressionModel:
    """The model of one donor: the common biology and the donor's own factors from `rng`."""
    symbols = np.array(genes())
    biology = np.random.default_rng(_BIOLOGY_SEED)
    n_types, n_genes = len(CELL_TYPES), len(symbols)
    base = 0.8 * biology.standard_normal(n_genes)
    marker = np.zeros((n_types, n_genes))
    for t, kind in enumerate(CELL_TYPES):
        mine = np.isin(symbols, MARKERS[kind.name].split())
        marker[t, mine] = biology.uniform(*MARKER_LOG_FOLD, mine.sum())
    slope = STATE_LOG_FOLD_OF_TYPE * biology.standard_normal((n_types, n_genes))
    for programme, sign in ((STATE_UP, 1), (STATE_DOWN, -1)):
        members = np.isin(symbols, programme.split())
        slope[:, members] += sign * biology.uniform(*STATE_LOG_FOLD, members.sum())
    common = np.exp(base + marker).mean(axis=0)
    return ExpressionModel(
        genes=symbols,
        types=np.array([t.name for t in CELL_TYPES]),
        base=base,
        marker=marker,
        slope=slope,
        donor=DONOR_LOG_SPREAD * rng.standard_normal(n_genes),
        ambient=common / common.sum(),
        ambient_share=np.array(AMBIENT_SHARE),
        type_share=type_share,
    )
