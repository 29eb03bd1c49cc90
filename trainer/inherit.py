"""Weights of an earlier run as the start of a new one, on other data."""

from __future__ import annotations

from pathlib import Path

import torch

from shards.errors import BadInput
from shards.vocabulary import VocabularyGene
from trainer.checkpoint import read_meta, read_model_state, read_vocabulary
from trainer.model import PairModel


def inherited_genes(checkpoint: Path | None) -> tuple[VocabularyGene, ...]:
    """What the checkpoint knows, its files proved: it comes first in a new vocabulary."""
    if checkpoint is None:
        return ()
    read_meta(checkpoint)
    return read_vocabulary(checkpoint).genes


def inherit(model: PairModel, n_genes: int, checkpoint: Path) -> None:
    """Take the checkpoint's weights; genes that it did not know keep what the model has for them.

    `n_genes` are the model's, the checkpoint's own first. Raises BadInput where the two differ in
    more than genes.
    """
    old, new = read_model_state(checkpoint), model.state_dict()
    n_more = n_genes - len(read_vocabulary(checkpoint).genes)
    strange = sorted(old.keys() ^ new.keys())
    strange += [k for k in old.keys() & new.keys() if not _grew(old[k], new[k], n_more)]
    if strange:
        raise BadInput(
            checkpoint,
            expected="a model like the new one, but for genes",
            found=f"{len(strange)} weights that differ, first {strange[0]}",
            remedy="give the new run the [model] and [loss] of the checkpoint's config.json",
        )
    with torch.no_grad():
        for name, values in old.items():
            new[name][tuple(slice(n) for n in values.shape)] = values


def _grew(old: torch.Tensor, new: torch.Tensor, n_more: int) -> bool:
    """Whether each edge is as long as it was, or longer by the new genes."""
    return old.ndim == new.ndim and all(
        after - before in (0, n_more) for before, after in zip(old.shape, new.shape, strict=True)
    )
