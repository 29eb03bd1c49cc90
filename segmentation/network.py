"""Cellpose networks, loaded once a process: the compact one that ships, any other by its path."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from cellpose.models import CellposeModel
from cellpose.vit import CPSAM, BaseModel
from pydantic import Field
from torch import nn
from torch.nn import functional

from segmentation.config import weights_digest, weights_path
from shards.errors import BadInput, not_there_yet
from shards.schema import Record

# Cellpose 4 networks were trained with objects scaled to 30 px; a nucleus of 8 µm is that wide
# at 0.27 µm a pixel, close to a 40x scan.
FOREIGN_MPP: Final = 8.0 / 30.0
# Cellpose's own defaults, stated; smaller objects than a nucleus can be are dropped.
FLOW_THRESHOLD: Final = 0.4
CELLPROB_THRESHOLD: Final = 0.0
N_EULER_STEPS: Final = 200
MIN_NUCLEUS_UM2: Final = 6.0

_NORMALIZE: Final[dict[str, object]] = {
    "lowhigh": None,
    "percentile": None,
    "normalize": True,
    "norm3D": False,
}
_MAX_WINDOW_PX = 1280
# Cellpose builds sparse tensors; torch warns unless its checks of them are set, either way.
torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]  # torch's
# The key by which our files are told from other Cellpose 4 weights.
_OWN_KEY = "stem.0.weight"

Labels = npt.NDArray[np.int32]


class CompactMetadata(Record):
    """`<weights>.json` beside compact weights: what they are for and what made them.

    `mpp` is the pixel size at which the network works; `normalisation` names how pixels become its
    input; `scores` are F1 at IoU 0.5 of the fold networks by stain group, out of fold, as
    benchmarks.nuclei measures and records them. `teacher_sha256` is of the weights that a network
    was distilled from, `taught_tiles_sha256` of the pictures with that teacher's masks.
    """

    weights_sha256: str
    mpp: float = Field(gt=0)
    normalisation: Literal["optical_density"]
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


def optical_density(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """(Y, X, 3) pixels to absorbance, base 10, against a white of 255; glass is 0."""
    density: npt.NDArray[np.float32] = _DENSITY_OF_LEVEL[rgb]
    return density


_DENSITY_OF_LEVEL = -np.log10(np.maximum(np.arange(256), 1) / 255.0).astype(np.float32)


class CompactCellposeModel(CellposeModel):  # type: ignore[misc]  # cellpose has no types
    """Cellpose's model class around our network; only its constructor differs.

    Cellpose's own would take any file for one of its transformers.
    """

    def __init__(self, net: CompactUNet, device: torch.device) -> None:
        self.device = device
        self.gpu = device.type == "cuda"
        self.net = net.to(device)
        self.backbone = net.backbone
        self.pretrained_model = net.backbone


@dataclass(frozen=True, slots=True)
class NucleusNetwork:
    """A loaded network, the pixel size at which it works and the hash of its weights."""

    model: CellposeModel
    mpp: float
    weights_sha256: str

    @property
    def device(self) -> str:
        """The kind of device that it runs on, and the type that it computes in: cpu float32."""
        weight = next(self.model.net.parameters())
        return f"{weight.device.type} {str(weight.dtype).removeprefix('torch.')}"

    def find(self, rgb: npt.NDArray[np.uint8]) -> tuple[Labels, npt.NDArray[np.float32]]:
        """Nuclei in a picture at `self.mpp`, by Cellpose's own `eval`.

        rgb (Y, X, 3). Returns labels (Y, X) int32, 0 outside nuclei, and the logit (Y, X) of a
        pixel being nucleus. Every option is stated, since some of Cellpose's defaults are global
        and change when `eval` is called.
        """
        if isinstance(self.model, CompactCellposeModel):
            pixels, normalize = optical_density(rgb), {**_NORMALIZE, "normalize": False}
            # One window over the whole picture where it is not large: nothing to blend.
            bsize = min(_MAX_WINDOW_PX, 16 * math.ceil(max(rgb.shape[:2]) / 16) + 16)
        else:
            pixels, normalize = rgb.astype(np.float32), {**_NORMALIZE, "lowhigh": [0.0, 255.0]}
            bsize = None  # what the weights demand
        labels, flows, _ = self.model.eval(
            pixels,
            channel_axis=2,
            batch_size=4,
            bsize=bsize,
            normalize=normalize,
            diameter=None,
            flow_threshold=FLOW_THRESHOLD,
            cellprob_threshold=CELLPROB_THRESHOLD,
            min_size=round(MIN_NUCLEUS_UM2 / self.mpp**2),
            niter=N_EULER_STEPS,
        )
        return labels.astype(np.int32), flows[2]


@functools.lru_cache(maxsize=2)
def load_model(model: str, device: str = "auto") -> NucleusNetwork:
    """The network named by `model`: "compact", or a path to Cellpose 4 weights.

    `device` is auto, cpu or cuda. Loaded once a process. Raises BadInput where there is no such
    file or it holds something else.
    """
    # How sums are cut among threads shows in their last bits: one thread here as on any worker.
    torch.set_num_threads(1)
    path = weights_path(model)
    state = _read_state(path)
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
        own = CompactCellposeModel(net.eval(), where)
        return NucleusNetwork(own, metadata.mpp, weights_digest(model))
    if "W2" not in state or "encoder.patch_embed.proj.weight" not in state:
        raise _not_weights(path, f"keys such as {', '.join(sorted(state)[:3]) or 'none'}")
    if "encoder.cls_token" in state:
        raise not_there_yet(
            path, "a Cellpose network on DINOv3", "use weights of the SAM kind, or model = compact"
        )
    with torch.device("meta"):  # shapes alone, no memory
        expected = CPSAM().state_dict()
    missing = set(expected) - set(state)
    if missing:  # Cellpose itself would leave these at random
        raise _not_weights(path, f"no {min(missing)}")
    foreign = CellposeModel(
        pretrained_model=str(path), device=where, use_bfloat16=where.type == "cuda"
    )
    return NucleusNetwork(foreign, FOREIGN_MPP, weights_digest(model))


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


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise _not_weights(path, str(error).splitlines()[0]) from error
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise _not_weights(path, f"a {type(state).__name__} of other things than tensors")
    return state


def _not_weights(path: Path, found: str) -> BadInput:
    return BadInput(
        path,
        expected="Cellpose 4 weights (a state dict with W2), or compact ones",
        found=found,
        remedy="give model = compact, or the path of weights that Cellpose 4 saved",
    )


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
