"""The same network by Cellpose's own means: tile by tile, and by its distributed segmentation.

The second needs dask-image and dask-jobqueue, which the project does not:
`uv pip install dask-image dask-jobqueue`.
"""
# mypy: disable-error-code="no-untyped-call,no-any-return,misc"

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from cellpose import models

from benchmarks.registration.limits import Limits
from benchmarks.segmentation.slides import write_slide
from flows.cluster import Runtime
from flows.segment import LABELS_FOLDER, segment_slide
from pairing.slide import open_slide
from segmentation.config import COMPACT_PATH
from segmentation.network import CompactUNet, read_metadata
from segmentation.nuclei import MIN_NUCLEUS_UM2
from segmentation.stain import optical_density

Labels = npt.NDArray[Any]
N_SQUARES = 2
TILE_PX = 512
MPP = 0.5
MIN_IOU = 0.5


class Stock(models.CellposeModel):  # type: ignore[misc]
    """Cellpose's model class around the compact network, which it can't load itself."""

    def __init__(self, **_: Any) -> None:
        torch.set_num_threads(1)
        net = CompactUNet(read_metadata(COMPACT_PATH).widths)
        net.load_state_dict(
            {k: v.float() for k, v in torch.load(COMPACT_PATH, weights_only=True).items()}
        )
        self.device, self.gpu = torch.device("cpu"), False
        self.net, self.backbone, self.pretrained_model = net.eval(), net.backbone, net.backbone


EVAL: dict[str, Any] = {
    "channel_axis": 2,
    "normalize": {"normalize": False, "norm3D": False},
    "bsize": 512,
    "batch_size": 1,
    "flow_threshold": 0.4,
    "cellprob_threshold": 0.0,
    "min_size": round(MIN_NUCLEUS_UM2 / MPP**2),
    "niter": 200,
}


def measure(limits: Limits, out: Path) -> None:
    """Time, memory, and nuclei lost, doubled or cut against a run of theirs on the whole slide."""
    slide = write_slide(out / f"slide-{N_SQUARES}.ome.tif", N_SQUARES)
    torch.sparse.check_sparse_tensor_invariants.disable()
    with open_slide(slide) as opened:
        width, height = (round(n * opened.mpp / MPP) for n in opened.size_px)
        rgb = opened.read_at((0, 0, width, height), MPP)
    limits.head(f"{width * height / 1e6:.1f} Mpx, the same network")
    started_s = time.perf_counter()
    whole, *_ = Stock().eval(optical_density(rgb), **EVAL)
    _tell(limits, "stock eval, the whole at once", whole, whole, time.perf_counter() - started_s)
    started_s = time.perf_counter()
    _tell(limits, f"stock eval, tiles of {TILE_PX}", by_tile(rgb), whole,
          time.perf_counter() - started_s)  # fmt: skip
    with TemporaryDirectory(dir=out) as folder:
        started_s = time.perf_counter()
        segment_slide(
            slide, Path(folder), mpp=None, model="compact", labels=False,
            runtime=Runtime(workers=1, device="cpu"),
        )  # fmt: skip
        seconds = time.perf_counter() - started_s
        ours = np.asarray(zarr.open_array(Path(folder) / LABELS_FOLDER / "0", mode="r"))
    _tell(limits, "cellpair, 1 process, all files", ours, whole, seconds)
    if importlib.util.find_spec("dask_jobqueue") and importlib.util.find_spec("dask_image"):
        labels, seconds = distributed(rgb, out)
        _tell(limits, f"distributed_segmentation, blocks of {TILE_PX}", labels, whole, seconds)
    else:
        limits.told("distributed_segmentation", "dask-image and dask-jobqueue are not installed")


def by_tile(rgb: npt.NDArray[np.uint8]) -> Labels:
    """Tiles side by side, a model for each, as scripts do that know no better."""
    labels = np.zeros(rgb.shape[:2], np.int64)
    for y in range(0, rgb.shape[0], TILE_PX):
        for x in range(0, rgb.shape[1], TILE_PX):
            cut = np.s_[y : y + TILE_PX, x : x + TILE_PX]
            found, *_ = Stock().eval(optical_density(rgb[cut]), **EVAL)
            labels[cut] = np.where(found > 0, found.astype(np.int64) + labels.max(), 0)
    return labels


def unpacked(packed: npt.NDArray[np.uint32], crop: Any = None) -> npt.NDArray[np.float32]:
    """Optical densities of colours in one number each; the first call makes Cellpose take ours."""
    models.CellposeModel = Stock
    parts = [(packed >> shift & 255).astype(np.uint8) for shift in (0, 8, 16)]
    return optical_density(np.stack(parts, -1))


def distributed(rgb: npt.NDArray[np.uint8], out: Path) -> tuple[Labels, float]:
    from cellpose.contrib.distributed_segmentation import distributed_eval

    packed = sum(rgb[..., c].astype(np.uint32) << 8 * c for c in range(3))
    with TemporaryDirectory(dir=out) as folder:
        source = zarr.create_array(
            f"{folder}/rgb.zarr", shape=packed.shape, chunks=(TILE_PX, TILE_PX), dtype=np.uint32
        )
        source[...] = packed
        started_s = time.perf_counter()
        labels, _ = distributed_eval(
            input_zarr=source, blocksize=(TILE_PX, TILE_PX), write_path=f"{folder}/labels.zarr",
            preprocessing_steps=[(unpacked, {})], eval_kwargs={**EVAL, "diameter": 30},
            cluster_kwargs={"n_workers": 1, "ncpus": 1, "memory_limit": "8GB",
                            "threads_per_worker": 1},
            temporary_directory=folder,
        )  # fmt: skip
        return np.asarray(labels), time.perf_counter() - started_s


def _tell(limits: Limits, what: str, found: Labels, whole: Labels, seconds: float) -> None:
    """A line: how many nuclei, how many of the whole run's are lost, found twice, and extra."""
    lost, doubled, extra = compared(found, whole)
    n = len(np.unique(found)) - 1
    told = f"{n:,} nuclei, {lost} lost, {doubled} in parts or doubled, {extra} extra"
    limits.told(what, f"{told}; {seconds:.0f} s")


def compared(found: Labels, whole: Labels) -> tuple[int, int, int]:
    """What a label image lost of `whole`, has in several parts, and has in addition.

    Lost: no one of `found` matches by IoU 0.5. In parts: several of `found`, each for the most part
    within it, hold a tenth or more of it. In addition: matches none.
    """
    both = np.stack([whole.ravel().astype(np.int64), found.ravel().astype(np.int64)])
    pairs, shared = np.unique(both, axis=1, return_counts=True)
    size_whole = dict(zip(*np.unique(whole, return_counts=True), strict=True))
    size_found = dict(zip(*np.unique(found, return_counts=True), strict=True))
    matched_whole, matched_found, parts_of = set(), set(), {}
    for (a, b), n in zip(pairs.T.tolist(), shared.tolist(), strict=True):
        if a and b:
            if n > MIN_IOU * (size_whole[a] + size_found[b] - n):
                matched_whole.add(a)
                matched_found.add(b)
            if n > 0.1 * size_whole[a] and n > 0.5 * size_found[b]:
                parts_of[a] = parts_of.get(a, 0) + 1
    doubled = sum(n > 1 for n in parts_of.values())
    lost = len(size_whole) - 1 - len(matched_whole)
    return lost, doubled, len(size_found) - 1 - len(matched_found)
