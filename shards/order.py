"""The order of training: endless epochs of a sample set, each a permutation found by position.

Every order here is a pure function of (seed, epoch, what), where `what` is the fingerprint of the
sample set, so that a run goes on from any position with any number of ranks and readers. None keeps
a list of samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shards.keyed import F64, GOLDEN, keys, mixed, permuted, uniform

Indices = npt.NDArray[np.int64]


def as_indices(given: npt.ArrayLike) -> Indices:
    """Numbers of samples as an array, also where one is given."""
    return np.atleast_1d(np.asarray(given, dtype=np.int64))


class Order(Protocol):
    """An endless sequence of epochs of `n` samples, each sample once an epoch."""

    @property
    def n(self) -> int: ...

    def batch(self, positions: range) -> Indices:
        """The samples (0 … n - 1) at consecutive positions, in the order of a batch's rows.

        Positions are counted from the start of epoch 0. Rows of a batch need not follow its
        positions, but which samples are in it does.
        """
        ...


def batch_at(cursor: int, n: int, batch_size: int) -> range:
    """Positions of the batch that starts at `cursor`; it ends at the epoch's end at the latest.

    No batch straddles two epochs, so the last one of an epoch may be short, and every sample is
    in exactly one batch an epoch.
    """
    return range(cursor, min(cursor + batch_size, (cursor // n + 1) * n))


def share_of(batch: range, rank: int, world: int) -> range:
    """The contiguous share of a batch that `rank` of `world` reads; sizes differ by one at most."""
    return batch[len(batch) * rank // world : len(batch) * (rank + 1) // world]


@dataclass(frozen=True, slots=True)
class Shuffled:
    """A shuffled order of `n` samples for every epoch, found position by position.

    Each epoch is a permutation keyed by (seed, epoch, what), in constant time and memory.
    """

    n: int
    seed: int
    what: str

    def batch(self, positions: range) -> Indices:
        """The samples at `positions`, in their order."""
        return np.concatenate(
            [np.empty(0, np.int64), *(self._of_epoch(*p) for p in _by_epoch(positions, self.n))]
        )

    def _of_epoch(self, epoch: int, within: range) -> Indices:
        return permuted(
            np.arange(within.start, within.stop, dtype=np.uint64),
            np.array([self.n], dtype=np.uint64),
            keys(self.seed, epoch, self.what)[:, None],
        )


class Balanced:
    """A shuffled order in which every stretch of an epoch holds each group in its share.

    Groups (runs) of the given sizes lie one after the other in the index. In each epoch the
    elements of a group, shuffled, come at even times (j + u) / size with one u in (0, 1) drawn for
    the group; the epoch goes by time. With R groups, m consecutive samples of an epoch hold
    m·f ± (1 + f·(R - 2)) of a group whose share of all samples is f: ± 2 where groups are alike.
    """

    def __init__(self, sizes: Sequence[int] | Indices, seed: int, what: str) -> None:
        all_sizes = np.asarray(sizes, dtype=np.int64)
        starts = np.cumsum(all_sizes) - all_sizes
        self.n = int(all_sizes.sum())
        self.seed = seed
        self.what = what
        self._sizes = all_sizes[all_sizes > 0]
        self._starts = starts[all_sizes > 0]

    def batch(self, positions: range) -> Indices:
        """The samples at `positions`, in their order."""
        return np.concatenate(
            [np.empty(0, np.int64), *(self._of_epoch(*p) for p in _by_epoch(positions, self.n))]
        )

    def _of_epoch(self, epoch: int, within: range) -> Indices:
        key = keys(self.seed, epoch, self.what)
        n_groups = len(self._sizes)
        phase = uniform(key[0], np.arange(n_groups))
        # Before a time t come t·n elements, give or take one a group. So what is wanted lies
        # between these times, with no search; the sort below is of no more than 4 R further ones.
        first = self._n_before((within.start - n_groups - 1) / self.n, phase)
        last = self._n_before((within.stop + n_groups + 1) / self.n, phase)
        count = last - first
        group = np.repeat(np.arange(n_groups), count)
        j = np.arange(len(group)) + np.repeat(first - (np.cumsum(count) - count), count)
        by_time = np.argsort((j + phase[group]) / self._sizes[group], kind="stable")
        skipped = int(first.sum())
        taken = by_time[within.start - skipped : within.stop - skipped]
        group, j = group[taken], j[taken]
        of_group = permuted(
            j.astype(np.uint64),
            self._sizes[group].astype(np.uint64),
            mixed(key[:, None] + group.astype(np.uint64) * GOLDEN),
        )
        found: Indices = self._starts[group] + of_group
        return found

    def _n_before(self, time: float, phase: F64) -> Indices:
        """How many elements of each group come before `time`, exactly as their times are told."""
        sizes = self._sizes
        j = np.clip(np.ceil(time * sizes - phase).astype(np.int64), 0, sizes)
        while (late := (j > 0) & ((j - 1 + phase) / sizes >= time)).any():
            j = j - late
        while (early := (j < sizes) & ((j + phase) / sizes < time)).any():
            j = j + early
        return j


@dataclass(frozen=True, slots=True)
class Block:
    """Pieces that are mixed with each other: `pieces_K3` is (part, first row, end row) of each."""

    positions: range
    pieces_K3: Indices


@dataclass(frozen=True, slots=True)
class _Layout:
    """One epoch's blocks: block b is pieces[bounds[b]:bounds[b + 1]], from position starts[b]."""

    pieces: Indices
    bounds: Indices
    starts: Indices


class Blocks:
    """An order for reading pieces of shards whole: only one block of them is in use at a time.

    Each part (consecutive samples of one shard, of `sizes`, belonging to `runs`) is cut into pieces
    (`cut`). In every epoch the pieces of a part are shuffled and spread over their run, those of a
    run over the epoch; up to `pieces` consecutive ones are a block, so that it holds each run in
    its share and different parts where there are enough. Inside a block the order is `Shuffled`, or
    `Balanced` over runs. The rows of a batch go by place in the block, so that a contiguous share
    of them touches few pieces.
    """

    def __init__(
        self,
        sizes: Sequence[int] | Indices,
        runs: Sequence[int] | Indices,
        seed: int,
        what: str,
        *,
        pieces: int,
        piece_samples: int,
        balanced: bool = False,
    ) -> None:
        self.n = int(np.sum(sizes))
        self.seed = seed
        self.what = what
        self.balanced = balanced
        self._first = cut(sizes, piece_samples)
        part_starts = np.cumsum(sizes) - np.asarray(sizes)
        self._part = np.searchsorted(part_starts, self._first[:-1], side="right") - 1
        self._part_starts = part_starts
        self._run = np.asarray(runs, dtype=np.int64)[self._part]
        self._n_blocks = -(-len(self._part) // pieces)
        self._layouts: dict[int, _Layout] = {}

    def batch(self, positions: range) -> Indices:
        """The samples at `positions`, by block, and in a block by piece."""
        found = [np.empty(0, np.int64)]
        for epoch, within in _by_epoch(positions, self.n):
            layout = self._layout(epoch)
            for block in self._blocks_at(layout, within):
                start, stop = int(layout.starts[block]), int(layout.starts[block + 1])
                here = range(max(within.start, start) - start, min(within.stop, stop) - start)
                found.append(self._of_block(layout, epoch, block, here))
        return np.concatenate(found)

    def blocks(self, positions: range) -> list[Block]:
        """The blocks that hold `positions`, in order, with the pieces of each in order of place."""
        found = []
        for epoch, within in _by_epoch(positions, self.n):
            layout = self._layout(epoch)
            for block in self._blocks_at(layout, within):
                pieces = layout.pieces[layout.bounds[block] : layout.bounds[block + 1]]
                part = self._part[pieces]
                rows = [self._first[pieces + end] - self._part_starts[part] for end in (0, 1)]
                start, stop = (epoch * self.n + int(s) for s in layout.starts[block : block + 2])
                found.append(Block(range(start, stop), np.stack([part, *rows], axis=1)))
        return found

    @staticmethod
    def _blocks_at(layout: _Layout, within: range) -> range:
        first, last = np.searchsorted(layout.starts, [within.start, within.stop - 1], side="right")
        return range(int(first) - 1, int(last))

    def _of_block(self, layout: _Layout, epoch: int, block: int, within: range) -> Indices:
        pieces = layout.pieces[layout.bounds[block] : layout.bounds[block + 1]]
        sizes = self._first[pieces + 1] - self._first[pieces]
        ends = np.cumsum(sizes)
        what = f"{self.what}/block {block}"
        order: Order
        if self.balanced:
            _, first_of_run = np.unique(self._run[pieces], return_index=True)
            order = Balanced(np.add.reduceat(sizes, first_of_run), self.seed, what)
        else:
            order = Shuffled(int(ends[-1]), self.seed, what)
        start = epoch * order.n
        places = np.sort(order.batch(range(start + within.start, start + within.stop)))
        k = np.searchsorted(ends, places, side="right")
        found: Indices = self._first[pieces[k]] + places - (ends - sizes)[k]
        return found

    def _layout(self, epoch: int) -> _Layout:
        if (layout := self._layouts.get(epoch)) is None:
            layout = self._laid_out(epoch)
            # Reading ahead crosses into the next epoch while this one is still asked for.
            self._layouts = {e: v for e, v in self._layouts.items() if e == epoch - 1}
            self._layouts[epoch] = layout
        return layout

    def _laid_out(self, epoch: int) -> _Layout:
        key = keys(self.seed, epoch, f"{self.what}/pieces")
        n_pieces = len(self._part)
        time = _spread(self._part, uniform(key[0], np.arange(n_pieces)), key[1])
        time = _spread(self._run, time, key[2])
        pieces = np.argsort(time, kind="stable")
        bounds = np.arange(self._n_blocks + 1) * n_pieces // self._n_blocks
        block = np.repeat(np.arange(self._n_blocks), np.diff(bounds))
        # By run inside a block, as Balanced wants them.
        pieces = pieces[np.lexsort((pieces, self._run[pieces], block))]
        sizes = self._first[pieces + 1] - self._first[pieces]
        starts = np.concatenate([[0], np.cumsum(sizes)])[bounds]
        return _Layout(pieces, bounds, starts)


def cut(sizes: Sequence[int] | Indices, piece_samples: int) -> Indices:
    """First index of each piece, and the end: parts cut as evenly as can be, none above the size.

    Parts lie one after the other in the index, and no piece is of two.
    """
    n = np.asarray(sizes, dtype=np.int64)
    count = -(-n // piece_samples)
    part = np.repeat(np.arange(len(n)), count)
    number = np.arange(len(part)) - np.repeat(np.cumsum(count) - count, count)
    first = (np.cumsum(n) - n)[part] + n[part] * number // count[part]
    return np.append(first, n.sum())


def _spread(group: Indices, by: F64, key: np.uint64) -> F64:
    """Even times in (0, 1) for the members of each group, in order of `by`, from a drawn start."""
    in_order = np.lexsort((by, group))
    count = np.bincount(group)
    rank = np.empty(len(group), np.int64)
    rank[in_order] = np.arange(len(group)) - np.repeat(np.cumsum(count) - count, count)
    time: F64 = (rank + uniform(key, np.arange(len(count)))[group]) / count[group]
    return time


def _by_epoch(positions: range, n: int) -> Iterator[tuple[int, range]]:
    start = positions.start
    while start < positions.stop:
        epoch = start // n
        stop = min(positions.stop, (epoch + 1) * n)
        yield epoch, range(start - epoch * n, stop - epoch * n)
        start = stop
