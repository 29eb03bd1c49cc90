"""Samples to batches: the union of gene panels, decoding ahead, what reaches the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
import torch

from shards.errors import BadInput
from shards.schema import Panel, Record
from shards.stream import Indices, Order, Stream, batch_at


class VocabularyGene(Record):
    """One gene of the union of panels."""

    species: str
    symbol: str
    ensembl: str | None


class Vocabulary(Record):
    """The genes that a model knows, in the order of its input; a checkpoint keeps it."""

    genes: tuple[VocabularyGene, ...]

    @classmethod
    def union(cls, panels: Sequence[Panel]) -> Vocabulary:
        """Every gene of the panels once, in the order in which they first name it.

        Genes are the same if their Ensembl ids are, or, where one has none, species and symbol.
        """
        genes: list[VocabularyGene] = []
        for panel in panels:
            index, _ = _matched(genes, panel)
            for gene, found in zip(panel.genes, index, strict=True):
                if found < 0:
                    genes.append(
                        VocabularyGene(
                            species=panel.species, symbol=gene.symbol, ensembl=gene.ensembl
                        )
                    )
        return cls(genes=tuple(genes))

    def places(self, panel: Panel) -> tuple[Indices, list[str]]:
        """For each gene of the panel its place here, -1 if unknown; and the unknown symbols."""
        return _matched(self.genes, panel)


def _matched(genes: Sequence[VocabularyGene], panel: Panel) -> tuple[Indices, list[str]]:
    by_ensembl = {(g.species, g.ensembl): i for i, g in enumerate(genes) if g.ensembl}
    by_symbol = {(g.species, g.symbol): i for i, g in enumerate(genes)}
    index = np.full(len(panel.genes), -1, dtype=np.int64)
    unknown = []
    for i, gene in enumerate(panel.genes):
        place = by_ensembl.get((panel.species, gene.ensembl), -1) if gene.ensembl else -1
        same_symbol = by_symbol.get((panel.species, gene.symbol), -1)
        if place < 0 <= same_symbol and not (gene.ensembl and genes[same_symbol].ensembl):
            place = same_symbol
        index[i] = place
        if place < 0:
            unknown.append(gene.symbol)
    return index, unknown


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples as they reach the device: encoded no more, augmented not yet, counts still sparse.

    `row_N`, `gene_N` and `count_N` are the non-zero counts: row of the batch, place in the
    vocabulary, raw count. `weight_B` is 1 for samples and 0 for padding.
    """

    index_B: Indices
    image_BHWC: torch.Tensor  # uint8
    row_N: torch.Tensor  # int64
    gene_N: torch.Tensor  # int64
    count_N: torch.Tensor  # float32
    panel_B: torch.Tensor  # int64, into Loader.measured_PG
    weight_B: torch.Tensor  # float32

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.index_B,
            self.image_BHWC.to(device, non_blocking=True),
            self.row_N.to(device, non_blocking=True),
            self.gene_N.to(device, non_blocking=True),
            self.count_N.to(device, non_blocking=True),
            self.panel_B.to(device, non_blocking=True),
            self.weight_B.to(device, non_blocking=True),
        )


def dense_counts(batch: Batch, n_genes: int) -> torch.Tensor:
    """(B, G) raw counts; genes of a panel that mean the same gene of the vocabulary add up."""
    counts_BG = batch.count_N.new_zeros(len(batch.weight_B), n_genes)
    return counts_BG.index_put_((batch.row_N, batch.gene_N), batch.count_N, accumulate=True)


def expression(counts_BG: torch.Tensor) -> torch.Tensor:
    """log1p of counts per 10,000 of the cell; 0 for a cell without counts."""
    total_B1 = counts_BG.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.log1p(counts_BG * (10_000 / total_B1))


class Loader:
    """Batches of a stream against a vocabulary. Every sample must have counts.

    `measured_PG` tells for each panel of the stream which genes of the vocabulary it measures.
    Raises BadInput where patches differ in size or field of view, or no gene is known.
    """

    def __init__(self, stream: Stream, vocabulary: Vocabulary) -> None:
        self.stream = stream
        self.vocabulary = vocabulary
        self._places = [vocabulary.places(panel)[0] for panel in stream.panels]
        self.measured_PG = torch.zeros(len(stream.panels), len(vocabulary.genes), dtype=torch.bool)
        for p, places in enumerate(self._places):
            if not (places >= 0).any():
                raise BadInput(
                    f"panel {stream.panels[p].panel_id}",
                    expected="genes that the model knows",
                    found=f"none of its {len(places)}",
                    remedy="use a model trained on this species and panel",
                )
            self.measured_PG[p, torch.from_numpy(places[places >= 0])] = True
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
        """The samples at `indices` of the stream, decoded."""
        pairs = self.stream.read(indices)
        image = np.empty((len(pairs), self.size_px, self.size_px, 3), dtype=np.uint8)
        rows, genes, counts = [], [], []
        for i, pair in enumerate(pairs):
            try:
                simplejpeg.decode_jpeg(pair.jpeg, colorspace="RGB", buffer=image[i])
            except ValueError as error:
                raise self.stream.fault(
                    int(indices[i]), expected="a JPEG", found=str(error)
                ) from error
            if pair.counts is None:
                raise self.stream.fault(
                    int(indices[i]), expected="counts", found="a sample without them"
                )
            places = self._places[pair.panel][pair.counts[0]]
            known = places >= 0
            genes.append(places[known])
            counts.append(pair.counts[1][known].astype(np.float32))
            rows.append(np.full(len(genes[-1]), i, dtype=np.int64))
        return Batch(
            index_B=indices,
            image_BHWC=torch.from_numpy(image),
            row_N=torch.from_numpy(np.concatenate(rows)),
            gene_N=torch.from_numpy(np.concatenate(genes)),
            count_N=torch.from_numpy(np.concatenate(counts)),
            panel_B=torch.tensor([pair.panel for pair in pairs]),
            weight_B=torch.ones(len(pairs)),
        )

    def training(self, order: Order, cursor: int, batch_size: int, threads: int) -> Iterator[Batch]:
        """Endless batches from `cursor` on, read and decoded ahead by `threads`, in order."""
        positions = _training_positions(order.n, cursor, batch_size)
        return self._ahead((order.indices(p) for p in positions), threads)

    def once(self, batch_size: int) -> Iterator[Batch]:
        """Every sample once, by index."""
        n = len(self.stream)
        starts = range(0, n, batch_size)
        return self._ahead((np.arange(s, min(s + batch_size, n)) for s in starts), 1)

    def _ahead(self, wanted: Iterator[Indices], threads: int) -> Iterator[Batch]:
        # simplejpeg and pread release the interpreter's lock, so threads decode in parallel.
        with ThreadPoolExecutor(threads, thread_name_prefix="read-ahead") as pool:
            pending: deque[Future[Batch]] = deque()
            try:
                for indices in wanted:
                    pending.append(pool.submit(self.read, indices))
                    if len(pending) > 2 * threads:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _training_positions(n: int, cursor: int, batch_size: int) -> Iterator[range]:
    while True:
        batch = batch_at(cursor, n, batch_size)
        yield batch
        cursor = batch.stop
