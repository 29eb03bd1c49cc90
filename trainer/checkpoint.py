"""A training run on disk: a folder a step, whose `meta.json` is written last."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Final, Literal

import torch

from shards.artifact import sha256_of, write_atomically
from shards.dataset import read_record
from shards.errors import BadInput
from shards.schema import Record, digest
from trainer.config import TrainConfig
from trainer.vocabulary import Vocabulary

META_FILE: Final = "meta.json"
_MODEL_FILE: Final = "model.pt"
_OPTIMIZER_FILE: Final = "optimizer.pt"
_CONFIG_FILE: Final = "config.json"
_VOCABULARY_FILE: Final = "vocabulary.json"


class CheckpointMeta(Record):
    """`meta.json`: what the checkpoint holds; `fingerprint` is the hash of its files' hashes."""

    schema_version: Literal[1] = 1
    step: int
    cursor: int  # samples that the optimiser has consumed
    stream: str  # fingerprint of the samples trained on
    fingerprint: str
    files: dict[str, str]  # name -> sha256


def write_checkpoint(
    folder: Path,
    *,
    step: int,
    cursor: int,
    stream: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    vocabulary: Vocabulary,
    keep: int,
) -> Path:
    """Write `folder/step-NNNNNN`, then remove all but the newest `keep`; returns its path."""
    final = folder / f"step-{step:06d}"
    aside = folder / f".{final.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    torch.save(model.state_dict(), aside / _MODEL_FILE)
    torch.save(optimizer.state_dict(), aside / _OPTIMIZER_FILE)
    (aside / _CONFIG_FILE).write_text(config.model_dump_json(indent=1))
    (aside / _VOCABULARY_FILE).write_text(vocabulary.model_dump_json())
    files = {}
    for path in sorted(aside.iterdir()):
        with path.open("rb") as f:
            os.fsync(f.fileno())
        files[path.name] = sha256_of(path)
    meta = CheckpointMeta(
        step=step, cursor=cursor, stream=stream, fingerprint=digest(files), files=files
    )
    write_atomically(aside / META_FILE, meta.model_dump_json(indent=1).encode())
    if final.exists():  # of a run that went on from an earlier step
        shutil.rmtree(final)
    aside.rename(final)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p.parent for p in folder.glob(f"step-*/{META_FILE}"))


def read_meta(checkpoint: Path) -> CheckpointMeta:
    """The record of a checkpoint, its files proved against it; BadInput where they differ."""
    if not (checkpoint / META_FILE).exists():
        raise BadInput(
            checkpoint,
            expected=f"a checkpoint: a folder step-… with {META_FILE} in it",
            found="no such file",
            remedy="give one of the folders under checkpoints/ of a training run",
        )
    meta = read_record(checkpoint / META_FILE, CheckpointMeta)
    for name, sha256 in meta.files.items():
        path = checkpoint / name
        found = sha256_of(path) if path.exists() else "no such file"
        if found != sha256:
            raise BadInput(
                path,
                expected=f"sha256 {sha256}",
                found=found,
                remedy="use another checkpoint of the run",
            )
    return meta


def read_checkpoint_config(checkpoint: Path) -> TrainConfig:
    return read_record(checkpoint / _CONFIG_FILE, TrainConfig)


def read_vocabulary(checkpoint: Path) -> Vocabulary:
    return read_record(checkpoint / _VOCABULARY_FILE, Vocabulary)


def read_model_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(
        checkpoint / _MODEL_FILE, map_location="cpu", weights_only=True
    )
    return state


def read_optimizer_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(
        checkpoint / _OPTIMIZER_FILE, map_location="cpu", weights_only=True
    )
    return state


def check_resumable(
    checkpoint: Path, meta: CheckpointMeta, config: TrainConfig, stream: str
) -> None:
    """BadInput with the difference where the config or the data are not those of the checkpoint.

    What decides no parameter may change: device, threads, paths, logging and keeping.
    """
    differences = [
        f"{section}.{name} was {old!r}, is {new!r}"
        for section, name, old, new in _pairs(read_checkpoint_config(checkpoint), config)
        if old != new
    ]
    if meta.stream != stream:
        differences.append(f"the samples were {meta.stream}, are {stream}")
    if differences:
        raise BadInput(
            checkpoint,
            expected="the config and the data of the checkpoint",
            found="; ".join(differences),
            remedy="restore them, or start a new run with another run.out",
        )


def _pairs(old: TrainConfig, new: TrainConfig) -> list[tuple[str, str, Any, Any]]:
    free = {("data_loading", "threads"), ("model", "image_weights")}
    fixed = [("run", "seed")] + [
        (section, name)
        for section in ("model", "loss", "optim", "data_loading")
        for name in type(getattr(new, section)).model_fields
        if (section, name) not in free
    ]
    return [(s, n, getattr(getattr(old, s), n), getattr(getattr(new, s), n)) for s, n in fixed]
