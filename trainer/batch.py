"""A batch as it travels and as the device sees it: pixels as bytes, counts sparse until there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from shards.errors import BadInput
from shards.order import Indices
from shards.schema import Panel
from shards.vocabulary import Vocabulary
from trainer.ring import RowFault, Slot, Sparse


@dataclass(frozen=True, slots=True)
class Fault:
    """A sample that could not be read; its row of the batch has weight 0."""

    index: int
    error: BadInput

    @property
    def message(self) -> str:
        return str(self.error)


@dataclass(frozen=True, slots=True)
class Neighbors:
    """Non-zero counts of the cells around: row of the batch, which neighbour, gene, raw count."""

    row_M: torch.Tensor
    ordinal_M: torch.Tensor  # 0 is the nearest
    gene_M: torch.Tensor  # place in the panel
    count_M: torch.Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples, augmented not yet, counts still sparse: row of the batch, gene, raw count.

    As read, tensors are narrow unsigned integers in memory that the loader writes again once the
    next step is asked for. `to` copies them to a device and makes int64 and float32 of them there.
    """

    index_B: Indices  # of the stream; -1 is padding
    image_BHWC: torch.Tensor  # uint8
    row_N: torch.Tensor
    gene_N: torch.Tensor  # place in the panel of the row
    count_N: torch.Tensor
    panel_B: torch.Tensor  # int64, into Stream.panels
    weight_B: torch.Tensor  # float32: 1, and 0 for padding and samples at fault
    neighbors: Neighbors | None = None
    faults: tuple[Fault, ...] = ()
    # Events after the copies off this memory: the loader writes there again only after them.
    copied: list[torch.cuda.Event] = field(default_factory=list, compare=False, repr=False)

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, in types to compute with.

        From a ring that CUDA knows the copies are asynchronous, in the order of the current stream.
        """
        near = self.neighbors
        moved = replace(
            self,
            image_BHWC=self.image_BHWC.to(device, non_blocking=True),
            row_N=_moved(self.row_N, device, torch.int64),
            gene_N=_moved(self.gene_N, device, torch.int64),
            count_N=_moved(self.count_N, device, torch.float32),
            panel_B=_moved(self.panel_B, device, torch.int64),
            weight_B=_moved(self.weight_B, device, torch.float32),
            neighbors=near
            and Neighbors(
                row_M=_moved(near.row_M, device, torch.int64),
                ordinal_M=_moved(near.ordinal_M, device, torch.int64),
                gene_M=_moved(near.gene_M, device, torch.int64),
                count_M=_moved(near.count_M, device, torch.float32),
            ),
            copied=[],
        )
        if device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            event.record()
            self.copied.append(event)
        return moved


def _moved(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    # Two steps, or the host would widen before it copies.
    return tensor.to(device, non_blocking=True).to(dtype)


def batch_of(slot: Slot, faults: Sequence[RowFault]) -> Batch:
    """Views on the memory of a filled slot."""
    n = slot.n_rows
    index_B = slot.index[:n].copy()
    counts, near = slot.counts, slot.neighbors
    return Batch(
        index_B=index_B,
        image_BHWC=torch.from_numpy(slot.image[:n]),
        row_N=torch.from_numpy(counts.row),
        gene_N=torch.from_numpy(counts.values[0]),
        count_N=torch.from_numpy(counts.values[1]),
        panel_B=torch.from_numpy(slot.panel[:n]),
        weight_B=torch.from_numpy(slot.weight[:n]),
        neighbors=neighbors_of(near) if slot.layout.neighbors > 0 else None,
        faults=tuple(Fault(int(index_B[row]), error) for row, error in faults),
    )


def neighbors_of(near: Sparse) -> Neighbors:
    ordinal, gene, count = (torch.from_numpy(line) for line in near.values)
    return Neighbors(torch.from_numpy(near.row), ordinal, gene, count)


@dataclass(frozen=True, slots=True)
class GenePlaces:
    """For each panel of a stream: where its genes are in a vocabulary, and which it measures."""

    places_PG: torch.Tensor  # int64, by place in the panel; -1 is no gene of the vocabulary
    measured_PG: torch.Tensor  # bool, by place in the vocabulary
    species_P: torch.Tensor  # int64, into Vocabulary.species

    @classmethod
    def of(cls, vocabulary: Vocabulary, panels: Sequence[Panel]) -> GenePlaces:
        """Raises BadInput on a panel of which the vocabulary has no gene."""
        widest = max((len(panel.genes) for panel in panels), default=0)
        places_PG = torch.full((len(panels), widest), -1)
        measured_PG = torch.zeros(len(panels), len(vocabulary.genes), dtype=torch.bool)
        for p, panel in enumerate(panels):
            places, _ = vocabulary.places(panel)
            if not (places >= 0).any():
                raise BadInput(
                    f"panel {panel.panel_id}",
                    expected="genes that the model knows",
                    found=f"none of its {len(places)}",
                    remedy="use a model trained on this species and panel",
                )
            places_PG[p, : len(places)] = torch.from_numpy(places)
            measured_PG[p, torch.from_numpy(places[places >= 0])] = True
        # A panel with a gene of the vocabulary is of a species that it knows.
        species_P = torch.tensor([vocabulary.species.index(p.species) for p in panels])
        return cls(places_PG, measured_PG, species_P)

    def to(self, device: torch.device) -> GenePlaces:
        return GenePlaces(
            self.places_PG.to(device), self.measured_PG.to(device), self.species_P.to(device)
        )


def dense_counts(batch: Batch, places: GenePlaces, n_genes: int) -> torch.Tensor:
    """(B, G) raw counts by vocabulary, float32, on the device of `batch.to(device)`.

    Genes that are none of the vocabulary's are dropped; those that mean the same gene add up.
    """
    # One column more than genes takes what is dropped: -1 is the last. A mask would make the
    # host wait for the device.
    counts_BG = batch.count_N.new_zeros(len(batch.weight_B), n_genes + 1)
    place_N = places.places_PG[batch.panel_B[batch.row_N], batch.gene_N]
    counts_BG.index_put_((batch.row_N, place_N), batch.count_N, accumulate=True)
    return counts_BG[:, :n_genes]


def dense_neighbors(
    batch: Batch, places: GenePlaces, n_genes: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, K, G) raw counts of the first `k` neighbours as `dense_counts`, and (B, K) which exist.

    A neighbour without any count is as one that is not there. Raises ValueError on a batch that
    was read without neighbours.
    """
    if batch.neighbors is None:
        raise ValueError("the batch was read without neighbours")
    near = batch.neighbors
    # One neighbour more takes those beyond k.
    ordinal_M = near.ordinal_M.clamp_max(k)
    counts_BKG = near.count_M.new_zeros(len(batch.weight_B), k + 1, n_genes + 1)
    place_M = places.places_PG[batch.panel_B[near.row_M], near.gene_M]
    counts_BKG.index_put_((near.row_M, ordinal_M, place_M), near.count_M, accumulate=True)
    present_BK = torch.zeros(counts_BKG.shape[:2], dtype=torch.bool, device=counts_BKG.device)
    present_BK[near.row_M, ordinal_M] = True
    return counts_BKG[:, :k, :n_genes], present_BK[:, :k]


def no_faults(batch: Batch) -> Batch:
    """The batch, where all of its samples could be read. Raises BadInput with the first fault."""
    if batch.faults:
        raise batch.faults[0].error
    return batch
