"""A stream as batches for a model: checked against its vocabulary, read ahead, cut into steps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from shards.errors import BadInput
from shards.order import Indices, Order
from shards.stream import Stream
from shards.vocabulary import Vocabulary
from trainer.ahead import ReadAhead, Wanted, pinned
from trainer.batch import Batch, GenePlaces, no_faults
from trainer.config import DataLoadingConfig
from trainer.crew import Crew, Hands, OwnHands
from trainer.plain import plain_batches
from trainer.ring import Filler, Layout, Ring
from trainer.steps import Planned, planned_steps
from trainer.worker import Job


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank reads for one step of the optimiser.

    The batches hold this rank's share of the global batch at `positions`, padding with weight 0
    among it, and are valid until the next step is asked for. `waited_s`: how long they were
    waited for.
    """

    positions: range
    chunks: list[Batch]
    waited_s: float


class Loader:
    """Batches of a stream against a vocabulary. Every sample must have counts.

    `neighbors_k` is how many neighbours' counts are read, 0 for none. `places` tells for
    each panel of the stream where its genes are in the vocabulary, `measured_PG` which of the
    vocabulary it measures. Raises BadInput where patches differ in size or field of view, or no
    gene is known.
    """

    def __init__(
        self,
        stream: Stream,
        vocabulary: Vocabulary,
        *,
        neighbors_k: int = 0,
    ) -> None:
        self.stream = stream
        self.vocabulary = vocabulary
        self.neighbors_k = neighbors_k
        self.places = GenePlaces.of(vocabulary, stream.panels)
        self.measured_PG = self.places.measured_PG
        patches = {s.manifest.patch for s in stream.shards}
        shapes = sorted({(p.image, p.size_px, p.fov_um) for p in patches})
        if len(shapes) != 1:
            raise BadInput(
                ", ".join(sorted({s.manifest.run for s in stream.shards})) or "the dataset",
                expected="patches of one kind, size and field of view",
                found="; ".join(f"{kind}, {px} px of {um} µm" for kind, px, um in shapes)
                or "no samples",
                remedy="curate the runs with one [patch], and a split that is not empty",
            )
        self.image, self.size_px, self.fov_um = shapes[0]

    def shown_um(self, fov_um: float | Literal["patch"]) -> float:
        """The field of view in µm that a model asking for `fov_um` sees.

        Raises BadInput where the patches are smaller.
        """
        if fov_um == "patch":
            return self.fov_um
        if fov_um > self.fov_um:
            raise BadInput(
                "model.fov_um",
                expected=f"no more than the patches show, {self.fov_um} µm",
                found=f"{fov_um} µm",
                remedy="lower it for a new model, or curate with a larger patch.fov_um",
            )
        return fov_um

    def read(self, indices: Indices) -> Batch:
        """The samples at `indices` of the stream, in memory of its own.

        Raises BadInput with the first sample that cannot be read.
        """
        return no_faults(self.read_sound(indices))

    def read_sound(self, indices: Indices) -> Batch:
        """As `read`, but samples that cannot be read are faults of the batch, of weight 0."""
        with _read_ahead(self._job(len(indices), 1), iter([(indices, 0)]), 0) as ahead:
            return ahead.take()

    def once(self, batch_size: int, workers: int = 0) -> Iterator[Batch]:
        """Every sample once, by index; a batch is valid until the next is asked for.

        Raises BadInput with the first sample that cannot be read.
        """
        n = len(self.stream)
        starts = range(0, n, batch_size)
        wanted = ((np.arange(s, min(s + batch_size, n)), i) for i, s in enumerate(starts))
        job = self._job(min(batch_size, n), 2 * workers + 1)
        with _read_ahead(job, wanted, workers) as ahead:
            for _ in starts:
                yield no_faults(ahead.take())
                ahead.give_back()

    def training(
        self, order: Order, cursor: int, config: DataLoadingConfig, rank: int = 0, size: int = 1
    ) -> Generator[Step, None, None]:
        """Endless steps of `rank` of `size` from `cursor` on, read ahead by `config.workers`.

        The global batch of a step depends on `order`, `cursor` and `config.batch_size` alone.
        Samples that cannot be read are faults of their batch.
        """
        if config.loader == "torch":
            return self._plain_steps(order, cursor, config, rank, size)
        return self._ring_steps(order, cursor, config, rank, size)

    def _ring_steps(
        self, order: Order, cursor: int, config: DataLoadingConfig, rank: int, size: int
    ) -> Generator[Step, None, None]:
        plan, read = itertools.tee(_plan(order, cursor, config, rank, size))
        share = -(-config.batch_size // size)
        rows = min(config.micro_batch or share, share)
        n_chunks = -(-share // rows)
        # A whole step ahead of the one in use, and for each worker what it has in hand.
        n_slots = 2 * (n_chunks + config.workers) if config.workers else n_chunks
        wanted = _with_lanes((step.chunks for step in plan), config)
        job = replace(
            self._job(rows, n_slots),
            reading=config.reading,
            piece_samples=config.block.piece_samples,
            cache_bytes=config.cache_bytes,
        )
        with _read_ahead(job, wanted, config.workers) as ahead:
            for step in read:
                started_s = time.monotonic()
                batches = [ahead.take() for _ in step.chunks]
                yield Step(step.positions, batches, time.monotonic() - started_s)
                ahead.give_back()

    def _plain_steps(
        self, order: Order, cursor: int, config: DataLoadingConfig, rank: int, size: int
    ) -> Generator[Step, None, None]:
        plan, read = itertools.tee(_plan(order, cursor, config, rank, size))
        chunks = (chunk for step in plan for chunk in step.chunks)
        batches = plain_batches(self.stream, self._job(1, 0).layout, chunks, config.workers)
        for step in read:
            started_s = time.monotonic()
            found = [next(batches) for _ in step.chunks]
            yield Step(step.positions, found, time.monotonic() - started_s)

    def _job(self, rows: int, n_slots: int) -> Job:
        genes = max(len(panel.genes) for panel in self.stream.panels)
        layout = Layout(rows=rows, size_px=self.size_px, genes=genes, neighbors=self.neighbors_k)
        return Job(self.stream, layout, n_slots)


def _plan(
    order: Order, cursor: int, config: DataLoadingConfig, rank: int, size: int
) -> Iterator[Planned]:
    return planned_steps(order, cursor, config.batch_size, config.micro_batch, rank, size)


def _with_lanes(
    steps: Iterator[tuple[Indices, ...]], config: DataLoadingConfig
) -> Iterator[Wanted]:
    turn = itertools.count()
    for chunks in steps:
        for j, chunk in enumerate(chunks):
            # Chunks that lie side by side in a block share pieces: one worker caches them.
            together = config.reading == "block" and len(chunks) >= config.workers
            yield chunk, j * config.workers // len(chunks) if together else next(turn)


@contextmanager
def _read_ahead(job: Job, wanted: Iterator[Wanted], workers: int) -> Iterator[ReadAhead]:
    ring = Ring(job.layout, job.n_slots)
    with ExitStack() as stack:
        stack.callback(ring.close_file)
        stack.enter_context(pinned(ring))
        hands: Hands
        if workers:
            hands = stack.enter_context(closing(Crew(ring, job, workers)))
        else:
            reader = stack.enter_context(job.reader())
            hands = OwnHands(ring, Filler(job.stream, reader, job.layout))
        yield ReadAhead(ring, hands, wanted)
