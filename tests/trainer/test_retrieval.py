"""Ranks, batches and figures of retrieval."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.retrieval import chance_line, random_batches, ranks, retrieval_lines


def test_ranks_by_hand() -> None:
    query = np.array([[1, 0], [0, 1], [1, 0]], dtype=np.float32)
    candidate = np.array([[0.9, 0], [0.2, 0.1], [0.9, 0]], dtype=np.float32)
    # Query 0: candidates score .9 .2 .9, so its own ties with one other. Query 1: 0, .1, 0.
    assert ranks(query, candidate).tolist() == [1.5, 1.0, 1.5]


def test_all_the_same_gives_the_middle_rank() -> None:
    z = np.ones((64, 4), dtype=np.float32)
    assert ranks(z, z).tolist() == [32.5] * 64


def test_more_queries_than_are_scored_at_once() -> None:
    rng = np.random.default_rng(0)
    query, candidate = rng.normal(size=(2, 1500, 8)).astype(np.float32)
    score = query @ candidate.T
    own = np.diag(score)[:, None]
    np.testing.assert_array_equal(ranks(query, candidate), 1 + (score > own).sum(axis=1))


@given(n=st.integers(0, 500), batch_size=st.integers(1, 70), seed=st.integers(0, 2**32))
def test_batches_are_full_and_disjoint(n: int, batch_size: int, seed: int) -> None:
    batches = random_batches(n, batch_size, seed)
    assert batches.shape == (n // batch_size, batch_size)
    assert len(set(batches.ravel().tolist())) == batches.size
    assert np.array_equal(batches, random_batches(n, batch_size, seed))


def test_lines_of_perfect_and_of_random_embeddings() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(640, 16)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    batches = random_batches(640, 64, 0)
    for line in retrieval_lines("model", z, z, batches):
        assert (line.r_at_1, line.median_rank, line.n_queries) == (1.0, 1.0, 640)
    other = rng.normal(size=z.shape).astype(np.float32)
    for line in retrieval_lines("model", z, other, batches):
        chance = chance_line(line.scope, line.direction, line.n_candidates)
        deviation = (chance.r_at_5 * (1 - chance.r_at_5) / 640) ** 0.5
        assert line.r_at_5 == pytest.approx(chance.r_at_5, abs=4 * deviation)


def test_chance() -> None:
    line = chance_line("batch", "image_to_genes", 64)
    assert (line.r_at_1, line.r_at_5, line.r_at_10) == (1 / 64, 5 / 64, 10 / 64)
    assert line.median_rank == 32.5
