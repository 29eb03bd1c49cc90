"""From a tower's features into the space that both towers share."""

from __future__ import annotations

import torch
from torch import nn

from trainer.config import ModelConfig


def projection(n_features: int, config: ModelConfig) -> nn.Module:
    """(B, n_features) to (B, embed_dim), of the kind that `model.projection` names."""
    if config.projection == "linear":
        return nn.Sequential(nn.Dropout(config.dropout), nn.Linear(n_features, config.embed_dim))
    return ResidualProjection(n_features, config.embed_dim, config.dropout)


class ResidualProjection(nn.Module):
    """A linear map and a second one beside it, normalised: the head of BLEEP and PAST.

    BLEEP: arXiv 2306.01859. PAST: arXiv 2507.06418.
    """

    def __init__(self, n_features: int, embed_dim: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(n_features, embed_dim)
        self.second = nn.Sequential(nn.GELU(), nn.Linear(embed_dim, embed_dim), nn.Dropout(dropout))
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, features_BF: torch.Tensor) -> torch.Tensor:
        projected_BD = self.first(features_BF)
        z_BD: torch.Tensor = self.norm(projected_BD + self.second(projected_BD))
        return z_BD
