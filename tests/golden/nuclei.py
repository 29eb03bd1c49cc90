"""Fixed input of the nuclei stage: weights by hand, a slide that they read, and a drawn picture.

The weights let the colours of a pixel through to the output of the network, and the slide shows
flows and logits as colours. So all that comes after a network is exact, on any processor: the sums
of its convolutions have one term that is not zero.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile
import torch
from PIL import Image

from segmentation.config import weights_digest
from segmentation.network import CompactMetadata, CompactUNet

SLIDE_MPP, NETWORK_MPP = 0.25, 0.5
WIDTH, HEIGHT = 1792, 608
# Optical densities: a flow from -1 to 1 in red (y) and green (x), nucleus or not in blue.
_ZERO_OD, _RANGE_OD, _INSIDE_OD, _BORDER_OD = 0.5, 0.4, 0.8, 0.4
# Centre, half axes and a turn of the flow: (cos, sin) times 64.
Ellipse = tuple[int, int, int, int, tuple[int, int]]
STRAIGHT = (64, 0)


def ellipses() -> list[Ellipse]:
    """Nuclei of all sizes over the seams of blocks, some too small, some whose flow is wrong."""
    drawn: list[Ellipse] = []
    for j in range(7):
        for i in range(10):
            a, b = 16 + (i * 3 + j) % 5, 11 + (i + 2 * j) % 7
            drawn.append((44 + 78 * i + 3 * (j % 4), 44 + 82 * j + 2 * (i % 3), a, b, STRAIGHT))
    drawn[13] = (*drawn[13][:2], 5, 5, STRAIGHT)  # 4.9 µm²: too small
    drawn[17] = (*drawn[17][:2], 7, 7, STRAIGHT)
    drawn[24] = (*drawn[24][:4], (54, 34))  # turned by 32°: good enough
    drawn[27] = (*drawn[27][:4], (45, 45))  # by 45°: not
    drawn[35] = (drawn[34][0] + 30, *drawn[34][1:])  # touches the one before
    drawn.append((1630, 300, 18, 14, STRAIGHT))  # far away, beyond glass
    return drawn


def write_flow_slide(path: Path) -> Path:
    """Flows and logits of `ellipses` as colours, on tissue that flows nowhere, on glass."""
    flow = np.zeros((HEIGHT, WIDTH, 2))
    blue = np.zeros((HEIGHT, WIDTH))
    tissue = np.zeros((HEIGHT, WIDTH), bool)
    tissue[:, :820] = tissue[240:360, 1570:1690] = True
    y, x = 2 * np.mgrid[:HEIGHT, :WIDTH] + 1  # in half pixels
    for cx, cy, a, b, (cosine, sine) in ellipses():
        dx, dy = x - 2 * cx, y - 2 * cy
        inside = (dx * b) ** 2 + (dy * a) ** 2 < (2 * a * b) ** 2
        away = np.sqrt(dx[inside] ** 2 + dy[inside] ** 2)
        flow[inside, 0] = -(dy[inside] * cosine + dx[inside] * sine) / 64 / away
        flow[inside, 1] = -(dx[inside] * cosine - dy[inside] * sine) / 64 / away
        blue[inside] = _INSIDE_OD
    density = np.concatenate([_ZERO_OD + _RANGE_OD * flow, blue[..., None]], axis=-1)
    density[~tissue] = 0
    # Rounded, so that the last bit of a power is no matter.
    image = np.rint(255 * 10.0**-density).astype(np.uint8)
    sizes = {"PhysicalSizeX": SLIDE_MPP, "PhysicalSizeY": SLIDE_MPP}
    tifffile.imwrite(
        path, image, ome=True, metadata={"axes": "YXS", **sizes}, photometric="rgb",
        tile=(128, 128), compression="deflate",
    )  # fmt: skip
    return path


def write_weights(path: Path) -> Path:
    """A compact network whose every layer is zero or lets its input through."""
    net = CompactUNet((4, 4))
    state = {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
    for key in state:
        if key.endswith("running_var"):
            state[key] += 1
    for channel in range(3):
        state["stem.0.weight"][channel, channel, 1, 1] = 1
    state["stem.1.weight"] += 1
    # Cellpose's networks give five times the flow.
    for channel in range(2):
        state["head.weight"][channel, channel] = 5 / _RANGE_OD
        state["head.bias"][channel] = -5 * _ZERO_OD / _RANGE_OD
    state["head.weight"][2, 2], state["head.bias"][2] = 10, -10 * _BORDER_OD
    torch.save(state, path)
    metadata = CompactMetadata(
        weights_sha256=weights_digest(str(path)), mpp=NETWORK_MPP,
        normalisation="optical_density", widths=net.widths, command="", seed=0, n_steps=0,
        n_real_tiles=0, n_simulated_tiles=0, real_tiles_sha256="", simulated_tiles_sha256="",
        left_out_group=None,
    )  # fmt: skip
    path.with_suffix(".json").write_text(metadata.model_dump_json())
    return path


def write_drawn_picture(path: Path) -> Path:
    """Dark ellipses on pink, for the network that ships; 0.5 µm a pixel."""
    side = 256
    y, x = 2 * np.mgrid[:side, :side] + 1
    image: npt.NDArray[np.int64] = np.stack([np.full((side, side), v) for v in (228, 186, 214)], -1)
    for j in range(6):
        for i in range(6):
            cx, cy, a, b = 24 + 41 * i + 3 * (j % 3), 24 + 41 * j, 8 + (i + j) % 3, 6 + i % 3
            inside = ((x - 2 * cx) * b) ** 2 + ((y - 2 * cy) * a) ** 2 < (2 * a * b) ** 2
            image[inside] = (104, 66, 138)
    image += ((3 * x + 5 * y + x * y // 64) % 13)[..., None] - 6
    Image.fromarray(image.astype(np.uint8)).save(path)
    return path
