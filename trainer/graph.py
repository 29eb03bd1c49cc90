"""A cell among its neighbours: attention over the graph of them, fused into the cell's features."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from shards.errors import BadInput
from trainer.config import GraphConfig
from trainer.genes import StandardisedExpression


class NeighborGraph(nn.Module):
    """What a cell's surroundings say of it: (B, n_features), read out at the cell.

    Nodes are the cell and its neighbours, each with an edge to each; a node's features are its
    standardised expression over the vocabulary. Neighbours that are absent are no nodes, and the
    order of those that are present doesn't matter.
    """

    def __init__(self, n_genes: int, n_features: int, config: GraphConfig) -> None:
        super().__init__()
        for name, width in (("hidden", config.hidden), ("features of a cell", n_features)):
            if width % config.heads:
                raise BadInput(
                    "model.graph.heads",
                    expected=f"a divisor of the {width} {name}",
                    found=str(config.heads),
                    remedy="change either",
                )
        self.standardised = StandardisedExpression(n_genes)
        self.node = nn.Linear(n_genes, config.hidden)
        widths = [config.hidden] * config.layers + [n_features]
        self.layers = nn.ModuleList(
            _GraphAttention(width, next_width, config.heads)
            for width, next_width in pairwise(widths)
        )

    def fit(self, counts_SG: torch.Tensor, measured_SG: torch.Tensor) -> None:
        """Take each gene's mean and spread from a sample of training cells."""
        self.standardised.fit(counts_SG, measured_SG)

    def forward(
        self,
        counts_BG: torch.Tensor,
        measured_BG: torch.Tensor,
        neighbor_counts_BKG: torch.Tensor,
        present_BK: torch.Tensor,
    ) -> torch.Tensor:
        # N = 1 + K nodes, the cell first.
        counts_BNG = torch.cat([counts_BG[:, None], neighbor_counts_BKG], dim=1)
        present_BN = functional.pad(present_BK, (1, 0), value=True)
        x_BNF = self.node(self.standardised(counts_BNG, measured_BG[:, None]))
        for layer in self.layers:
            x_BNF = layer(functional.elu(x_BNF), present_BN)
        features_BF: torch.Tensor = x_BNF[:, 0]
        return features_BF


class _GraphAttention(nn.Module):
    """GAT (Veličković et al., arXiv 1710.10903) on a complete graph, heads side by side."""

    def __init__(self, width: int, next_width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.linear = nn.Linear(width, next_width, bias=False)
        # The attention vector of the paper, its half for the node that looks and for the one seen.
        self.looks_Hd = nn.Parameter(torch.empty(heads, next_width // heads))
        self.seen_Hd = nn.Parameter(torch.empty(heads, next_width // heads))
        self.bias_F = nn.Parameter(torch.zeros(next_width))
        for weight in (self.linear.weight, self.looks_Hd, self.seen_Hd):
            nn.init.xavier_uniform_(weight)

    def forward(self, x_BNF: torch.Tensor, present_BN: torch.Tensor) -> torch.Tensor:
        h_BNHd = self.linear(x_BNF).unflatten(2, (self._heads, -1))
        looks_BHN = (h_BNHd * self.looks_Hd).sum(dim=3).transpose(1, 2)
        seen_BHN = (h_BNHd * self.seen_Hd).sum(dim=3).transpose(1, 2)
        logits_BHNN = functional.leaky_relu(looks_BHN[..., None] + seen_BHN[:, :, None], 0.2)
        # The cell itself is always there, so no softmax runs over nothing.
        logits_BHNN = logits_BHNN.masked_fill(~present_BN[:, None, None], float("-inf"))
        mixed_BNHd = torch.einsum("bhij,bjhd->bihd", logits_BHNN.softmax(dim=3), h_BNHd)
        return mixed_BNHd.flatten(2) + self.bias_F


class GraphFusion(nn.Module):
    """Cell features with what attention takes from the cell and its graph added, normalised.

    The cell is the query, [cell, graph] are keys and values; `bias` is added to the logit of the
    graph (PAST, arXiv 2507.06418).
    """

    bias_12: torch.Tensor

    def __init__(self, n_features: int, config: GraphConfig) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(n_features, config.heads, batch_first=True)
        self.register_buffer("bias_12", torch.tensor([[0.0, config.bias]]), persistent=False)
        self.norm = nn.LayerNorm(n_features)

    def forward(self, cell_BF: torch.Tensor, graph_BF: torch.Tensor) -> torch.Tensor:
        both_B2F = torch.stack([cell_BF, graph_BF], dim=1)
        taken_B1F, _ = self.attention(
            cell_BF[:, None], both_B2F, both_B2F, attn_mask=self.bias_12, need_weights=False
        )
        fused_BF: torch.Tensor = self.norm(cell_BF + taken_B1F[:, 0])
        return fused_BF
