"""The best that a matcher of images and counts could do: it knows each cell and its surroundings.

Reads `truth/` only. What is expected in a cell of the instrument is the mix of its makers' profiles
(see biology.py), each by its share of what they made there, and of what is ambient. A picture shows
the makers too: the cell and its neighbours. Given its total, a cell's counts are taken as
Dirichlet-multinomial with the spread that such a mix of makers has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
from scipy import sparse
from scipy.special import gammaln, logsumexp

from pairing.simulate.biology import ExpressionModel
from shards.errors import BadInput

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

_STATES = ["donor", "type", "state", "niche", "phase"]
# Shares are known from what was made in truth, with so many transcripts more of the cell's own:
# a cell that has few by chance is then told by what it is rather than by these few.
_OWN_PSEUDO_COUNTS = 5.0
_N_PRIOR_CELLS = 2000


def log_likelihood(
    truth: Path, counts: sparse.csr_matrix, genes: Sequence[str], state_cell_ids: Sequence[str]
) -> F64:
    """(n_counts, n_states) log p(counts_j | cell_i, total_j), in nats.

    `cell_i` stands for type, state, niche, phase and donor of the cell and of what spills into it.
    `counts` is (n_counts, n_genes) with columns named by `genes`, a selection of the panel in any
    order; the cells are those of `state_cell_ids`, in that order. Without the multinomial
    coefficient, which depends on the counts alone: compare along a row, or use
    `pointwise_mutual_information`. Raises BadInput for a gene or a cell that `truth` lacks.
    """
    section = _Section.read(truth)
    return _log_likelihood(counts, section.concentrations(genes, section.rows(state_cell_ids)))


def pointwise_mutual_information(
    truth: Path, counts: sparse.csr_matrix, genes: Sequence[str], state_cell_ids: Sequence[str]
) -> F64:
    """(n_counts, n_states) log p(counts_j | cell_i) - log p(counts_j), given total_j.

    The score to rank by in both directions: counts for a given cell (down a column), where the
    marginal of each candidate matters, and cells for given counts (along a row), where it cancels.
    The marginal is over the section's cells, at most 2,000 of them at equal steps. Arguments and
    errors as of `log_likelihood`.
    """
    section = _Section.read(truth)
    given = _log_likelihood(counts, section.concentrations(genes, section.rows(state_cell_ids)))
    n = len(section.cells)
    every = np.unique(np.linspace(0, n - 1, min(n, _N_PRIOR_CELLS)).astype(np.int64))
    prior = _log_likelihood(counts, section.concentrations(genes, every))
    marginal = logsumexp(prior, axis=1) - np.log(len(every))
    return np.asarray(given - marginal[:, None])


@dataclass(frozen=True, slots=True)
class _Section:
    """What `truth/` tells of a section."""

    folder: Path
    models: dict[str, ExpressionModel]  # by donor
    cells: pd.DataFrame  # of the instrument
    tissue_cells: pd.DataFrame
    made_by: sparse.csr_matrix  # (cells, tissue cells) good gene transcripts

    @classmethod
    def read(cls, folder: Path) -> _Section:
        cells = pq.read_table(folder / "cells.parquet", columns=["cell_id", *_STATES]).to_pandas()
        tissue = pq.read_table(folder / "tissue_cells.parquet", columns=_STATES).to_pandas()
        return cls(
            folder=folder,
            models={
                donor: ExpressionModel.read(folder / "expression" / f"{donor}.npz")
                for donor in tissue["donor"].unique()
            },
            cells=cells,
            tissue_cells=tissue,
            made_by=sparse.load_npz(folder / "spill.npz").tocsr(),
        )

    def rows(self, cell_ids: Sequence[str]) -> I64:
        return _positions(self.folder / "cells.parquet", "cells", self.cells["cell_id"], cell_ids)

    def concentrations(self, genes: Sequence[str], rows: I64) -> F64:
        """(n, n_genes) of the Dirichlet that the composition of each cell follows."""
        model = next(iter(self.models.values()))
        columns = _positions(self.folder / "expression", "genes", model.genes, genes)
        made_by = self.made_by[rows]
        makers = np.unique(made_by.indices)
        of_maker = self._profiles(self.tissue_cells.iloc[makers], columns)
        own = self._profiles(self.cells.iloc[rows], columns)
        n_made = np.asarray(made_by.sum(axis=1), np.float64).ravel()
        in_cell = made_by[:, makers] @ of_maker + _OWN_PSEUDO_COUNTS * own
        in_cell /= n_made[:, None] + _OWN_PSEUDO_COUNTS
        ambient = np.stack([self.models[d].ambient for d in self.cells["donor"].iloc[rows]])
        share = float(model.ambient_share)
        mix = (1 - share) * in_cell + share * ambient[:, columns]
        # The compositions of a cell's makers vary independently, and what is ambient doesn't: of
        # the variance of one of them the sum of the squared shares is left.
        squares = np.asarray(made_by.power(2).sum(axis=1)).ravel() / np.maximum(n_made, 1) ** 2
        squares = np.where(n_made > 0, squares, 1.0) * (1 - share) ** 2
        concentration = (float(model.concentration) + 1) / squares - 1
        return np.asarray(concentration[:, None] * mix)

    def _profiles(self, cells: pd.DataFrame, columns: I64) -> F64:
        profiles = np.empty((len(cells), len(columns)))
        for donor, mine in cells.reset_index(drop=True).groupby("donor"):
            model = self.models[str(donor)]
            where = self.folder / "cells.parquet"
            profiles[mine.index] = model.profile(
                _positions(where, "types", model.types, mine["type"]),
                mine["state"].to_numpy(),
                mine["niche"].to_numpy(),
                _positions(where, "phases", model.phases, mine["phase"]),
            )[:, columns]
        return profiles


def _log_likelihood(counts: sparse.csr_matrix, concentration: F64) -> F64:
    """(n_counts, n_cells) of Dirichlet-multinomials; see the coefficient in `log_likelihood`.

    Over a selection of the genes, counts are Dirichlet-multinomial with the same concentrations.
    """
    total = np.asarray(counts.sum(axis=1)).ravel()
    distinct, which = np.unique(total, return_inverse=True)
    whole = concentration.sum(axis=1)
    score: F64 = -(gammaln(distinct[:, None] + whole) - gammaln(whole))[which]
    # log Γ(count + a) - log Γ(a) is the sum of log(a + k) over k below the count.
    left = sparse.csr_matrix(counts, dtype=np.int64, copy=True)
    left.eliminate_zeros()
    k = 0
    while left.nnz:
        genes = np.unique(left.indices)
        more = left[:, genes].astype(bool).astype(np.float64)
        score += more @ np.log(concentration[:, genes].T + k)
        left.data -= 1
        left.eliminate_zeros()
        k += 1
    return score


def _positions(where: Path, what: str, known: Iterable[str], wanted: Iterable[str]) -> I64:
    position = {name: i for i, name in enumerate(known)}
    missing = [name for name in wanted if name not in position]
    if missing:
        raise BadInput(
            where,
            expected=f"{what} of the simulation",
            found=f"{len(missing)} others, the first of them {missing[0]}",
            remedy="give the truth of the run that the counts are from",
        )
    return np.array([position[name] for name in wanted], dtype=np.int64)
