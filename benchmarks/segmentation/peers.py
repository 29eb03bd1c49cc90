"""The same network by Cellpose's own means: tile by tile, and by its distributed segmentation.

The second needs dask-image and dask-jobqueue, which the project does not:
`uv pip install dask-image dask-jobqueue`.
"""
# mypy: disable-error-code="no-untyped-call,no-any-return,misc"

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from cellpose import models

from benchmarks.registration.limits import Limits
from benchmarks.segmentation.apart import run_apart
from benchmarks.segmentation.slides import write_slide
from flows.cluster import Runtime
from flows.segment import LABELS_FOLDER, segment_slide
from pairing.slide import open_slide
from segmentation.config import COMPACT_PATH, NUCLEI_FILE, SegmentationConfig
from segmentation.label_image import write_label_image
from segmentation.maps import InTurn
from segmentation.network import CompactUNet, read_metadata
from segmentation.nuclei import MIN_NUCLEUS_UM2
from segmentation.segment import segment
from segmentation.stain import optical_density

Labels = npt.NDArray[Any]
N_SQUARES = 2
TILE_PX = 512
MPP = 0.5
MIN_IOU = 0.5
WHOLE_PX = 1 << 14


class Stock(models.CellposeModel):
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
    """Time, memory, and nuclei lost, in parts or extra against a run on the whole at once.

    Each in a process of its own; memory is the sum over it and those that it starts. Tiles of
    theirs are held against their whole, blocks of ours against ours.
    """
    slide = write_slide(out / f"slide-{N_SQUARES}.ome.tif", N_SQUARES)
    limits.head("the same network on one process")
    seconds: dict[str, float] = {}
    differing: dict[str, tuple[int, int, int]] = {}
    wholes: list[Labels] = []
    for way in WAYS:
        if way == THEIR_BLOCKS and not all(map(importlib.util.find_spec, THEIR_NEEDS)):
            limits.told(way, f"{' and '.join(THEIR_NEEDS)} are not installed")
            continue
        with TemporaryDirectory(dir=out) as folder:
            labels_path = Path(folder) / "labels.npy"
            printed, peak_gib = run_apart(__name__, way, str(slide), str(labels_path))
            seconds[way] = float(printed.split()[-1])  # after what they print
            labels = np.load(labels_path, allow_pickle=False)
        told = f"{seconds[way]:.0f} s, {peak_gib:.1f} GiB; {len(np.unique(labels)) - 1:,} nuclei"
        if way in AT_ONCE:
            wholes.append(labels)
        else:
            differing[way] = compared(labels, wholes[-1])
            told += ", {} lost, {} in parts or doubled, {} extra".format(*differing[way])
        limits.told(way, told)
    limits.line("cellpair: nuclei lost, in parts or extra", sum(differing[OURS]), "≤", 0)
    over = seconds[OURS] / seconds[AT_ONCE[0]]
    limits.line("cellpair's time over that of stock eval", over, "≤", 1.0)
    lost, _, extra = compared(wholes[1], wholes[0])
    limits.told("between the wholes", f"{lost} of stock's alone, {extra} of cellpair's alone")


def at_network_size(slide: Path) -> npt.NDArray[np.uint8]:
    with open_slide(slide) as opened:
        width, height = (round(n * opened.mpp / MPP) for n in opened.size_px)
        return opened.read_at((0, 0, width, height), MPP)


def by_stock(slide: Path) -> Labels:
    """All of the slide in one image."""
    return Stock().eval(optical_density(at_network_size(slide)), **EVAL)[0]


def by_tile(slide: Path) -> Labels:
    """Tiles side by side, a model for each, as scripts do that know no better."""
    rgb = at_network_size(slide)
    labels = np.zeros(rgb.shape[:2], np.int64)
    for y in range(0, rgb.shape[0], TILE_PX):
        for x in range(0, rgb.shape[1], TILE_PX):
            cut = np.s_[y : y + TILE_PX, x : x + TILE_PX]
            found, *_ = Stock().eval(optical_density(rgb[cut]), **EVAL)
            labels[cut] = np.where(found > 0, found.astype(np.int64) + labels.max(), 0)
    return labels


def by_cellpair(slide: Path) -> Labels:
    """Table, GeoJSON, label image, overview and page."""
    with TemporaryDirectory(dir=slide.parent) as folder:
        segment_slide(
            slide, Path(folder), mpp=None, model="compact", labels=False,
            runtime=Runtime(workers=1, device="cpu"),
        )  # fmt: skip
        return np.asarray(zarr.open_array(Path(folder) / LABELS_FOLDER / "0", mode="r"))


def by_cellpair_at_once(slide: Path) -> Labels:
    with TemporaryDirectory(dir=slide.parent) as folder:
        kept, labels, maps = Path(folder), Path(folder) / LABELS_FOLDER, InTurn()
        done = segment(
            kept / NUCLEI_FILE, kept, slide, SegmentationConfig(), device="cpu", maps=maps,
            block_px=WHOLE_PX,
        )  # fmt: skip
        write_label_image(labels, kept, done.blocks, done.grid, maps)
        return np.asarray(zarr.open_array(labels / "0", mode="r"))


def unpacked(packed: npt.NDArray[np.uint32], crop: Any = None) -> npt.NDArray[np.float32]:
    """Optical densities of colours in one number each; the first call makes Cellpose take ours."""
    models.CellposeModel = Stock
    parts = [(packed >> shift & 255).astype(np.uint8) for shift in (0, 8, 16)]
    return optical_density(np.stack(parts, -1))


def by_distributed(slide: Path) -> Labels:
    from cellpose.contrib import distributed_segmentation as theirs

    # It gives the mode by position, which zarr 3 takes by name alone.
    opened = zarr.open
    theirs.zarr.open = lambda store, mode="a", **how: opened(store, mode=mode, **how)
    rgb = at_network_size(slide)
    red, green, blue = (rgb[..., c].astype(np.uint32) for c in range(3))
    packed = red | green << 8 | blue << 16
    with TemporaryDirectory(dir=slide.parent) as folder:
        source = zarr.create_array(
            f"{folder}/rgb.zarr", shape=packed.shape, chunks=(TILE_PX, TILE_PX), dtype=np.uint32
        )
        source[...] = packed
        os.chdir(folder)  # where it leaves logs
        labels, _ = theirs.distributed_eval(
            input_zarr=source, blocksize=(TILE_PX, TILE_PX), write_path=f"{folder}/labels.zarr",
            preprocessing_steps=[(unpacked, {})], eval_kwargs={**EVAL, "diameter": 30},
            cluster_kwargs={"n_workers": 1, "ncpus": 1, "memory_limit": "8GB",
                            "threads_per_worker": 1},
            temporary_directory=folder,
        )  # fmt: skip
        return np.asarray(labels)


OURS = "cellpair, all files"
AT_ONCE = ("stock eval, the whole at once", "cellpair, one block, labels alone")
THEIR_BLOCKS, THEIR_NEEDS = "distributed_segmentation", ("dask_jobqueue", "dask_image")
WAYS: dict[str, Callable[[Path], Labels]] = {
    AT_ONCE[0]: by_stock,
    f"stock eval, tiles of {TILE_PX}": by_tile,
    THEIR_BLOCKS: by_distributed,
    AT_ONCE[1]: by_cellpair_at_once,
    OURS: by_cellpair,
}


def compared(found: Labels, whole: Labels) -> tuple[int, int, int]:
    """What a label image lost of `whole`, has in several parts, and has in addition.

    Lost: no one of `found` matches by IoU 0.5. In parts: several of `found`, each for the most part
    within it, hold a tenth or more of it. In addition: matches none.
    """
    both = np.stack([whole.ravel().astype(np.int64), found.ravel().astype(np.int64)])
    pairs, shared = np.unique(both, axis=1, return_counts=True)
    size_whole = dict(zip(*np.unique(whole, return_counts=True), strict=True))
    size_found = dict(zip(*np.unique(found, return_counts=True), strict=True))
    matched_whole, matched_found = set(), set()
    parts_of: dict[int, int] = {}
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


def main() -> None:
    """One way in this process: labels into a file; prints its seconds."""
    way, slide, labels_path = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.sparse.check_sparse_tensor_invariants.disable()
    started_s = time.perf_counter()
    labels = WAYS[way](slide)
    seconds = time.perf_counter() - started_s
    np.save(labels_path, labels, allow_pickle=False)
    print(seconds)


if __name__ == "__main__":
    main()
