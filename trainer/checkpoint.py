"""A training run on disk: a folder a step, whose `meta.json` is written last."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import torch

from shards.artifact import sha256_of, write_atomically
from shards.dataset import read_record
from shards.errors import BadInput
from shards.schema import Record, digest
from shards.vocabulary import Vocabulary
from trainer.config import TrainConfig

META_FILE: Final = "meta.json"
_CONFIG_FILE: Final = "config.json"
_VOCABULARY_FILE: Final = "vocabulary.json"


class CheckpointMeta(Record):
    """`meta.json`: what the checkpoint holds; `fingerprint` is the hash of its files' hashes.

    There is no state of a random generator: what is random follows from seed, step and cursor.
    """

    schema_version: Literal[2] = 2
    step: int
    cursor: int  # samples that the optimiser has consumed
    n_bad_samples: int  # of those, left out and written down
    stream: str  # fingerprint of the samples trained on
    val_r5: float | None  # where this very step was validated: mean R@5 of both directions
    fingerprint: str
    files: dict[str, str]  # name -> sha256


@dataclass(frozen=True, slots=True)
class TrainState:
    """What a step leaves behind. `parts` are state dicts by name: model, optimizer, scaler, ema."""

    step: int
    cursor: int
    n_bad_samples: int
    stream: str
    val_r5: float | None
    parts: Mapping[str, Mapping[str, Any]]
    config: TrainConfig
    vocabulary: Vocabulary


class CheckpointWriter:
    """Saves beside the training: a state is copied at once, and written by a thread.

    One is written at a time; what went wrong is raised at the next `save` or at the end. The newest
    `keep` stay, and the best by validation.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        for torn in folder.glob(".step-*.partial"):
            shutil.rmtree(torn)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def save(self, state: TrainState) -> None:
        """Copy the state and have it written; waits only for the one before."""
        self.wait()
        copied = {name: _on_cpu(part) for name, part in state.parts.items()}
        self._pending = self._thread.submit(_write, self._folder, self._keep, state, copied)

    def wait(self) -> None:
        """Until the last one is whole on disk; raises what kept it from that."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _on_cpu(part: Any) -> Any:
    if isinstance(part, torch.Tensor):
        return part.detach().to("cpu", copy=True)
    if isinstance(part, Mapping):
        return {key: _on_cpu(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return type(part)(map(_on_cpu, part))
    return part


def _write(folder: Path, keep: int, state: TrainState, parts: Mapping[str, Any]) -> None:
    final = folder / f"step-{state.step:06d}"
    aside = folder / f".{final.name}.partial"
    try:
        aside.mkdir(parents=True)
        for name, part in parts.items():
            _save(part, aside / f"{name}.pt")
        (aside / _CONFIG_FILE).write_text(state.config.model_dump_json(indent=1))
        (aside / _VOCABULARY_FILE).write_text(state.vocabulary.model_dump_json())
        files = {}
        for path in sorted(aside.iterdir()):
            with path.open("rb") as f:
                os.fsync(f.fileno())
            files[path.name] = sha256_of(path)
        meta = CheckpointMeta(
            step=state.step,
            cursor=state.cursor,
            n_bad_samples=state.n_bad_samples,
            stream=state.stream,
            val_r5=state.val_r5,
            fingerprint=digest(files),
            files=files,
        )
        write_atomically(aside / META_FILE, meta.model_dump_json(indent=1).encode())
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk has room again
        raise
    if final.exists():  # of a run that went on from an earlier step
        shutil.rmtree(final)
    aside.rename(final)
    whole = checkpoints(folder)
    kept = {*whole[-keep:], best_checkpoint(folder)}
    for old in whole:
        if old not in kept:
            shutil.rmtree(old)


def _save(part: Any, path: Path) -> None:
    try:
        with path.open("wb") as f:
            torch.save(part, f)
    except RuntimeError as error:
        # Of a full disk torch says that a position is unexpected; why is behind it.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((p.parent for p in folder.glob(f"step-*/{META_FILE}")), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def best_checkpoint(folder: Path) -> Path | None:
    """The one that did best on validation, the newer of equals; None where none was validated."""
    scored = [(val_r5, _step_of(c), c) for c in checkpoints(folder) if (val_r5 := _val_r5(c))]
    return max(scored)[2] if scored else None


def best_score(folder: Path) -> float:
    """Of the best checkpoint; below any where none was validated."""
    return max((_val_r5(c) or 0.0 for c in checkpoints(folder)), default=0.0)


def _val_r5(checkpoint: Path) -> float | None:
    return read_record(checkpoint / META_FILE, CheckpointMeta).val_r5


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


def read_part(checkpoint: Path, name: str) -> dict[str, Any]:
    """One state dict of a checkpoint: model, optimizer, scaler or ema."""
    state: dict[str, Any] = torch.load(
        checkpoint / f"{name}.pt", map_location="cpu", weights_only=True
    )
    return state


def read_model_state(checkpoint: Path) -> dict[str, Any]:
    """What a model is used with: the averaged parameters where the run kept them."""
    if not (checkpoint / "ema.pt").exists():
        return read_part(checkpoint, "model")
    averaged = read_part(checkpoint, "ema")
    return {
        name.removeprefix("module."): value
        for name, value in averaged.items()
        if name.startswith("module.")
    }


def check_resumable(
    checkpoint: Path, meta: CheckpointMeta, config: TrainConfig, stream: str
) -> None:
    """BadInput with the difference where the config or the data are not those of the checkpoint.

    What decides no parameter may change: device, workers, paths, logging and keeping.
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
            remedy="restore them, or start a new run with another run.out: with --init-from "
            "it begins with this checkpoint's weights",
        )


# Where and how fast, not what.
_FREE: Final = {
    ("model", "image_weights"),
    ("data_loading", "micro_batch"),
    ("data_loading", "workers"),
    ("data_loading", "loader"),
    ("data_loading", "cache_bytes"),
    ("data_loading", "verify"),
    ("data_loading", "max_bad_samples"),
}


def _pairs(old: TrainConfig, new: TrainConfig) -> list[tuple[str, str, Any, Any]]:
    fixed = [("run", "seed")] + [
        (section, name)
        for section in ("model", "loss", "optim", "data_loading")
        for name in type(getattr(new, section)).model_fields
        if (section, name) not in _FREE
    ]
    return [(s, n, getattr(getattr(old, s), n), getattr(getattr(new, s), n)) for s, n in fixed]
