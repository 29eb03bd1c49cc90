"""Retrieval between two sets of embeddings whose rows are pairs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from shards.order import Indices
from shards.schema import Record

Embedding = npt.NDArray[np.float32]
Direction = Literal["image_to_genes", "genes_to_image"]

TIE_RULE: Final = "rank = 1 + candidates that score higher + half of the others that score the same"
_QUERIES_AT_ONCE: Final = 1024


class Retrieval(Record):
    """One line of figures: `n_queries` queries, each against `n_candidates` with one right."""

    method: str
    scope: Literal["batch", "all"]
    direction: Direction
    n_queries: int
    n_candidates: int
    r_at_1: float
    r_at_5: float
    r_at_10: float
    median_rank: float


def ranks(query_ND: Embedding, candidate_ND: Embedding) -> npt.NDArray[np.float64]:
    """Rank of candidate i for query i by dot product, for all i; ties by `TIE_RULE`."""
    found = np.empty(len(query_ND))
    for start in range(0, len(query_ND), _QUERIES_AT_ONCE):
        rows = slice(start, start + _QUERIES_AT_ONCE)
        score_QN = query_ND[rows] @ candidate_ND.T
        own = np.arange(start, start + len(score_QN))
        own_Q1 = score_QN[np.arange(len(own)), own][:, None]
        higher = (score_QN > own_Q1).sum(axis=1)
        same = (score_QN == own_Q1).sum(axis=1) - 1
        found[rows] = 1 + higher + same / 2
    return found


def random_batches(n: int, batch_size: int, seed: int) -> Indices:
    """(n_batches, batch_size) of indices below `n`, each at most once; full batches only."""
    shuffled = np.random.Generator(np.random.Philox(seed)).permutation(n)
    n_batches = n // batch_size
    return shuffled[: n_batches * batch_size].reshape(n_batches, batch_size).astype(np.int64)


def retrieval_lines(
    method: str, image_ND: Embedding, gene_ND: Embedding, batches: Indices
) -> list[Retrieval]:
    """Both directions, inside each batch and over all rows."""
    lines = []
    directions: Iterable[tuple[Direction, Embedding, Embedding]] = (
        ("image_to_genes", image_ND, gene_ND),
        ("genes_to_image", gene_ND, image_ND),
    )
    for direction, query_ND, candidate_ND in directions:
        if len(batches):
            in_batch = [ranks(query_ND[b], candidate_ND[b]) for b in batches]
            lines.append(
                _line(method, "batch", direction, np.concatenate(in_batch), batches.shape[1])
            )
        lines.append(
            _line(method, "all", direction, ranks(query_ND, candidate_ND), len(candidate_ND))
        )
    return lines


def chance_line(scope: Literal["batch", "all"], direction: Direction, n: int) -> Retrieval:
    """What guessing gives with `n` candidates, computed, not sampled."""
    at = {k: min(k / n, 1.0) for k in (1, 5, 10)}
    return Retrieval(
        method="chance",
        scope=scope,
        direction=direction,
        n_queries=0,
        n_candidates=n,
        r_at_1=at[1],
        r_at_5=at[5],
        r_at_10=at[10],
        median_rank=(n + 1) / 2,
    )


def _line(
    method: str,
    scope: Literal["batch", "all"],
    direction: Direction,
    rank_Q: npt.NDArray[np.float64],
    n_candidates: int,
) -> Retrieval:
    return Retrieval(
        method=method,
        scope=scope,
        direction=direction,
        n_queries=len(rank_Q),
        n_candidates=n_candidates,
        r_at_1=float((rank_Q <= 1).mean()),
        r_at_5=float((rank_Q <= 5).mean()),
        r_at_10=float((rank_Q <= 10).mean()),
        median_rank=float(np.median(rank_Q)),
    )
