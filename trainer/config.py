"""The `train` config: TOML and a preset in, every number resolved and checked out."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from shards.errors import BadInput, BadInputs
from shards.remote import Location, is_url
from shards.schema import Record
from trainer.presets import PRESETS

Device = Literal["auto", "cpu", "cuda"]


class RankConfig(Record):
    """A transformer on the ranks of a cell's genes, as Nicheformer tokenises (docs/past.md)."""

    width: int = Field(ge=8)
    depth: int = Field(ge=1)
    heads: int = Field(ge=1)
    feedforward: int = Field(ge=8)
    context: int = Field(ge=4)  # tokens, the three of modality, assay and species among them
    dropout: float = Field(ge=0, lt=1)
    # Mean of the non-zero expression of each gene by which ranks are taken: a .csv or .parquet with
    # columns symbol or ensembl, and mean; null: computed from the training data.
    means: Path | None


class GraphConfig(Record):
    """Attention over a cell and its neighbours, fused into the cell's own features."""

    neighbors: int = Field(ge=1)  # at most so many, nearest first
    hidden: int = Field(ge=8)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)  # of the graph's attention and of the fusion's
    bias: float  # added to the fusion's logit of the graph, beside 0 of the cell itself


class ModelConfig(Record):
    """The two towers and the space in which they meet."""

    image: str  # name of a timm model
    image_options: dict[str, Any]  # of that model, as timm.create_model takes them
    image_weights: Path | None  # a state dict for it (.pt, .pth, .safetensors); null: random
    image_px: int = Field(ge=16)  # edge of the network's input
    # Central field that the network sees; "patch": all of it, and what that is once resolved.
    fov_um: Annotated[float, Field(gt=0)] | Literal["patch"]
    genes: Literal["mlp", "rank"]
    gene_hidden: tuple[int, ...] = Field(min_length=1)  # of mlp
    rank: RankConfig | None  # of rank
    graph: GraphConfig | None  # null: no neighbours are read
    projection: Literal["linear", "residual"]
    dropout: float = Field(ge=0, lt=1)  # of the gene MLP and of both projections
    embed_dim: int = Field(ge=1)

    @property
    def neighbors_k(self) -> int:
        """Neighbours that a sample is read with."""
        return self.graph.neighbors if self.graph is not None else 0

    @model_validator(mode="after")
    def _knows_its_encoder(self) -> ModelConfig:
        if (self.genes == "rank") != (self.rank is not None):
            raise ValueError('[model.rank] belongs to genes = "rank", and to no other')
        return self


class LossConfig(Record):
    """What pairs are pulled together by, and what is learned beside it."""

    kind: Literal["info_nce", "siglip", "soft_targets"]
    temperature: float = Field(gt=0)  # learned, from here, inside these bounds
    temperature_min: float = Field(gt=0)
    temperature_max: float = Field(gt=0)
    siglip_bias: float  # learned, from here
    image_expression: float = Field(ge=0)  # weight of predicting expression from the patch; 0: off
    masked_genes: float = Field(ge=0)  # weight of predicting masked genes from the others; 0: off
    masked_share: float = Field(ge=0, lt=1)  # of a cell's measured genes
    expression_family: Literal["negative_binomial", "poisson"]  # of both predictions

    @model_validator(mode="after")
    def _starts_inside(self) -> LossConfig:
        if not self.temperature_min <= self.temperature <= self.temperature_max:
            raise ValueError("temperature lies outside temperature_min … temperature_max")
        if (self.masked_genes > 0) != (self.masked_share > 0):
            raise ValueError("masked_genes and masked_share are both 0 or both not")
        return self


class OptimConfig(Record):
    """AdamW; the learning rate warms up linearly, then falls to lr_min along half a cosine.

    A length is given in steps or in epochs; resolved, both are steps.
    """

    steps: int | None = Field(ge=1)
    epochs: float | None = Field(gt=0)
    warmup_steps: int | None = Field(ge=0)
    warmup_epochs: float | None = Field(ge=0)
    lr: float = Field(gt=0)
    lr_min: float = Field(ge=0)
    image_lr_scale: float = Field(gt=0)  # of the image tower's own rate
    betas: tuple[float, float]
    weight_decay: float = Field(ge=0)
    grad_clip: float | None = Field(gt=0)  # norm over all parameters
    ema: float | None = Field(
        gt=0, lt=1
    )  # decay of the averaged parameters, kept beside; null: none
    precision: Literal["auto", "float32", "bfloat16", "float16"]  # auto: bfloat16 on CUDA

    @model_validator(mode="after")
    def _is_of_one_length(self) -> OptimConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("one of steps and epochs is given, the other null")
        if (self.warmup_steps is None) == (self.warmup_epochs is None):
            raise ValueError("one of warmup_steps and warmup_epochs is given, the other null")
        too_long = (
            self.steps is not None
            and self.warmup_steps is not None
            and self.warmup_steps >= self.steps
        ) or (
            self.epochs is not None
            and self.warmup_epochs is not None
            and self.warmup_epochs >= self.epochs
        )
        if too_long:
            raise ValueError(
                "a warm-up shorter than the run: give warmup_steps or warmup_epochs too, "
                "or the preset's stands"
            )
        if self.lr_min > self.lr:
            raise ValueError("lr_min is above lr")
        return self


class BlockConfig(Record):
    """How `reading = "block"` reads: pieces of shards whole, some of different runs at a time."""

    pieces: int = Field(ge=1)  # of different shards, mixed with each other
    piece_samples: int = Field(ge=1)  # one after the other in a shard: one read


class DataLoadingConfig(Record):
    """Batches and what training does to them; evaluation sees samples as they are."""

    batch_size: int = Field(ge=2)  # of all ranks together
    micro_batch: int | None = Field(ge=1)  # rows through the towers at a time; null: all of a rank
    workers: int = Field(ge=0)  # processes a rank that read and decode; 0: this one
    loader: Literal["ring", "torch"]  # torch: a plain DataLoader, slower, to compare with
    reading: Literal["global", "block"]  # block: for network file systems
    block: BlockConfig
    cache_bytes: int = Field(ge=1)  # of each process that reads blocks
    balanced: bool  # each batch holds each run in its share, not only on average
    cap: dict[Literal["run", "donor", "tissue"], Annotated[int, Field(ge=1)]]  # samples of each
    weight: dict[Literal["run", "donor", "tissue"], dict[str, Annotated[int, Field(ge=0)]]]
    verify: Literal["crc32", "sha256"]  # sha256: also whole shards, when first touched
    max_bad_samples: int = Field(ge=0)  # so many are left out and written down; one more stops
    shift_um: float = Field(ge=0)  # the patch moves by up to this along each axis
    zoom: float = Field(ge=1)  # magnified by 1/zoom … zoom
    turns: bool  # quarter turns and mirror images
    rotate_deg: float = Field(ge=0, le=45)  # beside them, by up to this
    blur_px: float = Field(ge=0)  # Gaussian of up to this sigma, in pixels of the network's input
    stain_gain: float = Field(ge=0)  # spread of the log gain of each optical-density channel
    stain_mix: float = Field(ge=0)  # spread of what leaks from a channel into each other one
    stain_offset: float = Field(ge=0)  # spread of the optical density added to each channel
    keep_counts: float = Field(gt=0, le=1)  # transcripts are thinned to a share of this … 1


def _not_a_url(value: object) -> object:
    if isinstance(value, str) and is_url(value):
        raise ValueError("a folder of this machine: checkpoints behind a URL are not there yet")
    return value


class RunConfig(Record):
    """Where a run writes, how often, and on what."""

    out: Annotated[Path, BeforeValidator(_not_a_url)]
    seed: int = Field(ge=0)
    device: Device
    compile: bool  # torch.compile of both towers
    checkpoint_activations: bool  # less memory for a second forward pass of the image tower
    log_every: int = Field(ge=1)
    checkpoint_every: int = Field(ge=1)
    keep_checkpoints: int = Field(ge=1)  # the newest; the best of validation is kept beside them
    validate_every: int | None = Field(ge=1)  # steps; null: no validation


class TrainConfig(Record):
    """A whole training run. Paths are absolute once read from a file."""

    data: tuple[Location, ...] = Field(min_length=1)
    model: ModelConfig
    loss: LossConfig
    optim: OptimConfig
    data_loading: DataLoadingConfig
    run: RunConfig


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
    return _with_absolute_paths(config, path.resolve().parent)


def _with_absolute_paths(config: TrainConfig, folder: Path) -> TrainConfig:
    model = config.model
    if model.image_weights is not None:
        model = model.model_copy(update={"image_weights": folder / model.image_weights})
    if model.rank is not None and model.rank.means is not None:
        rank = model.rank.model_copy(update={"means": folder / model.rank.means})
        model = model.model_copy(update={"rank": rank})
    return config.model_copy(
        update={
            "data": tuple(folder / p if isinstance(p, Path) else p for p in config.data),
            "model": model,
            "run": config.run.model_copy(update={"out": folder / config.run.out}),
        }
    )


def _with_preset(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    preset = raw.get("preset")
    if preset is not None and preset not in PRESETS:
        raise BadInput(
            f"{path}: preset",
            expected=f"one of {', '.join(PRESETS)}",
            found=repr(preset),
            remedy="choose one, or leave it out and give every value",
        )
    merged: dict[str, Any] = {key: value for key, value in raw.items() if key != "preset"}
    for section, values in PRESETS.get(preset or "", {}).items():
        merged[section] = _over(values, raw.get(section, {}))
    return merged


# Tables that a preset and a config share key by key; others, such as a network's options, are
# given whole.
_TABLES = {"rank", "graph", "block"}


def _over(preset: dict[str, Any] | None, given: Any) -> Any:
    """What is given over what the preset has, key by key; of two ways to give a length, one.

    TOML has no null: "none" stands for it.
    """
    if not isinstance(given, dict):
        return None if given == "none" else given
    merged = dict(preset or {})
    for key, value in given.items():
        merged[key] = _over(merged.get(key) if key in _TABLES else None, value)
        for one, other in (("steps", "epochs"), ("warmup_steps", "warmup_epochs")):
            if key in (one, other):
                merged |= {k: None for k in (one, other) if k in merged and k not in given}
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
    together = isinstance(error["input"], dict)
    return BadInput(
        f"{path}: {where}",
        expected=str(error["msg"]).removeprefix("Value error, "),
        found="values that do not go together" if together else repr(error["input"]),
        remedy="correct one of them" if together else "correct the value",
    )
