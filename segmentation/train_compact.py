"""Makes compact weights: those that ship, the fold networks that score them, and students.

`python -m segmentation.train_compact --data DIR --out compact.pt` trains on all labelled tiles of
DIR and on simulated ones; `--leave-out-group K` leaves out the real tiles of one stain group.
`--teacher WEIGHTS --pictures DIR --mpp M` distils: the compact network learns what another one
finds on unlabelled pictures of that pixel size, beside the labelled tiles where --data is given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from cellpose.dynamics import labels_to_flows
from torch.nn import functional

from segmentation.augment import Example, random_crop
from segmentation.network import CompactMetadata, CompactUNet, load_model
from segmentation.simulated_tiles import simulated_tiles
from segmentation.stain import optical_density
from segmentation.teaching import Teaching, taught_tiles
from segmentation.tiles import LabelledTile, content_sha256, read_tiles, resampled
from shards.errors import BadInput

# A nucleus of 8 µm is 16 px wide: half the pixels of 0.35 µm a pixel, and a 20x scan's own size.
MPP = 0.5
CROP_PX = 160
MAX_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 1e-2
SIMULATED_SHARE = 0.35  # of the crops of a batch, where there are others too
GROUPS_PATH = Path(__file__).parent / "nuclei_groups.json"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a training is done with beside the tiles: the defaults are those of what ships.

    `widths` are multiples of 16: torch's backward pass of 8 channels in bfloat16 crashes (2.13).
    """

    widths: tuple[int, ...] = (16, 32, 64, 128, 192)
    n_steps: int = 800
    batch: int = 16
    n_simulated: int = 192
    seed: int = 0


def example_of(tile: LabelledTile) -> Example:
    """A tile at the network's pixel size with Cellpose's own flows as targets."""
    flows = labels_to_flows([tile.labels.copy()], device=torch.device("cpu"))[0]
    target = np.ascontiguousarray(flows[1:4].transpose(1, 2, 0))
    # A dense tile teaches more, but a hundred nuclei are not worth a hundred tiles of one.
    return Example(optical_density(tile.rgb), target, float(np.sqrt(max(tile.n_nuclei, 1))))


def loss_of(
    y_BCHW: torch.Tensor, target_BCHW: torch.Tensor, inside_BHW: torch.Tensor
) -> torch.Tensor:
    """Cellpose's training loss (half MSE of 5 * flows, plus BCE), over the pixels of tiles only."""
    flow = functional.mse_loss(y_BCHW[:, :2], 5 * target_BCHW[:, 1:], reduction="none").mean(1)
    inside_logit = y_BCHW[:, 2]
    cell = functional.binary_cross_entropy_with_logits(
        inside_logit, target_BCHW[:, 0], reduction="none"
    )
    return ((flow / 2 + cell) * inside_BHW).sum() / inside_BHW.sum()


def draw_batch(
    labelled: list[Example], simulated: list[Example], batch: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Densities (B, 3, Y, X), targets (B, 3, Y, X) and insides (B, Y, X) of random crops.

    One of the two lists may be empty.
    """
    share = SIMULATED_SHARE if labelled and simulated else float(not labelled)
    crops = []
    for _ in range(batch):
        pool = simulated if rng.random() < share else labelled
        weights = np.array([example.weight for example in pool])
        chosen = pool[rng.choice(len(pool), p=weights / weights.sum())]
        crops.append(random_crop(chosen, CROP_PX, rng))
    # Seen as (B, C, Y, X), but channels stay last in memory, where convolutions are faster.
    density, target, inside = (
        torch.from_numpy(np.stack(part)) for part in zip(*crops, strict=True)
    )
    return density.permute(0, 3, 1, 2), target.permute(0, 3, 1, 2), inside


def train(labelled: list[Example], simulated: list[Example], recipe: Recipe) -> CompactUNet:
    """The network after the recipe's batches: AdamW, one cycle of the learning rate, bfloat16."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    net = CompactUNet(recipe.widths)
    net.to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, MAX_LEARNING_RATE, total_steps=recipe.n_steps, pct_start=0.15
    )
    started_s, losses = time.process_time(), []
    for step in range(1, recipe.n_steps + 1):
        density_BCHW, target_BCHW, inside_BHW = draw_batch(labelled, simulated, recipe.batch, rng)
        with torch.autocast("cpu", torch.bfloat16):
            y_BCHW, _ = net(density_BCHW)
        loss = loss_of(y_BCHW.float(), target_BCHW, inside_BHW)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0:
            cpu_s = time.process_time() - started_s
            print(f"step {step}: loss {np.mean(losses[-50:]):.3f}, {cpu_s:.0f} CPU s", flush=True)
    net.eval()
    return net


def stain_group_of_tile() -> dict[str, int]:
    """Tile id to stain group, as committed before any training (benchmarks/nuclei_groups.py)."""
    groups: dict[str, int] = json.loads(GROUPS_PATH.read_text())
    return groups


def real_tiles(data: Path, left_out_group: int | None) -> list[LabelledTile]:
    """The labelled tiles of a folder, without those of one stain group where one is named.

    Raises BadInput as `read_tiles`, and for a tile that is in no group where one is left out.
    """
    tiles = read_tiles(data)
    if left_out_group is None:
        return tiles
    group_of_tile = stain_group_of_tile()
    unknown = [tile.tile_id for tile in tiles if tile.tile_id not in group_of_tile]
    if unknown:
        raise BadInput(
            data,
            expected=f"tiles of {GROUPS_PATH.name}, of which a group can be left out",
            found=f"{unknown[0]}, which is in no group",
            remedy="train without --leave-out-group, or name the folder of the 59 tiles",
        )
    return [tile for tile in tiles if group_of_tile[tile.tile_id] != left_out_group]


def train_and_save(
    out: Path,
    data: Path | None,
    recipe: Recipe,
    left_out_group: int | None = None,
    teaching: Teaching | None = None,
) -> CompactMetadata:
    """Train on labelled, taught and simulated tiles; write `out` and its metadata beside it.

    The weights are stored as float16, which loads with `weights_only=True` and is read as float32.
    Raises BadInput as `real_tiles`, `load_model` and `taught_tiles` do.
    """
    torch.set_num_threads(1)  # what byte identity is promised for
    real = [] if data is None else real_tiles(data, left_out_group)
    taught: list[LabelledTile] = []
    if teaching is not None:
        teacher = load_model(teaching.teacher)  # a large one on the GPU, where there is one
        taught = taught_tiles(teaching, teacher.mpp, lambda rgb: teacher.find(rgb)[0], MPP)
    simulated = simulated_tiles(recipe.seed, recipe.n_simulated, MPP)
    net = train(
        [example_of(resampled(tile, MPP)) for tile in real] + [example_of(t) for t in taught],
        [example_of(tile) for tile in simulated],
        recipe,
    )
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in net.to(memory_format=torch.contiguous_format).state_dict().items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, out)
    metadata = CompactMetadata(
        weights_sha256=hashlib.sha256(out.read_bytes()).hexdigest(),
        mpp=MPP,
        normalisation="optical_density",
        widths=recipe.widths,
        command=_command(out, data, recipe, left_out_group, teaching),
        seed=recipe.seed,
        n_steps=recipe.n_steps,
        n_real_tiles=len(real),
        n_simulated_tiles=len(simulated),
        real_tiles_sha256=content_sha256(real),
        simulated_tiles_sha256=content_sha256(simulated),
        left_out_group=left_out_group,
        teacher_sha256=None if teaching is None else teacher.weights_sha256,
        n_taught_tiles=len(taught),
        taught_tiles_sha256=None if teaching is None else content_sha256(taught),
    )
    out.with_suffix(".json").write_text(metadata.model_dump_json(indent=1) + "\n")
    return metadata


def _command(
    out: Path,
    data: Path | None,
    recipe: Recipe,
    left_out_group: int | None,
    teaching: Teaching | None,
) -> str:
    """The command that trains such weights; folders by what they hold, since paths are nobody's."""
    parts = ["python -m segmentation.train_compact"]
    if data is not None:
        parts.append("--data DATA")
    if teaching is not None:
        parts.append(f"--teacher WEIGHTS --pictures PICTURES --mpp {teaching.mpp:g}")
    parts.append(f"--out {out.name} --seed {recipe.seed}")
    if left_out_group is not None:
        parts.append(f"--leave-out-group {left_out_group}")
    return " ".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of labelled tiles")
    parser.add_argument("--out", type=Path, required=True, help="weights, with .json beside them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--leave-out-group", type=int, help="stain group to train without")
    parser.add_argument("--teacher", help="weights to learn from: any that `model` takes")
    parser.add_argument("--pictures", type=Path, help="folder of unlabelled pictures for --teacher")
    parser.add_argument("--mpp", type=float, help="µm per pixel of --pictures")
    given = parser.parse_args(arguments)
    teaching = None
    if given.teacher is not None:
        if given.pictures is None or given.mpp is None:
            parser.error("--teacher needs --pictures and their --mpp")
        teaching = Teaching(given.teacher, given.pictures, given.mpp)
    elif given.data is None or given.pictures is not None or given.mpp is not None:
        parser.error("give --data, or --teacher with --pictures and --mpp, or all of them")
    recipe = replace(Recipe(), seed=given.seed)
    try:
        train_and_save(given.out, given.data, recipe, given.leave_out_group, teaching)
    except BadInput as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
