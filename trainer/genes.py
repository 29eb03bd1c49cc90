"""What a gene encoder is given, how counts become expression, and the encoder that is an MLP.

Every gene encoder has `n_features`, `fit(counts_SG, measured_SG)`, which takes from a sample of
training cells what it normalises by, and `forward(counts_BG, measured_BG, species_B)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from trainer.config import ModelConfig


@dataclass(frozen=True, slots=True)
class GeneInput:
    """Cells over the vocabulary, on the model's device.

    A count of a gene that is not measured is ignored, whatever it is.
    """

    counts_BG: torch.Tensor  # float32, raw
    measured_BG: torch.Tensor  # float32, 1 where the sample's panel has the gene, else 0
    species_B: torch.Tensor  # int64, 0 … n_species - 1
    neighbor_counts_BKG: torch.Tensor | None = None  # float32, raw; same panel as the cell
    present_BK: torch.Tensor | None = None  # bool: the cell has a neighbour at this place


def per_10k(counts_BG: torch.Tensor) -> torch.Tensor:
    """Counts per 10,000 of the cell (along the last axis); 0 for a cell without counts."""
    return counts_BG * (10_000 / counts_BG.sum(dim=-1, keepdim=True).clamp_min(1))


def expression(counts_BG: torch.Tensor) -> torch.Tensor:
    """log1p of counts per 10,000 of the cell; 0 for a cell without counts."""
    return torch.log1p(per_10k(counts_BG))


class StandardisedExpression(nn.Module):
    """Expression with each gene's mean taken off and its spread divided out; 0 where unmeasured."""

    center_G: torch.Tensor
    scale_G: torch.Tensor

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.register_buffer("center_G", torch.zeros(n_genes))
        self.register_buffer("scale_G", torch.ones(n_genes))

    def fit(self, counts_SG: torch.Tensor, measured_SG: torch.Tensor) -> None:
        """Take each gene's mean and spread from a sample of cells that measured it."""
        expression_SG = expression(counts_SG * measured_SG)
        n_G = measured_SG.sum(dim=0).clamp_min(1)
        self.center_G = (expression_SG * measured_SG).sum(dim=0) / n_G
        deviation_SG = (expression_SG - self.center_G) * measured_SG
        # A gene that hardly varies in the sample must not be blown up by dividing by its spread.
        self.scale_G = (deviation_SG.square().sum(dim=0) / n_G).sqrt().clamp_min(0.1)

    def forward(self, counts_BG: torch.Tensor, measured_BG: torch.Tensor) -> torch.Tensor:
        """The same shape; axes before the last are any that the two broadcast over."""
        expression_BG = expression(counts_BG * measured_BG)
        return (expression_BG - self.center_G) / self.scale_G * measured_BG


class GeneMLP(nn.Module):
    """An MLP on standardised expression over the vocabulary; what a panel lacks is told to it."""

    def __init__(self, n_genes: int, config: ModelConfig) -> None:
        super().__init__()
        self.standardised = StandardisedExpression(n_genes)
        first, *_ = config.gene_hidden
        self.measured = nn.Linear(n_genes, first)
        self.unmeasured = nn.Linear(n_genes, first, bias=False)
        layers: list[nn.Module] = []
        for width, next_width in pairwise(config.gene_hidden):
            layers += [*_after_linear(width, config.dropout), nn.Linear(width, next_width)]
        self.n_features = config.gene_hidden[-1]
        self.rest = nn.Sequential(*layers, *_after_linear(self.n_features, config.dropout))

    def fit(self, counts_SG: torch.Tensor, measured_SG: torch.Tensor) -> None:
        """Take each gene's mean and spread from a sample of training cells."""
        self.standardised.fit(counts_SG, measured_SG)

    def forward(
        self, counts_BG: torch.Tensor, measured_BG: torch.Tensor, species_B: torch.Tensor
    ) -> torch.Tensor:
        """(B, n_features); the species is told by the genes that are measured."""
        x = self.measured(self.standardised(counts_BG, measured_BG))
        features_BF: torch.Tensor = self.rest(x + self.unmeasured(1.0 - measured_BG))
        return features_BF


def _after_linear(width: int, dropout: float) -> list[nn.Module]:
    return [nn.LayerNorm(width), nn.GELU(), nn.Dropout(dropout)]
