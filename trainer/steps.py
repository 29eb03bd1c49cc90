"""Which samples each rank reads in each step: a pure function of the order and the cursor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shards.order import Indices, Order, batch_at, share_of


@dataclass(frozen=True, slots=True)
class Planned:
    """A step of one rank: positions of the global batch, and the rank's samples in chunks."""

    positions: range
    chunks: tuple[Indices, ...]


def planned_steps(
    order: Order, cursor: int, batch_size: int, micro_batch: int | None, rank: int, size: int
) -> Iterator[Planned]:
    """Endless steps of `rank` of `size` from `cursor` on.

    Every rank gets its share of the global batch, padded with -1 to the largest share, in chunks
    of `micro_batch` rows of which the last may be shorter: the same shapes on all ranks.
    """
    while True:
        positions = batch_at(cursor, order.n, batch_size)
        mine = share_of(positions, rank, size)
        indices = order.batch(positions)[mine.start - cursor : mine.stop - cursor]
        n_rows = -(-len(positions) // size)
        padded = np.full(n_rows, -1, dtype=np.int64)
        padded[: len(indices)] = indices
        chunk = micro_batch or n_rows
        yield Planned(
            positions, tuple(padded[start : start + chunk] for start in range(0, n_rows, chunk))
        )
        cursor = positions.stop
