"""Symmetric InfoNCE over a batch of pairs."""

from __future__ import annotations

import torch
from torch.nn import functional


def info_nce(
    z_image_BD: torch.Tensor,
    z_gene_BD: torch.Tensor,
    temperature: torch.Tensor,
    weight_B: torch.Tensor,
) -> torch.Tensor:
    """Mean over both directions of the cross-entropy of each row with its own pair as the class.

    Rows of weight 0 are padding: they are no query and no candidate. CLIP (arXiv 2103.00020).
    """
    logits_BB = z_image_BD @ z_gene_BD.T / temperature
    padding_B = weight_B == 0
    own_B = torch.arange(len(logits_BB), device=logits_BB.device)
    total = logits_BB.new_zeros(())
    for directed_BB in (logits_BB, logits_BB.T):
        # A padded row may see itself, or its softmax would run over nothing.
        hidden_BB = padding_B[None, :] & (own_B[:, None] != own_B[None, :])
        per_row_B = functional.cross_entropy(
            directed_BB.masked_fill(hidden_BB, float("-inf")), own_B, reduction="none"
        )
        total = total + (per_row_B * weight_B).sum() / weight_B.sum()
    return total / 2
