"""The `train` config: TOML and a preset in, every number resolved and checked out."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from shards.errors import BadInput, BadInputs, not_there_yet
from shards.schema import Record

Device = Literal["auto", "cpu", "cuda"]


class ModelConfig(Record):
    """The two towers and the space in which they meet."""

    image: str  # name of a timm model
    image_options: dict[str, Any]  # of that model, as timm.create_model takes them
    image_weights: Path | None  # a state dict for it (.pt, .pth, .safetensors); null: random
    image_px: int = Field(ge=16)  # edge of the network's input
    # Central field that the network sees; "patch": all of it, and what that is once resolved.
    fov_um: Annotated[float, Field(gt=0)] | Literal["patch"]
    gene_hidden: tuple[int, ...] = Field(min_length=1)
    dropout: float = Field(ge=0, lt=1)  # of the gene tower and of both projections
    embed_dim: int = Field(ge=1)


class LossConfig(Record):
    """Symmetric InfoNCE with a learned temperature inside bounds."""

    temperature: float = Field(gt=0)
    temperature_min: float = Field(gt=0)
    temperature_max: float = Field(gt=0)

    @model_validator(mode="after")
    def _starts_inside(self) -> LossConfig:
        if not self.temperature_min <= self.temperature <= self.temperature_max:
            raise ValueError("temperature lies outside temperature_min … temperature_max")
        return self


class OptimConfig(Record):
    """AdamW; the learning rate warms up linearly, then falls to 0 along half a cosine."""

    steps: int = Field(ge=1)
    warmup_steps: int = Field(ge=0)
    lr: float = Field(gt=0)
    betas: tuple[float, float]
    weight_decay: float = Field(ge=0)
    grad_clip: float = Field(gt=0)  # norm over all parameters

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> OptimConfig:
        if self.warmup_steps >= self.steps:
            raise ValueError("warmup_steps is not below steps")
        return self


class DataLoadingConfig(Record):
    """Batches and what training does to them; evaluation sees samples as they are."""

    batch_size: int = Field(ge=2)
    threads: int = Field(ge=1)  # that read and decode ahead; no part of the result
    shift_um: float = Field(ge=0)  # the patch moves by up to this along each axis
    zoom: float = Field(ge=1)  # magnified by 1/zoom … zoom
    stain_gain: float = Field(ge=0)  # spread of the log gain of each optical-density channel
    stain_mix: float = Field(ge=0)  # spread of what leaks from a channel into each other one
    stain_offset: float = Field(ge=0)  # spread of the optical density added to each channel
    keep_counts: float = Field(gt=0, le=1)  # transcripts are thinned to a share of this … 1


class RunConfig(Record):
    """Where a run writes, how often, and on what."""

    out: Path
    seed: int = Field(ge=0)
    device: Device
    log_every: int = Field(ge=1)
    checkpoint_every: int = Field(ge=1)
    keep_checkpoints: int = Field(ge=1)
    validate_every: int | None = Field(ge=1)  # steps; null: no validation


class TrainConfig(Record):
    """A whole training run. Paths are absolute once read from a file."""

    data: tuple[Path, ...] = Field(min_length=1)
    model: ModelConfig
    loss: LossConfig
    optim: OptimConfig
    data_loading: DataLoadingConfig
    run: RunConfig


# `data` and `run.out` are the user's alone.
PRESETS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "small": {
        "model": {
            "image": "test_resnet",
            "image_options": {},
            "image_weights": None,
            "image_px": 64,
            "fov_um": 20.0,
            "gene_hidden": [256, 256],
            "dropout": 0.2,
            "embed_dim": 128,
        },
        "loss": {"temperature": 0.07, "temperature_min": 0.01, "temperature_max": 1.0},
        "optim": {
            "steps": 600,
            "warmup_steps": 50,
            "lr": 3e-3,
            "betas": [0.9, 0.98],
            "weight_decay": 0.05,
            "grad_clip": 1.0,
        },
        "data_loading": {
            "batch_size": 128,
            "threads": 1,
            "shift_um": 1.5,
            "zoom": 1.1,
            "stain_gain": 0.15,
            "stain_mix": 0.05,
            "stain_offset": 0.03,
            "keep_counts": 0.5,
        },
        "run": {
            "seed": 0,
            "device": "auto",
            "log_every": 10,
            "checkpoint_every": 100,
            "keep_checkpoints": 2,
            "validate_every": None,
        },
    },
}


def read_config(path: Path) -> TrainConfig:
    """The resolved config at `path`; relative paths in it are relative to its folder.

    Raises BadInputs with every fault that it finds.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except FileNotFoundError:
        found = "no such file"
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        found = str(error)
    else:
        return _resolved(path, raw)
    raise BadInput(path, expected="a TOML file", found=found, remedy="give the config of a run")


def _resolved(path: Path, raw: dict[str, Any]) -> TrainConfig:
    merged = _with_preset(path, raw)
    if isinstance(merged.get("data"), str):
        merged["data"] = [merged["data"]]
    try:
        config = TrainConfig.model_validate(merged)
    except ValidationError as error:
        raise BadInputs([_fault(path, dict(e)) for e in error.errors()]) from error
    folder = path.resolve().parent
    weights = config.model.image_weights
    return config.model_copy(
        update={
            "data": tuple(folder / p for p in config.data),
            "model": config.model.model_copy(
                update={"image_weights": folder / weights if weights else None}
            ),
            "run": config.run.model_copy(update={"out": folder / config.run.out}),
        }
    )


def _with_preset(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    preset = raw.get("preset")
    if preset in ("past", "default"):
        raise not_there_yet(f"{path}: preset", f"{preset!r}", 'use preset = "small"')
    if preset is not None and preset not in PRESETS:
        raise BadInput(
            f"{path}: preset",
            expected=f"one of {', '.join(PRESETS)}",
            found=repr(preset),
            remedy="choose one, or leave it out and give every value",
        )
    merged: dict[str, Any] = {key: value for key, value in raw.items() if key != "preset"}
    for section, values in PRESETS.get(preset or "", {}).items():
        given = raw.get(section, {})
        merged[section] = values | given if isinstance(given, dict) else given
    return merged


def _fault(path: Path, error: dict[str, Any]) -> BadInput:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return BadInput(
            f"{path}: {where}",
            expected="a key that the config has",
            found="an unknown one",
            remedy="correct or remove it",
        )
    if error["type"] == "missing":
        return BadInput(
            f"{path}: {where}",
            expected="a value",
            found="none",
            remedy='give it, or let preset = "small" fill it',
        )
    return BadInput(
        f"{path}: {where}",
        expected=str(error["msg"]),
        found=repr(error["input"]),
        remedy="correct the value",
    )
