"""Contrastive batches larger than memory: GradCache (Gao et al., arXiv 2101.06983).

The loss of a batch needs the embeddings of all its rows, but not the activations behind them. So
the rows are embedded in chunks without a graph, the loss gives the gradient of each embedding, and
each chunk is embedded once more, with a graph, to carry its gradients to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Embedded:
    """One chunk through the towers; `added` is its part, a scalar, of losses row by row."""

    z_image_BD: torch.Tensor
    z_gene_BD: torch.Tensor
    added: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Passed:
    """What a batch came to, without gradients: the parts of its losses, and its embeddings."""

    loss: torch.Tensor
    added: torch.Tensor  # 0 where there is none
    z_image_BD: torch.Tensor
    z_gene_BD: torch.Tensor


def backward_in_chunks(
    n_chunks: int,
    embed: Callable[[int], Embedded],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scale: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> Passed:
    """Add to the parameters the gradients of scale(loss(all embeddings) + all added losses).

    `embed(i)` embeds chunk i of `n_chunks`, twice where there is more than one: it must seed itself
    alike both times, and enter autocast itself, whose cache may not outlive the pass without a
    graph. `loss` takes the embeddings of all chunks in order and is called once, so that ranks may
    meet in it whatever their numbers of chunks. `scale` is a GradScaler's. Batch statistics are
    those of a chunk, and their running means move in both passes.
    """
    if n_chunks == 1:
        whole = embed(0)
        return _backward_in_one(whole, loss(whole.z_image_BD, whole.z_gene_BD), scale)
    with torch.no_grad():
        chunks = [embed(i) for i in range(n_chunks)]
    z_image_BD = torch.cat([c.z_image_BD for c in chunks]).requires_grad_()
    z_gene_BD = torch.cat([c.z_gene_BD for c in chunks]).requires_grad_()
    part = loss(z_image_BD, z_gene_BD)
    torch.autograd.backward(scale(part))
    sizes = [len(c.z_image_BD) for c in chunks]
    cached = zip(_gradients(z_image_BD, sizes), _gradients(z_gene_BD, sizes), strict=True)
    added = torch.zeros_like(part)
    for i, gradients in enumerate(cached):
        added += _backward_of_chunk(embed(i), gradients, scale)
    return Passed(part.detach(), added.detach(), z_image_BD.detach(), z_gene_BD.detach())


def _backward_in_one(
    whole: Embedded, part: torch.Tensor, scale: Callable[[torch.Tensor], torch.Tensor]
) -> Passed:
    added = torch.zeros_like(part) if whole.added is None else whole.added
    torch.autograd.backward(scale(part + added))
    return Passed(
        part.detach(), added.detach(), whole.z_image_BD.detach(), whole.z_gene_BD.detach()
    )


def _gradients(z_BD: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    assert z_BD.grad is not None
    return torch.split_with_sizes(z_BD.grad, sizes)


def _backward_of_chunk(
    chunk: Embedded,
    gradients: tuple[torch.Tensor, torch.Tensor],
    scale: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor | float:
    gradient_of_image_BD, gradient_of_gene_BD = gradients
    # A number whose gradients by the embeddings are those that the loss gave.
    stand_in = (chunk.z_image_BD * gradient_of_image_BD).sum()
    stand_in = stand_in + (chunk.z_gene_BD * gradient_of_gene_BD).sum()
    if chunk.added is None:
        torch.autograd.backward(stand_in)
        return 0.0
    torch.autograd.backward(stand_in + scale(chunk.added))
    return chunk.added.detach()
