"""A checkpoint opened and a split embedded: what training, validation and evaluation share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from shards.vocabulary import Vocabulary
from trainer.augment import plain_views, views
from trainer.batch import Batch, GenePlaces, dense_counts, dense_neighbors
from trainer.checkpoint import read_checkpoint_config, read_model_state, read_vocabulary
from trainer.config import Device, TrainConfig
from trainer.data import Loader
from trainer.genes import GeneInput
from trainer.model import PairModel
from trainer.retrieval import Embedding, random_batches, retrieval_lines

VALIDATION_BATCH = 64
_BATCH_SIZE = 256
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def chosen_device(device: Device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def chosen_precision(precision: str, device: torch.device) -> torch.dtype:
    """What the towers compute in; auto: bfloat16 on CUDA, float32 elsewhere."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[precision]


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    enabled = precision is not torch.float32
    return torch.autocast(device.type, dtype=precision if enabled else None, enabled=enabled)


def read_model(checkpoint: Path) -> tuple[PairModel, Vocabulary, TrainConfig]:
    """The model of a checkpoint, ready to embed; prove the checkpoint first (`read_meta`)."""
    config, vocabulary = read_checkpoint_config(checkpoint), read_vocabulary(checkpoint)
    model = PairModel(len(vocabulary.genes), len(vocabulary.species), config.model, config.loss)
    model.load_state_dict(read_model_state(checkpoint))
    return model.eval(), vocabulary, config


def gene_input(batch: Batch, places: GenePlaces, neighbors_k: int) -> GeneInput:
    """What the gene tower sees of a batch that lies on the device of `places`."""
    n_genes = places.measured_PG.shape[1]
    counts_BG = dense_counts(batch, places, n_genes)
    neighbor_counts_BKG = present_BK = None
    if neighbors_k > 0:
        neighbor_counts_BKG, present_BK = dense_neighbors(batch, places, n_genes, neighbors_k)
    return GeneInput(
        counts_BG=counts_BG,
        measured_BG=places.measured_PG[batch.panel_B].float(),
        species_B=places.species_P[batch.panel_B],
        neighbor_counts_BKG=neighbor_counts_BKG,
        present_BK=present_BK,
    )


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
    precision = chosen_precision(config.optim.precision, device)
    neighbors_k = config.model.neighbors_k
    z_image, z_gene = [], []
    for batch in loader.once(_BATCH_SIZE):
        batch = batch.to(device)
        view_B23 = plain_views(len(batch.weight_B), patch_um=loader.fov_um, fov_um=fov_um)
        image_BCHW = views(batch.image_BHWC, view_B23, config.model.image_px)
        with autocast(device, precision):
            z_image.append(model.embed_image(image_BCHW).cpu().numpy())
            z_gene.append(model.embed_counts(gene_input(batch, places, neighbors_k)).cpu().numpy())
    model.train(was_training)
    return np.concatenate(z_image), np.concatenate(z_gene)


def validated(
    model: PairModel, loader: Loader, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """R@5 among 64 of both directions, and their mean, over all samples of the loader."""
    z_image, z_gene = embed(model, loader, config, device)
    batches = random_batches(len(z_image), VALIDATION_BATCH, seed=0)
    lines = retrieval_lines("model", z_image, z_gene, batches)
    r5 = {f"val_r5_{line.direction}": line.r_at_5 for line in lines if line.scope == "batch"}
    return {"val_r5": sum(r5.values()) / len(r5), **r5}
