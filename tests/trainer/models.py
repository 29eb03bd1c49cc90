"""Small models of every kind, and cells for them."""

from __future__ import annotations

from typing import Any

import torch

from trainer.config import LossConfig, ModelConfig
from trainer.genes import GeneInput
from trainer.presets import PRESETS

RANK = {
    "width": 16,
    "depth": 2,
    "heads": 2,
    "feedforward": 32,
    "context": 12,
    "dropout": 0.0,
    "means": None,
}
GRAPH = {"neighbors": 3, "hidden": 8, "layers": 2, "heads": 2, "bias": -1.0}


def model_config(preset: str = "small", **changes: Any) -> ModelConfig:
    """The preset's models with towers that a test can afford."""
    small: dict[str, Any] = {"image": "test_vit", "image_options": {}, "image_px": 32}
    small |= {"fov_um": "patch", "gene_hidden": [16], "embed_dim": 8}
    if preset == "past":
        small |= {"image_options": {"init_values": 1e-5}, "rank": RANK, "graph": GRAPH}
    return ModelConfig.model_validate(PRESETS[preset]["model"] | small | changes)


def loss_config(preset: str = "small", **changes: Any) -> LossConfig:
    return LossConfig.model_validate(PRESETS[preset]["loss"] | changes)


def some_cells(n: int, n_genes: int, *, k: int = 3, seed: int = 0) -> GeneInput:
    """Cells of two panels and two species, the last without counts, each with 0 … k neighbours."""
    generator = torch.Generator().manual_seed(seed)
    measured_BG = torch.ones(n, n_genes)
    measured_BG[::2, : n_genes // 3] = 0
    rate_BG = 4 * torch.rand(n, n_genes, generator=generator) ** 3
    counts_BG = torch.poisson(rate_BG, generator=generator) * measured_BG
    counts_BG[-1] = 0
    rate_BKG = rate_BG[:, None].expand(-1, k, -1)
    return GeneInput(
        counts_BG=counts_BG,
        measured_BG=measured_BG,
        species_B=torch.arange(n) % 2,
        neighbor_counts_BKG=torch.poisson(rate_BKG, generator=generator) * measured_BG[:, None],
        present_BK=torch.arange(k) < (torch.arange(n) % (k + 1))[:, None],
    )
