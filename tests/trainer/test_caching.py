"""Gradients in chunks are the gradients of one pass."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from tests.trainer.ranks import KINDS, Kind, loss_config
from trainer.caching import Embedded, Passed, backward_in_chunks
from trainer.distributed import World
from trainer.loss import PairLoss

ALONE = World(torch.device("cpu"))
Gradients = dict[str, torch.Tensor]


class Towers(nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.4), nn.Linear(8, 4))
        self.gene = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Dropout(0.4), nn.Linear(8, 4))
        self.loss = PairLoss(loss_config(kind))


class Batch:
    """Rows, of which some are padding, and what embeds them in chunks of `sizes`."""

    def __init__(self, kind: Kind, sizes: list[int], *, half: bool = False) -> None:
        torch.manual_seed(0)
        self.towers = Towers(kind)
        n = sum(sizes)
        self.image_BF, self.counts_BG = torch.randn(n, 6), torch.randn(n, 5)
        self.weight_B, self.sample_B = (torch.rand(n) < 0.8).float(), torch.arange(n) % 7
        self.chunks = torch.arange(n).split(sizes)
        self.half = half
        self.calls = 0

    def embed(self, i: int, *, adds: bool = True) -> Embedded:
        self.calls += 1
        torch.manual_seed(100 + i)
        c = self.chunks[i]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            z_image_BD = self.towers.image(self.image_BF[c])
            z_gene_BD = self.towers.gene(self.counts_BG[c])
        added = 0.3 * (z_image_BD.float().square().sum(dim=1) @ self.weight_B[c]) if adds else None
        return Embedded(
            functional.normalize(z_image_BD.float(), dim=1),
            functional.normalize(z_gene_BD.float(), dim=1),
            added,
        )

    def loss(self, z_image_BD: torch.Tensor, z_gene_BD: torch.Tensor) -> torch.Tensor:
        part: torch.Tensor = self.towers.loss(
            z_image_BD, z_gene_BD, self.weight_B, self.sample_B, ALONE
        )
        return part

    def directly(self, *, adds: bool = True) -> tuple[Passed, Gradients]:
        """With every chunk's graph held until one backward pass."""
        chunks = [self.embed(i, adds=adds) for i in range(len(self.chunks))]
        z_image_BD = torch.cat([c.z_image_BD for c in chunks])
        z_gene_BD = torch.cat([c.z_gene_BD for c in chunks])
        part = self.loss(z_image_BD, z_gene_BD)
        added = sum((c.added for c in chunks if c.added is not None), torch.zeros(()))
        (part + added).backward()  # type: ignore[no-untyped-call]
        return Passed(part, added, z_image_BD, z_gene_BD), self.gradients()

    def gradients(self) -> Gradients:
        return {n: p.grad for n, p in self.towers.named_parameters() if p.grad is not None}


def assert_same(found: tuple[Passed, Gradients], want: tuple[Passed, Gradients]) -> None:
    for name in ("loss", "added", "z_image_BD", "z_gene_BD"):
        value = getattr(found[0], name)
        torch.testing.assert_close(value, getattr(want[0], name).detach(), rtol=1e-6, atol=1e-6)
        assert not value.requires_grad
    assert found[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-6, msg=name)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    adds=st.booleans(),
)
def test_chunks_equal_one_pass_with_the_same_dropout(
    kind: Kind, sizes: list[int], adds: bool
) -> None:
    batch = Batch(kind, sizes)
    passed = backward_in_chunks(len(sizes), lambda i: batch.embed(i, adds=adds), batch.loss)
    assert batch.calls == (1 if len(sizes) == 1 else 2 * len(sizes))
    assert_same((passed, batch.gradients()), Batch(kind, sizes).directly(adds=adds))


@pytest.mark.parametrize("n_chunks", [1, 3])
def test_autocast_and_a_scaler(n_chunks: int) -> None:
    sizes = [12 // n_chunks] * n_chunks
    batch = Batch("info_nce", sizes, half=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(batch.towers.parameters(), lr=0.1)
    passed = backward_in_chunks(n_chunks, batch.embed, batch.loss, scaler.scale)
    scaler.unscale_(optimizer)
    assert_same((passed, batch.gradients()), Batch("info_nce", sizes, half=True).directly())


def test_only_one_chunk_has_a_graph_at_a_time() -> None:
    batch = Batch("info_nce", [3] * 4)
    graphs: list[weakref.ref[torch.Tensor]] = []

    def embed(i: int) -> Embedded:
        assert all(graph() is None for graph in graphs)
        embedded = batch.embed(i)
        if embedded.z_image_BD.requires_grad:
            graphs.append(weakref.ref(embedded.z_image_BD))
        return embedded

    backward_in_chunks(4, embed, batch.loss)
    assert len(graphs) == 4
