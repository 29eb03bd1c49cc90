"""Two towers, one for the patch and one for the counts, that meet on a sphere."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from timm.models import load_checkpoint
from torch import nn
from torch.nn import functional

from shards.errors import BadInput
from trainer.batch import expression
from trainer.config import LossConfig, ModelConfig


class ImageTower(nn.Module):
    """A timm network without its classifier; takes RGB in 0 … 1."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not timm.is_model(config.image):
            raise BadInput(
                "model.image",
                expected="the name of a timm model",
                found=repr(config.image),
                remedy="python -c 'import timm; print(timm.list_models())' lists them",
            )
        cfg = timm.get_pretrained_cfg(config.image)
        options = dict(config.image_options)
        if cfg is not None and cfg.fixed_input_size:
            options = {"img_size": config.image_px} | options
        network: Any = timm.create_model(config.image, pretrained=False, num_classes=0, **options)
        self.network = network
        self.n_features: int = network.head_hidden_size
        cfg = network.pretrained_cfg
        for name in ("mean", "std"):
            value = torch.tensor(cfg[name]).view(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def load(self, weights: Path) -> None:
        """Take pretrained weights from a file, all of them; only its classifier is left out."""
        try:
            found = load_checkpoint(self.network, str(weights), strict=False, weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            raise BadInput(
                weights,
                expected="a state dict of tensors (.pt, .pth, .safetensors)",
                found=str(error).splitlines()[0],
                remedy="save the network's state_dict() alone",
            ) from error
        network: Any = self.network
        classifier = f"{network.pretrained_cfg['classifier']}."
        strange = [key for key in found.unexpected_keys if not key.startswith(classifier)]
        if found.missing_keys or strange:
            raise BadInput(
                weights,
                expected=f"weights of {network.pretrained_cfg['architecture']}",
                found=f"{len(found.missing_keys)} missing and {len(strange)} unknown entries, "
                f"first {[*found.missing_keys, *strange][0]}",
                remedy="give weights of the network that model.image names",
            )

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        x = (image_BCHW - self.mean) / self.std
        features: torch.Tensor = self.network(x.contiguous(memory_format=torch.channels_last))
        return features


class GeneTower(nn.Module):
    """An MLP on standardised expression over the vocabulary; what a panel lacks is told to it."""

    center_G: torch.Tensor
    scale_G: torch.Tensor

    def __init__(self, n_genes: int, config: ModelConfig) -> None:
        super().__init__()
        self.register_buffer("center_G", torch.zeros(n_genes))
        self.register_buffer("scale_G", torch.ones(n_genes))
        first, *_ = config.gene_hidden
        self.measured = nn.Linear(n_genes, first)
        self.unmeasured = nn.Linear(n_genes, first, bias=False)
        layers: list[nn.Module] = []
        for width, next_width in pairwise(config.gene_hidden):
            layers += [*_after_linear(width, config.dropout), nn.Linear(width, next_width)]
        self.n_features = config.gene_hidden[-1]
        self.rest = nn.Sequential(*layers, *_after_linear(self.n_features, config.dropout))

    def standardise(self, expression_SG: torch.Tensor, measured_SG: torch.Tensor) -> None:
        """Take each gene's mean and spread from a sample of cells that measured it."""
        n_G = measured_SG.sum(dim=0).clamp_min(1)
        self.center_G = (expression_SG * measured_SG).sum(dim=0) / n_G
        deviation_SG = (expression_SG - self.center_G) * measured_SG
        # A gene that hardly varies in the sample must not be blown up by dividing by its spread.
        self.scale_G = (deviation_SG.square().sum(dim=0) / n_G).sqrt().clamp_min(0.1)

    def forward(self, counts_BG: torch.Tensor, measured_BG: torch.Tensor) -> torch.Tensor:
        standardised_BG = (expression(counts_BG) - self.center_G) / self.scale_G * measured_BG
        x = self.measured(standardised_BG) + self.unmeasured(1.0 - measured_BG)
        features: torch.Tensor = self.rest(x)
        return features


def _after_linear(width: int, dropout: float) -> list[nn.Module]:
    return [nn.LayerNorm(width), nn.GELU(), nn.Dropout(dropout)]


class PairModel(nn.Module):
    """Embeddings of unit length for patches and for counts, and the temperature between them."""

    def __init__(self, n_genes: int, config: ModelConfig, loss: LossConfig) -> None:
        super().__init__()
        self.image = ImageTower(config)
        self.gene = GeneTower(n_genes, config)
        self.image_projection = _projection(self.image.n_features, config)
        self.gene_projection = _projection(self.gene.n_features, config)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(loss.temperature)))
        self._log_bounds = math.log(loss.temperature_min), math.log(loss.temperature_max)

    @property
    def temperature(self) -> torch.Tensor:
        return self.log_temperature.clamp(*self._log_bounds).exp()

    def embed_image(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, D) of unit length, float32."""
        z_BD = self.image_projection(self.image(image_BCHW))
        return functional.normalize(z_BD.float(), dim=1)

    def embed_counts(self, counts_BG: torch.Tensor, measured_BG: torch.Tensor) -> torch.Tensor:
        """(B, D) of unit length, float32; `measured_BG` is 1.0 where the sample's panel has it."""
        z_BD = self.gene_projection(self.gene(counts_BG, measured_BG))
        return functional.normalize(z_BD.float(), dim=1)


def _projection(n_features: int, config: ModelConfig) -> nn.Module:
    return nn.Sequential(nn.Dropout(config.dropout), nn.Linear(n_features, config.embed_dim))
