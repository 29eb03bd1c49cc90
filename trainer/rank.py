"""A transformer on the ranks of a cell's genes, tokenised as Nicheformer does, on the device.

Nicheformer: Tejada-Lapuerta et al., Nature Methods 2025; its numbers in PAST: docs/past.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import nn
from torch.nn import functional

from shards.errors import BadInput
from trainer.config import RankConfig
from trainer.genes import per_10k
from trainer.means import NamedGene, read_means

# Tokens that are no gene: padding, modality, assay, then one for each species, then the genes.
PADDING: Final = 0
_MODALITY: Final = 1
_ASSAY: Final = 2
_SPECIES: Final = 3
N_CONTEXT: Final = 3


class RankTransformer(nn.Module):
    """Mean over a cell's gene tokens after a pre-norm transformer; padding is never seen.

    A gene's rank is that of its count over `mean_G`, the mean of its non-zero expression: what is
    high for that gene comes first. Raises BadInput where the heads do not divide the width.
    """

    mean_G: torch.Tensor

    def __init__(self, n_genes: int, n_species: int, config: RankConfig) -> None:
        super().__init__()
        if config.width % config.heads:
            raise BadInput(
                "model.rank.heads",
                expected=f"a divisor of model.rank.width, {config.width}",
                found=str(config.heads),
                remedy="change either",
            )
        self.n_features = config.width
        self._first_gene = _SPECIES + n_species
        self._n_ranked = min(config.context - N_CONTEXT, n_genes)
        self.register_buffer("mean_G", torch.ones(n_genes))
        self.embedding = nn.Embedding(self._first_gene + n_genes, config.width, PADDING)
        self.position_TF = nn.Parameter(torch.empty(N_CONTEXT + self._n_ranked, config.width))
        for table in (self.embedding.weight, self.position_TF):
            nn.init.normal_(table, std=0.02)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def fit(self, counts_SG: torch.Tensor, measured_SG: torch.Tensor) -> None:
        """Take each gene's mean over the sample's cells in which it is not zero; 1 without any."""
        expression_SG = per_10k(counts_SG * measured_SG)
        n_G = (expression_SG > 0).sum(dim=0)
        self.mean_G = torch.where(n_G > 0, expression_SG.sum(dim=0) / n_G.clamp_min(1), 1.0)

    def set_means(self, genes: Sequence[NamedGene], path: Path) -> int:
        """Take the means from a file, 1 for a gene that it lacks; returns how many it lacks."""
        mean_G, n_lacking = read_means(genes, path)
        self.mean_G = torch.from_numpy(mean_G).to(self.mean_G)
        return n_lacking

    def tokens(
        self, counts_BG: torch.Tensor, measured_BG: torch.Tensor, species_B: torch.Tensor
    ) -> torch.Tensor:
        """(B, T) int64: modality, assay, species, then genes from high to low, then padding.

        Genes of the same relative count come in the order of the vocabulary.
        """
        # Scaling a cell to 10,000 counts would change no rank, only round.
        relative_BG = counts_BG * measured_BG / self.mean_G
        ranked_BG = relative_BG.argsort(dim=1, descending=True, stable=True)
        gene_BR = ranked_BG[:, : self._n_ranked] + self._first_gene
        rank_R = torch.arange(self._n_ranked, device=gene_BR.device)
        n_B1 = (relative_BG > 0).sum(dim=1, keepdim=True)
        gene_BR = torch.where(rank_R < n_B1, gene_BR, PADDING)
        modality_B = torch.full_like(species_B, _MODALITY)
        assay_B = torch.full_like(species_B, _ASSAY)
        context_B3 = torch.stack([modality_B, assay_B, species_B + _SPECIES], dim=1)
        return torch.cat([context_B3, gene_BR], dim=1)

    def forward(
        self, counts_BG: torch.Tensor, measured_BG: torch.Tensor, species_B: torch.Tensor
    ) -> torch.Tensor:
        """(B, width); 0 for a cell without counts."""
        token_BT = self.tokens(counts_BG, measured_BG, species_B)
        present_BT = token_BT != PADDING
        x_BTF = self.embedding(token_BT) + self.position_TF
        for block in self.blocks:
            x_BTF = block(x_BTF, present_BT)
        gene_BRF = self.norm(x_BTF)[:, N_CONTEXT:]
        present_BR1 = present_BT[:, N_CONTEXT:, None]
        n_B1 = present_BR1.sum(dim=1).clamp_min(1)
        features_BF: torch.Tensor = (gene_BRF * present_BR1).sum(dim=1) / n_B1
        return features_BF


class _Block(nn.Module):
    """Attention and a feed-forward layer, each normalised before it and added to its input."""

    def __init__(self, config: RankConfig) -> None:
        super().__init__()
        self._heads, self._dropout = config.heads, config.dropout
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.feedforward = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Linear(config.width, config.feedforward),
            nn.GELU(),
            nn.Linear(config.feedforward, config.width),
            nn.Dropout(config.dropout),
        )

    def forward(self, x_BTF: torch.Tensor, present_BT: torch.Tensor) -> torch.Tensor:
        qkv_BTF = self.qkv(self.attention_norm(x_BTF))
        q_BHTd, k_BHTd, v_BHTd = (
            part_BTF.unflatten(2, (self._heads, -1)).transpose(1, 2)
            for part_BTF in qkv_BTF.chunk(3, dim=2)
        )
        seen_BHTd = functional.scaled_dot_product_attention(
            q_BHTd,
            k_BHTd,
            v_BHTd,
            attn_mask=present_BT[:, None, None, :],
            dropout_p=self._dropout if self.training else 0.0,
        )
        x_BTF = x_BTF + self.dropout(self.out(seen_BHTd.transpose(1, 2).flatten(2)))
        fed_BTF: torch.Tensor = self.feedforward(x_BTF)
        return x_BTF + fed_BTF
