"""Cellpose networks, loaded once a process: the compact one that ships, any other by its path."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from cellpose.vit import BaseModel
from pydantic import Field
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from segmentation.config import weights_digest, weights_path
from segmentation.dynamics import Labels
from segmentation.foreign import foreign_network
from segmentation.picture import find_in_picture
from segmentation.stain import Normalisation, NormalisationKind
from segmentation.weights_file import read_state
from shards.errors import BadInput
from shards.schema import Record

log = logging.getLogger("cellpair")

# A window of the compact network, and how much it shares with the next: an output is blended where
# less than this is seen around it.
_COMPACT_WINDOW_PX: Final = 512
_COMPACT_OVERLAP_PX: Final = 64
_GPU_BATCH: Final = 16
# The key by which our files are told from other Cellpose 4 weights.
_OWN_KEY = "stem.0.weight"


class CompactMetadata(Record):
    """`<weights>.json` beside compact weights: what they are for and what made them.

    `mpp` is the pixel size at which the network works; `normalisation` names how pixels become its
    input; `scores` are F1 at IoU 0.5 of the fold networks by stain group, out of fold, as
    benchmarks.nuclei measures and records them. `teacher_sha256` is of the weights that a network
    was distilled from, `taught_tiles_sha256` of the pictures with that teacher's masks.
    """

    weights_sha256: str
    mpp: float = Field(gt=0)
    normalisation: NormalisationKind
    widths: tuple[int, ...]
    command: str
    seed: int
    n_steps: int
    n_real_tiles: int
    n_simulated_tiles: int
    real_tiles_sha256: str
    simulated_tiles_sha256: str
    left_out_group: int | None
    teacher_sha256: str | None = None
    n_taught_tiles: int = 0
    taught_tiles_sha256: str | None = None
    scores: dict[str, float] = {}


def _conv_norm(n_in: int, n_out: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out))


class _Residual(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__()
        self.first = _conv_norm(n_in, n_out, stride)
        self.second = _conv_norm(n_out, n_out)
        self.skip = (
            nn.Identity()
            if n_in == n_out and stride == 1
            else nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False)
        )

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        inner = self.second(functional.relu(self.first(x_BCHW)))
        return functional.relu(inner + self.skip(x_BCHW))


class CompactUNet(BaseModel):  # type: ignore[misc]  # cellpose has no types
    """A residual U-Net with the outputs of a Cellpose network: 5 * flow y, 5 * flow x, logit.

    Input (B, 3, Y, X) optical densities, Y and X multiples of 2 ** (len(widths) - 1); zero is
    clear glass, so that Cellpose's padding with zeros looks like glass too.
    """

    backbone = "compact_unet"

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__(dtype=torch.float32)
        self.widths = widths
        self.stem = nn.Sequential(*_conv_norm(3, widths[0]), nn.ReLU())
        pairs = list(itertools.pairwise(widths))
        self.down = nn.ModuleList(_Residual(fine, coarse, stride=2) for fine, coarse in pairs)
        self.lateral = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for fine, coarse in pairs)
        self.up = nn.ModuleList(_Residual(fine, fine) for fine, _ in pairs)
        self.head = nn.Conv2d(widths[0], 3, 1)
        # Cellpose takes a state dict for one of version 4 by this key alone.
        self.W2 = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The output (B, 3, Y, X) and a style vector of zeros (B, 256), which Cellpose expects."""
        skips = [self.stem(x_BCHW)]
        for down in self.down:
            skips.append(down(skips[-1]))
        x = skips.pop()
        for lateral, up in zip(reversed(self.lateral), reversed(self.up), strict=True):
            fine = functional.interpolate(lateral(x), scale_factor=2.0, mode="nearest")
            x = up(fine + skips.pop())
        return self.head(x), x.new_zeros((len(x_BCHW), 256))

    def fused(self) -> CompactUNet:
        """The same network for use alone: batch normalisation is part of the convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Sequential):
                conv, norm = module[0], module[1]
                assert isinstance(conv, nn.Conv2d)
                assert isinstance(norm, nn.BatchNorm2d)
                module[0], module[1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
        return self


class NucleusNetwork:
    """A loaded network: its windows, its pixel size and what it wants to see of a slide.

    Windows of `window_px` overlap by `overlap_px`; where `any_window`, smaller ones, multiples of
    16, are as good. `batch` windows are run at once; where a GPU has too little memory it halves.
    """

    def __init__(
        self,
        net: nn.Module,
        where: torch.device,
        *,
        mpp: float,
        window_px: int,
        overlap_px: int,
        any_window: bool,
        normalisation: NormalisationKind,
        weights_sha256: str,
    ) -> None:
        self.mpp = mpp
        self.window_px = window_px
        self.overlap_px = overlap_px
        self.any_window = any_window
        self.normalisation = normalisation
        self.weights_sha256 = weights_sha256
        self.batch = _GPU_BATCH if where.type == "cuda" else 1
        self._where = where
        self._dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
        self._net = net.eval().to(where, self._dtype)

    @property
    def device(self) -> str:
        """The kind of device that it runs on, and the type that it computes in: cpu float32."""
        return f"{self._where.type} {str(self._dtype).removeprefix('torch.')}"

    def predict(
        self, rgb_BYXC: npt.NDArray[np.uint8], normalisation: Normalisation
    ) -> npt.NDArray[np.float16]:
        """(B, 3, Y, X): five times the flow along y and x, and the logit of being nucleus.

        `rgb_BYXC` are windows at `self.mpp`. Always `batch` of them are run together, the last
        ones filled up, so that all are computed alike.
        """
        outputs: list[npt.NDArray[np.float16]] = []
        while len(outputs) < len(rgb_BYXC):
            part = rgb_BYXC[len(outputs) : len(outputs) + self.batch]
            try:
                outputs.extend(self._run(normalisation(part)))
            except torch.OutOfMemoryError:
                if self.batch == 1:
                    raise
                self.batch //= 2
                torch.cuda.empty_cache()
                log.warning("too little memory on the GPU: %d windows at once now", self.batch)
        return np.stack(outputs)

    def _run(self, x_BYXC: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
        n = len(x_BYXC)
        x_BCHW = torch.from_numpy(x_BYXC).to(self._where, self._dtype).permute(0, 3, 1, 2)
        if n < self.batch:
            x_BCHW = torch.cat([x_BCHW, x_BCHW[:1].expand(self.batch - n, -1, -1, -1)])
        with torch.inference_mode():
            y_BCHW = self._net(x_BCHW)[0][:n]
        output: npt.NDArray[np.float16] = y_BCHW.to(torch.float16).contiguous().cpu().numpy()
        return output

    def find(self, rgb: npt.NDArray[np.uint8]) -> tuple[Labels, npt.NDArray[np.float32]]:
        """Nuclei of a whole picture at `self.mpp`; as `find_in_picture`."""
        return find_in_picture(self, rgb)


@functools.lru_cache(maxsize=2)
def load_model(model: str, device: str = "auto") -> NucleusNetwork:
    """The network named by `model`: "compact", or a path to Cellpose 4 weights.

    `device` is auto, cpu or cuda. Loaded once a process. Raises BadInput where there is no such
    file or it holds something else.
    """
    # How sums are cut among threads shows in their last bits: one thread here as on any worker.
    torch.set_num_threads(1)
    path = weights_path(model)
    state = read_state(path)
    where = _torch_device(device)
    if _OWN_KEY in state:
        metadata = read_metadata(path)
        net = CompactUNet(metadata.widths)
        try:
            net.load_state_dict({key: value.float() for key, value in state.items()}, strict=True)
        except RuntimeError as error:
            raise BadInput(
                path,
                expected=f"weights of a compact network of widths {metadata.widths}",
                found=str(error).splitlines()[-1].strip(),
                remedy="train them again, or name another file",
            ) from error
        return NucleusNetwork(
            net.eval().fused(),
            where,
            mpp=metadata.mpp,
            window_px=_COMPACT_WINDOW_PX,
            overlap_px=_COMPACT_OVERLAP_PX,
            any_window=True,
            normalisation=metadata.normalisation,
            weights_sha256=weights_digest(model),
        )
    foreign = foreign_network(path, state)
    return NucleusNetwork(
        foreign.net,
        where,
        mpp=foreign.mpp,
        window_px=foreign.window_px,
        overlap_px=foreign.overlap_px,
        any_window=False,
        normalisation="percentiles",
        weights_sha256=weights_digest(model),
    )


def read_metadata(weights: Path) -> CompactMetadata:
    """What lies beside compact weights. Raises BadInput where it is missing or not theirs."""
    path = weights.with_suffix(".json")
    if not path.is_file():
        raise BadInput(
            weights,
            expected=f"{path.name} beside it, with the pixel size of the network",
            found="no such file",
            remedy="copy both files that segmentation.train_compact writes",
        )
    metadata = CompactMetadata.model_validate_json(path.read_text())
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != metadata.weights_sha256:
        raise BadInput(
            path,
            expected=f"metadata of weights with SHA-256 {found}",
            found=f"of {metadata.weights_sha256}",
            remedy="copy both files that segmentation.train_compact writes",
        )
    return metadata


def _torch_device(device: str) -> torch.device:
    available = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if available else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not available):
        raise BadInput(
            "device",
            expected="auto, cpu, or cuda where torch can use a GPU",
            found=device + ("" if available else " on a machine without a usable GPU"),
            remedy="give auto or cpu",
        )
    return torch.device(device)
