"""A checkpoint opened and a split embedded: what validation and evaluation share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from trainer.augment import plain_views, views
from trainer.batch import dense_counts
from trainer.checkpoint import read_checkpoint_config, read_model_state, read_vocabulary
from trainer.config import Device, TrainConfig
from trainer.data import Loader
from trainer.model import PairModel
from trainer.retrieval import Embedding
from trainer.vocabulary import Vocabulary

_BATCH_SIZE = 256


def chosen_device(device: Device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def half_precision(device: torch.device) -> torch.autocast:
    """bfloat16 on CUDA; on CPU everything stays float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def read_model(checkpoint: Path) -> tuple[PairModel, Vocabulary, TrainConfig]:
    """The model of a checkpoint, ready to embed; prove the checkpoint first (`read_meta`)."""
    config, vocabulary = read_checkpoint_config(checkpoint), read_vocabulary(checkpoint)
    model = PairModel(len(vocabulary.genes), config.model, config.loss)
    model.load_state_dict(read_model_state(checkpoint))
    return model.eval(), vocabulary, config


@torch.inference_mode()
def embed(
    model: PairModel, loader: Loader, config: TrainConfig, device: torch.device
) -> tuple[Embedding, Embedding]:
    """(N, D) of the patches and of the counts, every sample of the loader once, by index.

    Leaves the model in the mode in which it was.
    """
    was_training = model.training
    model.eval()
    places = loader.places.to(device)
    fov_um = loader.shown_um(config.model.fov_um)
    z_image, z_gene = [], []
    for batch in loader.once(_BATCH_SIZE):
        batch = batch.to(device)
        view_B23 = plain_views(len(batch.weight_B), patch_um=loader.fov_um, fov_um=fov_um)
        with half_precision(device):
            image_BCHW = views(batch.image_BHWC, view_B23, config.model.image_px)
            z_image.append(model.embed_image(image_BCHW).cpu().numpy())
            counts_BG = dense_counts(batch, places, len(loader.vocabulary.genes))
            measured_BG = places.measured_PG[batch.panel_B].float()
            z_gene.append(model.embed_counts(counts_BG, measured_BG).cpu().numpy())
    model.train(was_training)
    return np.concatenate(z_image), np.concatenate(z_gene)
