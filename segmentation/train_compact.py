"""Makes the compact weights that ship, and the fold networks by which they are scored.

`python -m segmentation.train_compact --data DIR --out compact.pt` trains on all real tiles of DIR
and on simulated ones; `--leave-out-group K` leaves out the real tiles of one stain group.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from cellpose.dynamics import labels_to_flows
from torch.nn import functional

from pairing.simulate.tile import labelled_tile
from segmentation.network import CompactMetadata, CompactUNet
from segmentation.stain import optical_density
from segmentation.tiles import (
    LabelledTile,
    content_sha256,
    read_tiles,
    resampled,
)

# A nucleus of 8 µm is 16 px wide: half the pixels of 0.35 µm a pixel, and a 20x scan's own size.
MPP = 0.5
WIDTHS = (16, 32, 64, 96, 128)
CROP_PX = 160
BATCH = 16
N_STEPS = 800
MAX_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 1e-2
N_SIMULATED = 48
SIMULATED_PX = 256
SIMULATED_SHARE = 0.35  # of the crops of a batch
GROUPS_PATH = Path(__file__).parent / "nuclei_groups.json"

# Haematoxylin, eosin and a third direction orthogonal to both, as unit optical densities
# (Ruifrok and Johnston 2001): only a frame in which stains are perturbed.
_HE = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
_STAINS = np.vstack([_HE, np.cross(_HE[0], _HE[1])])
_STAINS /= np.linalg.norm(_STAINS, axis=1, keepdims=True)

Pixels = npt.NDArray[Any]  # floating, (Y, X, channels)


@dataclass(frozen=True, slots=True)
class Example:
    """`density` (Y, X, 3) and `target` (Y, X, 3): inside a nucleus or not, flow y, flow x."""

    density: Pixels
    target: Pixels
    weight: float  # relative chance to be drawn


def example_of(tile: LabelledTile) -> Example:
    """A tile at the network's pixel size with Cellpose's own flows as targets."""
    flows = labels_to_flows([tile.labels.copy()], device=torch.device("cpu"))[0]
    target = np.ascontiguousarray(flows[1:4].transpose(1, 2, 0))
    # A dense tile teaches more, but a hundred nuclei are not worth a hundred tiles of one.
    return Example(optical_density(tile.rgb), target, float(np.sqrt(tile.n_nuclei)))


def restained(density: Pixels, rng: np.random.Generator) -> Pixels:
    """The same tissue in another stain, scanner and focus: what the left-out groups differ in."""
    if rng.random() < 0.5:
        density = density - np.percentile(density, 2, axis=(0, 1))
    stains = _STAINS + rng.normal(0, [[0.15], [0.2], [0.1]], (3, 3))
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    amounts = np.exp(rng.uniform([-0.5, -0.8, -0.8], [0.5, 0.8, 0.2]))
    density = density @ (np.linalg.inv(_STAINS) * amounts @ stains).astype(np.float32)
    if rng.random() < 0.2:
        grey = rng.random() * density.mean(axis=2, keepdims=True)
        density = density * rng.random() + grey
    density = np.maximum(density, 0) ** np.float32(rng.uniform(0.8, 1.25))
    if rng.random() < 0.5:
        density = density + rng.uniform(0, 0.2, 3).astype(np.float32)
    focus = rng.random()
    if focus < 0.4:
        density = cv2.GaussianBlur(density, (0, 0), rng.uniform(0.3, 1.2))
    elif focus < 0.6:
        soft = cv2.GaussianBlur(density, (0, 0), 1.0)
        density = density + rng.uniform(0.3, 1.0) * (density - soft)
    if rng.random() < 0.5:
        noise = rng.standard_normal(density.shape, np.float32)
        density = density + rng.uniform(0, 0.04) * noise
    return np.clip(density, 0, np.log10(255)).astype(np.float32)


def random_crop(example: Example, rng: np.random.Generator) -> tuple[Pixels, Pixels, Pixels]:
    """A turned, scaled, mirrored and restained crop: density, target, and where the tile is.

    Outside the tile the density is 0, as in Cellpose's padding, and nothing is learned.
    """
    height, width = example.density.shape[:2]
    angle, scale = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(-0.3, 0.3))
    mirror = rng.choice([-1.0, 1.0])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turn = turn @ np.diag([mirror, 1.0])
    linear = scale * turn
    # The crop's centre lies anywhere in the tile that leaves it mostly inside.
    margin = np.minimum(0.35 * CROP_PX / scale, 0.5 * np.array([width, height]))
    centre = rng.uniform(margin, np.array([width, height]) - margin)
    crop_from_tile = np.column_stack([linear, CROP_PX / 2 - linear @ centre])
    size = (CROP_PX, CROP_PX)
    density = cv2.warpAffine(restained(example.density, rng), crop_from_tile, size)
    target = cv2.warpAffine(example.target, crop_from_tile, size)
    inside = cv2.warpAffine(np.ones((height, width), np.float32), crop_from_tile, size)
    flow_xy = target[..., [2, 1]] @ turn.T.astype(np.float32)
    target = np.concatenate([target[..., :1] > 0.5, flow_xy[..., ::-1]], axis=2)
    return density, target.astype(np.float32), (inside > 0.99).astype(np.float32)


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
    real: list[Example], simulated: list[Example], rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Densities (B, 3, Y, X), targets (B, 3, Y, X) and insides (B, Y, X) of random crops."""
    crops = []
    for _ in range(BATCH):
        pool = simulated if rng.random() < SIMULATED_SHARE else real
        weights = np.array([example.weight for example in pool])
        crops.append(random_crop(pool[rng.choice(len(pool), p=weights / weights.sum())], rng))
    # Seen as (B, C, Y, X), but channels stay last in memory, where convolutions are faster.
    density, target, inside = (
        torch.from_numpy(np.stack(part)) for part in zip(*crops, strict=True)
    )
    return density.permute(0, 3, 1, 2), target.permute(0, 3, 1, 2), inside


def train(
    real: list[Example], simulated: list[Example], seed: int, n_steps: int = N_STEPS
) -> CompactUNet:
    """The network after `n_steps` batches: AdamW, one cycle of the learning rate, bfloat16."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = CompactUNet(WIDTHS)
    net.to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, MAX_LEARNING_RATE, total_steps=n_steps, pct_start=0.15
    )
    started_s, losses = time.process_time(), []
    for step in range(1, n_steps + 1):
        density_BCHW, target_BCHW, inside_BHW = draw_batch(real, simulated, rng)
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


def simulated_tiles(seed: int) -> list[LabelledTile]:
    """Simulated H&E with its true nuclei, at the network's pixel size."""
    tiles = []
    for i in range(N_SIMULATED):
        rgb, labels = labelled_tile(1000 * seed + i, SIMULATED_PX, MPP)
        tiles.append(LabelledTile(f"simulated-{i}", rgb, labels, MPP))
    return tiles


def stain_group_of_tile() -> dict[str, int]:
    """Tile id to stain group, as committed before any training (benchmarks/nuclei_groups.py)."""
    groups: dict[str, int] = json.loads(GROUPS_PATH.read_text())
    return groups


def train_and_save(data: Path, out: Path, seed: int, left_out_group: int | None) -> CompactMetadata:
    """Train on the tiles of `data` and on simulated ones; write `out` and its metadata beside it.

    The weights are stored as float16, which loads with `weights_only=True` and is read as float32.
    """
    torch.set_num_threads(1)  # what byte identity is promised for
    group_of_tile = stain_group_of_tile()
    real = read_tiles(data)
    if left_out_group is not None:
        real = [tile for tile in real if group_of_tile[tile.tile_id] != left_out_group]
    simulated = simulated_tiles(seed)
    net = train(
        [example_of(resampled(tile, MPP)) for tile in real],
        [example_of(tile) for tile in simulated],
        seed,
    )
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in net.to(memory_format=torch.contiguous_format).state_dict().items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, out)
    leave_out = "" if left_out_group is None else f" --leave-out-group {left_out_group}"
    metadata = CompactMetadata(
        weights_sha256=hashlib.sha256(out.read_bytes()).hexdigest(),
        mpp=MPP,
        normalisation="optical_density",
        widths=WIDTHS,
        command=f"python -m segmentation.train_compact --data DATA --out {out.name} --seed {seed}"
        + leave_out,
        seed=seed,
        n_steps=N_STEPS,
        n_real_tiles=len(real),
        n_simulated_tiles=len(simulated),
        real_tiles_sha256=content_sha256(real),
        simulated_tiles_sha256=content_sha256(simulated),
        left_out_group=left_out_group,
    )
    out.with_suffix(".json").write_text(metadata.model_dump_json(indent=1) + "\n")
    return metadata


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled tiles")
    parser.add_argument("--out", type=Path, required=True, help="weights, with .json beside them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--leave-out-group", type=int, help="stain group to train without")
    given = parser.parse_args()
    train_and_save(given.data, given.out, given.seed, given.leave_out_group)


if __name__ == "__main__":
    main()
