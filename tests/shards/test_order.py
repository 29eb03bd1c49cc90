"""Orders: each epoch a permutation, resumed anywhere, shared by any ranks, well mixed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.order import (
    Balanced,
    Blocks,
    Indices,
    Order,
    Shuffled,
    batch_at,
    cut,
    share_of,
)

KINDS = ("shuffled", "balanced", "blocks", "balanced blocks")


@dataclass(frozen=True)
class Parts:
    """Uneven parts of uneven runs, and how they are cut."""

    sizes: list[int]
    runs: list[int]
    pieces: int = 4
    piece_samples: int = 16

    def order(self, kind: str, seed: int = 3, what: str = "what") -> Order:
        if kind == "shuffled":
            return Shuffled(sum(self.sizes), seed, what)
        if kind == "balanced":
            return Balanced(np.bincount(self.runs, self.sizes).astype(int), seed, what)
        return Blocks(
            self.sizes,
            self.runs,
            seed,
            what,
            pieces=self.pieces,
            piece_samples=self.piece_samples,
            balanced=kind == "balanced blocks",
        )


@st.composite
def uneven(draw: st.DrawFn) -> Parts:
    sizes = draw(st.lists(st.integers(1, 90), min_size=1, max_size=12))
    runs = sorted(draw(st.integers(0, 4)) for _ in sizes)
    return Parts(sizes, runs, draw(st.integers(1, 6)), draw(st.integers(1, 40)))


FIXED = Parts([20, 20, 9, 50, 1, 50, 7, 7, 7], [0, 0, 0, 1, 1, 2, 3, 3, 3])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(
    parts=uneven(),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 10_000),
    batch_size=st.integers(1, 64),
)
def test_every_epoch_is_a_permutation(
    kind: str, parts: Parts, seed: int, epoch: int, batch_size: int
) -> None:
    order = parts.order(kind, seed)
    cursor, seen = epoch * order.n, []
    while cursor < (epoch + 1) * order.n:
        batch = batch_at(cursor, order.n, batch_size)
        seen.append(order.batch(batch))
        assert len(seen[-1]) == len(batch)
        cursor = batch.stop
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(order.n))


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10_000))
def test_shuffled_permutes_any_number(n: int, seed: int, epoch: int) -> None:
    found = Shuffled(n, seed, "what").batch(range(epoch * n, (epoch + 1) * n))
    assert np.array_equal(np.sort(found), np.arange(n))


@pytest.mark.parametrize("kind", KINDS)
def test_500_cuts_go_on_with_the_same_samples(kind: str) -> None:
    rng = np.random.default_rng(0)
    straight = FIXED.order(kind)
    n = straight.n
    at = np.concatenate([straight.batch(range(p, p + 1)) for p in range(3 * n)])
    for _ in range(500):
        batch = batch_at(int(rng.integers(2 * n)), n, int(rng.integers(1, 80)))
        resumed = FIXED.order(kind).batch(batch)
        assert np.array_equal(np.sort(resumed), np.sort(at[batch.start : batch.stop]))
        # Whatever was asked for before.
        assert np.array_equal(straight.batch(batch), resumed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_range_may_pass_the_end_of_an_epoch(kind: str) -> None:
    order = FIXED.order(kind)
    n = order.n
    both = order.batch(range(n - 5, n + 7))
    apart = np.concatenate([order.batch(range(n - 5, n)), order.batch(range(n, n + 7))])
    assert np.array_equal(both, apart)
    assert len(order.batch(range(n, n))) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_order_depends_on_seed_epoch_and_dataset_alone(kind: str) -> None:
    parts = Parts([250] * 4, [0, 0, 1, 2], pieces=8, piece_samples=50)
    n, taken = sum(parts.sizes), range(100)
    first = parts.order(kind, 1, "a").batch(taken)
    assert np.array_equal(first, parts.order(kind, 1, "a").batch(taken))
    for other in (
        parts.order(kind, 2, "a").batch(taken),
        parts.order(kind, 1, "b").batch(taken),
        parts.order(kind, 1, "a").batch(range(n, n + 100)),
    ):
        assert len(set(first.tolist()) & set(other.tolist())) < 30


@pytest.mark.parametrize("kind", ["shuffled", "balanced"])
def test_order_mixes(kind: str) -> None:
    # Rank correlation of a random permutation of 20,000 has a standard deviation of 0.007.
    n = 20_000
    found = Parts([n], [0]).order(kind).batch(range(n))
    assert abs(np.corrcoef(np.arange(n), found)[0, 1]) < 0.035
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.035


def test_small_permutations_are_all_drawn_alike() -> None:
    n, epochs = 5, 3000
    count = np.zeros((n, n))
    for epoch in range(epochs):
        count[np.arange(n), Shuffled(n, 0, "what").batch(range(epoch * n, (epoch + 1) * n))] += 1
    # 16 degrees of freedom: beyond 39 by chance once in a thousand.
    assert ((count - epochs / n) ** 2 / (epochs / n)).sum() < 39


@pytest.mark.parametrize("n", [5_000_000_000, 2**53 + 1, 2**60 + 7])
def test_order_of_billions_needs_no_list(n: int) -> None:
    order = Shuffled(n, 3, "what")
    found = np.concatenate([order.batch(range(0, 2)), order.batch(range(n - 1, n + 1))])
    assert len(set(found.tolist())) == 4
    assert (found >= 0).all()
    assert (found < n).all()


def test_balance_of_billions_needs_no_list() -> None:
    order = Balanced([2_000_000_000, 10, 3_000_000_000], 3, "what")
    found = order.batch(range(4_000_000_000, 4_000_010_000))
    assert len(set(found.tolist())) == 10_000
    assert abs((found < 2_000_000_000).sum() - 4000) <= 2


@given(
    n=st.integers(1, 300),
    batch_size=st.integers(1, 64),
    world=st.integers(1, 9),
    at=st.integers(0, 10**6),
)
def test_batches_resume_anywhere_and_ranks_share_them(
    n: int, batch_size: int, world: int, at: int
) -> None:
    def batches(cursor: int, end: int) -> list[range]:
        found = []
        while cursor < end:
            found.append(batch_at(cursor, n, batch_size))
            cursor = found[-1].stop
        return found

    straight = batches(0, 2 * n)
    assert [p for b in straight for p in b] == list(range(2 * n))
    cursor = straight[at % len(straight)].start
    assert batches(cursor, 2 * n) == straight[at % len(straight) :]
    for batch in straight:
        assert not (batch.start < n < batch.stop)
        shares = [share_of(batch, rank, world) for rank in range(world)]
        assert [p for share in shares for p in share] == list(batch)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=20).filter(any),
    stretch=st.integers(1, 200),
    seed=st.integers(0, 2**32),
)
def test_every_stretch_holds_each_run_in_its_share(
    sizes: list[int], stretch: int, seed: int
) -> None:
    order = Balanced(sizes, seed, "what")
    n, n_groups = order.n, np.count_nonzero(sizes)
    run = np.searchsorted(np.cumsum(sizes), order.batch(range(n)), side="right")
    held = np.cumsum(run[:, None] == np.arange(len(sizes)), axis=0)
    held = np.concatenate([np.zeros((1, len(sizes)), int), held])
    stretch = min(stretch, n)
    found = held[stretch:] - held[:-stretch]
    share = np.array(sizes) / n
    assert (abs(found - stretch * share) <= 1 + share * max(0, n_groups - 2) + 1e-9).all()


def test_alike_runs_come_within_two_of_their_share() -> None:
    n_runs, size, batch = 50, 400, 256
    order = Balanced([size] * n_runs, 0, "what")
    for start in range(0, order.n - batch, batch):
        held = np.bincount(order.batch(range(start, start + batch)) // size, minlength=n_runs)
        assert (abs(held - batch / n_runs) < 2).all()


@given(sizes=st.lists(st.integers(0, 100), max_size=10), piece_samples=st.integers(1, 60))
def test_pieces_cut_every_part_evenly(sizes: list[int], piece_samples: int) -> None:
    first = cut(sizes, piece_samples)
    ends = np.cumsum([0, *sizes])
    assert set(ends) <= set(first)
    for start, stop in pairwise(ends.tolist()):
        lengths = np.diff(first[(first >= start) & (first <= stop)])
        assert lengths.max(initial=0) <= piece_samples
        assert lengths.max(initial=0) - lengths.min(initial=piece_samples) <= 1


def blocks_of(order: Blocks, epoch: int) -> list[tuple[range, Indices]]:
    found = order.blocks(range(epoch * order.n, (epoch + 1) * order.n))
    return [(block.positions, block.pieces_K3) for block in found]


@settings(max_examples=60)
@given(parts=uneven(), balanced=st.booleans(), world=st.integers(1, 6), size=st.integers(1, 50))
def test_a_block_is_its_pieces_and_a_share_touches_few(
    parts: Parts, balanced: bool, world: int, size: int
) -> None:
    order = parts.order("balanced blocks" if balanced else "blocks")
    assert isinstance(order, Blocks)
    starts = np.cumsum([0, *parts.sizes])
    position = 2 * order.n
    for positions, pieces in blocks_of(order, 2):
        assert positions.start == position
        position = positions.stop
        assert 1 <= len(pieces) <= parts.pieces
        assert (pieces[:, 2] - pieces[:, 1] <= parts.piece_samples).all()
        held = [range(starts[p] + first, starts[p] + end) for p, first, end in pieces.tolist()]
        assert sorted(i for piece in held for i in piece) == sorted(order.batch(positions))
        batch = order.batch(positions[:size]).tolist()
        shares = [share_of(range(len(batch)), rank, world) for rank in range(world)]
        touched = [
            sum(any(i in piece for i in batch[share.start : share.stop]) for piece in held)
            for share in shares
        ]
        assert sum(touched) <= len(held) + world - 1
    assert position == 3 * order.n


def test_a_block_is_of_different_shards_and_of_every_run() -> None:
    # 12 runs of 6 shards of 10 pieces; a block of 36 pieces is 3 of each run.
    sizes, runs = [160] * 72, [r for r in range(12) for _ in range(6)]
    order = Blocks(sizes, runs, 0, "what", pieces=36, piece_samples=16)
    for epoch in range(3):
        for _, pieces in blocks_of(order, epoch):
            assert len(set(pieces[:, 0].tolist())) == 36
            of_run = np.bincount(np.array(runs)[pieces[:, 0]], minlength=12)
            assert of_run.min() >= 2
            assert of_run.max() <= 4


def distinct_runs(order: Order, runs: Indices, batch: int) -> float:
    held = [
        len(set(runs[order.batch(range(start, start + batch))].tolist()))
        for start in range(0, order.n - batch + 1, batch)
    ]
    return float(np.mean(held))


@pytest.mark.parametrize(
    ("kind", "at_least"),
    [("shuffled", 0.98), ("balanced", 1.0), ("blocks", 0.93), ("balanced blocks", 0.95)],
)
def test_batches_hold_as_many_runs_as_ideal_mixing(kind: str, at_least: float) -> None:
    # 60 runs of 1 to 8 shards of 100 samples; ideal: samples drawn without replacement.
    rng = np.random.default_rng(1)
    runs = np.repeat(np.arange(60), rng.integers(1, 9, 60))
    parts = Parts([100] * len(runs), runs.tolist(), pieces=90, piece_samples=25)
    n, batch = 100 * len(runs), 128
    of_run = np.bincount(runs) * 100
    missed = np.prod(
        [(n - of_run - i) / (n - i) for i in range(batch)], axis=0
    )  # that none of a batch is of the run
    ideal = float((1 - missed).sum())
    assert distinct_runs(parts.order(kind), np.repeat(runs, 100), batch) >= at_least * ideal
