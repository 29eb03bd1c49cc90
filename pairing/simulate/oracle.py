"""The best that a matcher of images and counts could do: it knows each cell's type and state.

Reads `truth/` only. The model is that of expression.py: given its total, a cell's counts are
multinomial with the profile of its type and state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from scipy import sparse
from scipy.special import logsumexp

from pairing.simulate.expression import ExpressionModel
from shards.errors import BadInput

F64 = npt.NDArray[np.float64]

_N_STATE_STEPS = 25  # of the prior over the state, which is even from 0 to 1


def log_likelihood(
    truth: Path, counts: sparse.csr_matrix, genes: Sequence[str], state_cell_ids: Sequence[str]
) -> F64:
    """(n_counts, n_states) log p(counts_j | type_i, state_i, total_j), in nats.

    `counts` is (n_counts, n_genes) with columns named by `genes`, a selection of the panel in any
    order; the states are those of `state_cell_ids`, in that order. Without the multinomial
    coefficient, which depends on the counts alone: compare along a row, or use
    `pointwise_mutual_information`. Raises BadInput for a gene or a cell that `truth` lacks.
    """
    model, columns = _model_and_columns(truth, genes)
    type_index, state = _types_and_states(truth, model, state_cell_ids)
    return _log_likelihood(model, columns, counts, type_index, state)


def pointwise_mutual_information(
    truth: Path, counts: sparse.csr_matrix, genes: Sequence[str], state_cell_ids: Sequence[str]
) -> F64:
    """(n_counts, n_states) log p(counts_j | type_i, state_i) - log p(counts_j), given total_j.

    The score to rank by in both directions: counts for a given cell (down a column), where the
    marginal of each candidate matters, and cells for given counts (along a row), where it cancels.
    The marginal is over the section's share of each type and an even state. Arguments and errors
    as of `log_likelihood`.
    """
    model, columns = _model_and_columns(truth, genes)
    type_index, state = _types_and_states(truth, model, state_cell_ids)
    steps = (np.arange(_N_STATE_STEPS) + 0.5) / _N_STATE_STEPS
    prior_type = np.repeat(np.arange(len(model.types)), _N_STATE_STEPS)
    prior_state = np.tile(steps, len(model.types))
    weight = np.repeat(model.type_share / _N_STATE_STEPS, _N_STATE_STEPS)
    given = _log_likelihood(model, columns, counts, type_index, state)
    prior = _log_likelihood(model, columns, counts, prior_type, prior_state)
    marginal = logsumexp(prior, axis=1, b=weight)
    return np.asarray(given - marginal[:, None])


def _log_likelihood(
    model: ExpressionModel,
    columns: npt.NDArray[np.int64],
    counts: sparse.csr_matrix,
    type_index: npt.NDArray[np.int64],
    state: F64,
) -> F64:
    profile = model.profile(type_index, state)[:, columns]
    # Over a selection of the genes, counts are multinomial with the profile normalised over it.
    log_profile = np.log(profile / profile.sum(axis=1, keepdims=True))
    return np.asarray(counts @ log_profile.T)


def _model_and_columns(
    truth: Path, genes: Sequence[str]
) -> tuple[ExpressionModel, npt.NDArray[np.int64]]:
    model = ExpressionModel.read(truth / "expression.npz")
    return model, _positions(truth / "expression.npz", "genes", model.genes, genes)


def _types_and_states(
    truth: Path, model: ExpressionModel, cell_ids: Sequence[str]
) -> tuple[npt.NDArray[np.int64], F64]:
    path = truth / "cells.parquet"
    table = pq.read_table(path, columns=["cell_id", "type", "state"])
    rows = _positions(path, "cells", table["cell_id"].to_numpy(zero_copy_only=False), cell_ids)
    types = table["type"].to_numpy(zero_copy_only=False)[rows]
    return _positions(path, "types", model.types, types), table["state"].to_numpy()[rows]


def _positions(
    where: Path, what: str, known: npt.NDArray[np.str_], wanted: Sequence[str]
) -> npt.NDArray[np.int64]:
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
