"""The tuned image tower as other tools read it: a plain timm state dict.

    python -m trainer.export CHECKPOINT --out tower.safetensors

`timm.create_model(architecture, num_classes=0, **options)` takes it with `load_state_dict`, and
`model.image_weights` of another run does. What it was trained on stands in the metadata of a
.safetensors, each value as JSON, or beside a .pt in a .json.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from shards.artifact import write_atomically
from shards.errors import BadInput
from shards.schema import Record
from trainer.checkpoint import read_checkpoint_config, read_meta, read_model_state
from trainer.towers import ImageTower

_PREFIX = "image.network."


class ExportedTower(Record):
    """What one must know to build the network and to show it what it was trained on."""

    schema_version: Literal[1] = 1
    architecture: str  # of timm
    options: dict[str, Any]  # of timm.create_model
    mean: tuple[float, float, float]  # of RGB in 0 … 1
    std: tuple[float, float, float]
    image_px: int
    fov_um: float | Literal["patch"]  # edge of the field that image_px pixels show
    step: int
    checkpoint: str  # its fingerprint


def export_image_tower(checkpoint: Path, out: Path) -> ExportedTower:
    """Write the image tower of a checkpoint, proved first, to a .safetensors or a .pt.

    Raises BadInput for another suffix, or a checkpoint that is none or is damaged.
    """
    if out.suffix not in (".safetensors", ".pt"):
        raise BadInput(
            "--out",
            expected="a name that ends in .safetensors or .pt",
            found=out.name,
            remedy="choose one of the two",
        )
    meta = read_meta(checkpoint)
    model = read_checkpoint_config(checkpoint).model
    with torch.device("meta"):  # only its shape is needed
        network: Any = ImageTower(model).network
    state = {
        key.removeprefix(_PREFIX): value.contiguous()
        for key, value in read_model_state(checkpoint).items()
        if key.startswith(_PREFIX)
    }
    network.load_state_dict(state, assign=True)
    tower = ExportedTower(
        architecture=model.image,
        options=model.image_options,
        mean=network.pretrained_cfg["mean"],
        std=network.pretrained_cfg["std"],
        image_px=model.image_px,
        fov_um=model.fov_um,
        step=meta.step,
        checkpoint=meta.fingerprint,
    )
    if out.suffix == ".safetensors":
        told = {key: json.dumps(value) for key, value in tower.model_dump(mode="json").items()}
        write_atomically(out, safetensors.torch.save(state, metadata=told))
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(out.with_suffix(".json"), tower.model_dump_json(indent=1).encode())
        write_atomically(out, buffer.getvalue())
    return tower


def main(arguments: Sequence[str] | None = None) -> int:
    """0 done; 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        tower = export_image_tower(options.checkpoint, options.out)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{tower.architecture} after {tower.step} steps: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
