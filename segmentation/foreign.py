"""Cellpose 4 networks other than our own, built from the weights that Cellpose saves.

Those on SAM are Cellpose's own class. Those on DINOv3 are written here from the published design
(Siméoni et al., DINOv3, arXiv 2508.10104), under the names that Cellpose's files use: Cellpose
itself needs a package for them that no registry has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from cellpose.vit import CPSAM, BaseModel
from torch import nn
from torch.nn import functional

from shards.errors import BadInput

# Cellpose 4 networks were trained with objects scaled to 30 px; a nucleus of 8 µm is that wide
# at 0.27 µm a pixel, close to a 40x scan.
FOREIGN_MPP: Final = 8.0 / 30.0
# The positions that a network on SAM has learned are of this window; for those on DINOv3, which
# takes any multiple of 8 px, it is Cellpose's default.
SAM_WINDOW_PX: Final = 256
DINO_WINDOW_PX: Final = 384
# No less than Cellpose's own windows overlap on a large picture: a sixth, 43 and 64 px.
OVERLAP_PX: Final = 64
# Output pixels along a token's edge.
_TOKEN_PX: Final = 8
# ViT-B and ViT-L by the width of their tokens, which is how Cellpose tells them: layers, heads.
_DINO_OF_WIDTH: Final = {768: (12, 12), 1024: (24, 16)}
# In DINOv3's files, and of no use but in its own training.
_ONLY_OF_TRAINING: Final = ("encoder.mask_token", "encoder.local_cls_norm.")
# Cellpose's note of the diameter of its training objects, which the network doesn't use; its
# first networks had none, and it takes 30 px for them.
_DIAMETERS: Final = ("diam_labels", "diam_mean")


@dataclass(frozen=True, slots=True)
class ForeignNetwork:
    """A Cellpose 4 network, ready to run, and the grid that it wants.

    `net` (eval mode, float32, on the CPU, without gradients) takes (B, 3, `window_px`,
    `window_px`) RGB of 0 … 1 at `mpp` and gives a tuple whose first part is (B, 3, `window_px`,
    `window_px`): 5 * flow y, 5 * flow x, logit. Windows overlap by `overlap_px`.
    """

    net: nn.Module
    window_px: int
    overlap_px: int = OVERLAP_PX
    mpp: float = FOREIGN_MPP


def foreign_network(path: Path, state: Mapping[str, torch.Tensor]) -> ForeignNetwork:
    """The network of Cellpose 4 weights, on SAM or on DINOv3, told as Cellpose tells them.

    `state` is what `read_state` read from `path`; a `module.` that data-parallel training left
    before its keys is taken off. Raises BadInput for weights of Cellpose 3 and of anything else,
    and where a tensor is missing, unknown, of another shape or not finite: Cellpose itself leaves
    what is missing at random, and ignores what it does not know.
    """
    diameters = {key: torch.tensor([30.0]) for key in _DIAMETERS}
    state = diameters | {key.removeprefix("module."): value for key, value in state.items()}
    if "W2" not in state:
        raise _refusal(path, "Cellpose 4 weights, which have a W2", _without_w2(state))
    with torch.device("meta"):  # shapes alone: the weights come from the state
        if "encoder.cls_token" in state:
            net, window_px = _dino_network(path, state), DINO_WINDOW_PX
        else:
            net, window_px = CPSAM(), SAM_WINDOW_PX
    state = {key: v for key, v in state.items() if not key.startswith(_ONLY_OF_TRAINING)}
    faults = _faults(net.state_dict(), state)
    if faults:
        raise _refusal(path, f"Cellpose 4 weights of a {net.backbone}", "; ".join(faults))
    weights = {key: value.to(torch.float32) for key, value in state.items()}
    net.load_state_dict(weights, strict=True, assign=True)
    return ForeignNetwork(net.eval().requires_grad_(False), window_px)


def _dino_network(path: Path, state: Mapping[str, torch.Tensor]) -> DinoNetwork:
    patch = state.get("encoder.patch_embed.proj.weight", torch.empty(0))
    width = patch.shape[0] if patch.ndim else 0
    if width not in _DINO_OF_WIDTH:
        known = " or ".join(map(str, _DINO_OF_WIDTH))
        found = f"{width} rows in encoder.patch_embed.proj.weight"
        raise _refusal(path, f"Cellpose 4 weights of a DINOv3 of width {known}", found)
    n_layers, n_heads = _DINO_OF_WIDTH[width]
    return DinoNetwork(width, n_layers, n_heads)


def _without_w2(state: Mapping[str, torch.Tensor]) -> str:
    if any(key.startswith(("downsample.", "upsample.")) for key in state):
        return "weights of Cellpose 3, which Cellpose 4 cannot use"
    names = ", ".join(sorted(set(state) - set(_DIAMETERS))[:3]) or "none"
    return f"no W2: weights of Cellpose 3, or of another program (tensors: {names})"


def _faults(expected: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[str]:
    """What is wrong with the tensors of a state: for each kind of fault how many, and the first."""
    both = [key for key in expected if key in state]
    misshapen = [key for key in both if state[key].shape != expected[key].shape]
    plain = [k for k in both if state[k].is_floating_point() and state[k].layout == torch.strided]
    kinds = {
        "missing": [key for key in expected if key not in state],
        "unknown": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} {tuple(state[key].shape)}, not {tuple(expected[key].shape)}"
            for key in misshapen
        ],
        "no plain floating-point numbers": [key for key in both if key not in plain],
        "not finite": [
            key
            for key in plain
            if key not in misshapen and not all(map(torch.isfinite, state[key].float().aminmax()))
        ],
    }
    return [f"{len(keys)} {kind} (first {keys[0]})" for kind, keys in kinds.items() if keys]


def _refusal(path: Path, expected: str, found: str) -> BadInput:
    return BadInput(
        path,
        expected=expected,
        found=found,
        remedy="give model = compact, or the path of weights that Cellpose 4 saved",
    )


class DinoNetwork(BaseModel):  # type: ignore[misc]  # cellpose has no types
    """Cellpose's network on a DINOv3 vision transformer: tokens of 16 px every 8 px.

    Input (B, 3, Y, X), Y and X multiples of 8. State keys are those of Cellpose's CPDINO without
    what only DINOv3's training needs. `n_storage` tokens beside the class token belong to no
    place.
    """

    backbone = "dino"

    def __init__(self, width: int, n_layers: int, n_heads: int, n_storage: int = 4) -> None:
        super().__init__(dtype=torch.float32)
        self.encoder = _Encoder(width, n_layers, n_heads, n_storage)
        n_out = 3 * _TOKEN_PX**2
        self.out = nn.Linear(width, n_out)
        # Lays the values of a token out as its pixels.
        layout = torch.eye(n_out).reshape(n_out, 3, _TOKEN_PX, _TOKEN_PX)
        self.W2 = nn.Parameter(layout, requires_grad=False)

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The output (B, 3, Y, X) and a style vector of zeros (B, 256), which Cellpose expects."""
        values_BCHW = self.out(self.encoder(x_BCHW)).permute(0, 3, 1, 2)
        pixels_BCHW = functional.conv_transpose2d(values_BCHW, self.W2, stride=_TOKEN_PX)
        return pixels_BCHW, x_BCHW.new_zeros((len(x_BCHW), 256))


class _Encoder(nn.Module):
    def __init__(self, width: int, n_layers: int, n_heads: int, n_storage: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.storage_tokens = nn.Parameter(torch.zeros(1, n_storage, width))
        proj = nn.Conv2d(3, width, 2 * _TOKEN_PX, stride=_TOKEN_PX, padding=_TOKEN_PX // 2)
        self.patch_embed = nn.ModuleDict({"proj": proj})
        self.rope_embed = _Rotations(width // n_heads)
        self.blocks = nn.ModuleList(_Block(width, n_heads) for _ in range(n_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Tokens by place, (B, Y, X, D)."""
        places_BDYX = self.patch_embed["proj"](x_BCHW)
        n_y, n_x = places_BDYX.shape[2:]
        placeless = [t.expand(len(x_BCHW), -1, -1) for t in (self.cls_token, self.storage_tokens)]
        x_BND = torch.cat([*placeless, places_BDYX.flatten(2).transpose(1, 2)], dim=1)
        cos_PF, sin_PF = self.rope_embed(n_y, n_x)
        for block in self.blocks:
            x_BND = block(x_BND, cos_PF, sin_PF)
        places_BPD: torch.Tensor = self.norm(x_BND[:, -n_y * n_x :])
        return places_BPD.reshape(len(x_BCHW), n_y, n_x, -1)


class _Rotations(nn.Module):
    """The angles by which queries and keys are turned, for every place of a grid.

    A place is (y, x) in -1 … 1 over the window, whatever its size; each is divided by every
    period, a quarter of a head's width in number, and counts whole turns.
    """

    periods: torch.Tensor

    def __init__(self, head_width: int) -> None:
        super().__init__()
        exponents = torch.arange(head_width // 4) / (head_width // 4)
        self.register_buffer("periods", 100.0**exponents)

    def forward(self, n_y: int, n_x: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (places, half a head's width), float32 whatever the network's type."""
        axes = [
            2 * (torch.arange(n, dtype=torch.float32, device=self.periods.device) + 0.5) / n - 1
            for n in (n_y, n_x)
        ]
        places_P21 = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 2, 1)
        angles_PF = (2 * math.pi * places_P21 / self.periods).flatten(1)
        return angles_PF.cos(), angles_PF.sin()


class _Block(nn.Module):
    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width, n_heads)
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(width)})
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(width)})

    def forward(
        self, x_BND: torch.Tensor, cos_PF: torch.Tensor, sin_PF: torch.Tensor
    ) -> torch.Tensor:
        x_BND = x_BND + self.ls1["gamma"] * self.attn(self.norm1(x_BND), cos_PF, sin_PF)
        inner = functional.gelu(self.mlp["fc1"](self.norm2(x_BND)))
        out_BND: torch.Tensor = x_BND + self.ls2["gamma"] * self.mlp["fc2"](inner)
        return out_BND


class _Attention(nn.Module):
    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = _MaskedLinear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x_BND: torch.Tensor, cos_PF: torch.Tensor, sin_PF: torch.Tensor
    ) -> torch.Tensor:
        qkv_BN3HF = self.qkv(x_BND).unflatten(-1, (3, self.n_heads, -1))
        q, k, v = qkv_BN3HF.permute(2, 0, 3, 1, 4)
        q, k = _turned(q, cos_PF, sin_PF), _turned(k, cos_PF, sin_PF)
        x_BHNF = functional.scaled_dot_product_attention(q, k, v)
        projected: torch.Tensor = self.proj(x_BHNF.transpose(1, 2).flatten(2))
        return projected


class _MaskedLinear(nn.Linear):
    """A linear layer whose bias counts where a mask that is saved with it says so."""

    bias_mask: torch.Tensor

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.register_buffer("bias_mask", torch.ones(n_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = functional.linear(x, self.weight, self.bias * self.bias_mask)
        return y


def _turned(x_BHNF: torch.Tensor, cos_PF: torch.Tensor, sin_PF: torch.Tensor) -> torch.Tensor:
    """Queries or keys, turned by their place; the tokens before those of the places stay."""
    placeless, places = x_BHNF[:, :, : -len(cos_PF)], x_BHNF[:, :, -len(cos_PF) :]
    # A feature makes a plane with the one half a head's width after it.
    a, b = places.chunk(2, dim=-1)
    turned = torch.cat([a * cos_PF - b * sin_PF, b * cos_PF + a * sin_PF], dim=-1)
    return torch.cat([placeless, turned.to(x_BHNF.dtype)], dim=2)
