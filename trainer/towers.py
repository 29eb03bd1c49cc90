"""The image tower: any timm network, with random or local weights; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from timm.models import load_checkpoint
from torch import nn

from shards.errors import BadInput
from trainer.config import ModelConfig


class ImageTower(nn.Module):
    """A timm network without its classifier; takes RGB in 0 … 1.

    Mean and standard deviation are those of the network's own `pretrained_cfg`; others are given
    as timm takes them, by `pretrained_cfg_overlay` in `model.image_options`. Raises BadInput where
    timm knows no such network or it takes no such options.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        network = _network(config)
        self.network = network
        self.n_features: int = network.head_hidden_size
        for name in ("mean", "std"):
            value = torch.tensor(network.pretrained_cfg[name]).view(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def load(self, weights: Path) -> None:
        """Take pretrained weights from a file, all of them; only its classifier is left out."""
        if not weights.is_file():
            raise BadInput(
                "model.image_weights",
                expected="a file of weights",
                found=f"{weights}: no such file",
                remedy="correct the path: one that is not absolute begins at the config's folder",
            )
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

    def checkpoint_activations(self) -> None:
        """Keep no activations inside the network's blocks: less memory for a second forward pass.

        Raises BadInput where timm cannot do so for this network.
        """
        network: Any = self.network
        try:
            network.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise BadInput(
                "run.checkpoint_activations",
                expected="a network whose blocks timm can run a second time",
                found=network.pretrained_cfg["architecture"],
                remedy="set it to false, and a smaller data_loading.micro_batch",
            ) from error

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        x = (image_BCHW - self.mean) / self.std
        features: torch.Tensor = self.network(x.contiguous(memory_format=torch.channels_last))
        return features


def _network(config: ModelConfig) -> Any:
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
    try:
        return timm.create_model(config.image, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        raise BadInput(
            "model.image_options",
            expected=f"options that timm.create_model takes for {config.image}",
            found=str(error),
            remedy="correct or remove them",
        ) from error
