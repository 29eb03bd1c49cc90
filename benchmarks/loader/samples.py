"""A dataset of real size to read: patches of 224 px at quality 95, some 100 genes of 377 each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
import tifffile

from benchmarks.loader.corpus import plain_row, publish_runs
from shards.schema import Gene, Panel, PatchSpec
from shards.write import Sample, narrow_counts

PX = 224
PATCH = PatchSpec(image="he", fov_um=56.0, size_px=PX, center="nucleus", jpeg_quality=95)
N_RUNS = 4
N_GENES = 377
GENES_OF_A_CELL = 100

Image = npt.NDArray[np.uint8]


def dataset(root: Path, n_samples: int, n_of_a_shard: int = 1024) -> Path:
    """`n_samples` in `N_RUNS` runs of one donor each, made where `root` does not have them yet."""
    panel = Panel.of("human", [Gene(symbol=f"GENE{i}", ensembl=None) for i in range(N_GENES)])
    return publish_runs(root, panel, PATCH, [n_samples // N_RUNS] * N_RUNS, samples, n_of_a_shard)


def samples(panel: Panel, donor: str, n: int, seed: int) -> Iterator[Sample]:
    rng = np.random.default_rng(seed)
    pictures = _pictures(rng)
    for i in range(n):
        picture = pictures[int(rng.integers(len(pictures)))]
        y, x = (int(rng.integers(edge - PX + 1)) for edge in picture.shape[:2])
        patch = picture[y : y + PX, x : x + PX]
        patch = np.ascontiguousarray(np.rot90(patch, int(rng.integers(4))))
        n_genes = int(np.clip(rng.normal(GENES_OF_A_CELL, 20), 1, N_GENES))
        genes = np.sort(rng.choice(N_GENES, n_genes, replace=False))
        counts = np.stack([genes, 1 + rng.poisson(1.5, n_genes)])
        jpeg = simplejpeg.encode_jpeg(
            patch, quality=PATCH.jpeg_quality, colorspace="RGB", colorsubsampling="420"
        )
        row = plain_row(panel, PATCH, i, int(counts[1].sum()))
        yield Sample(f"c{i:06d}", donor, jpeg, narrow_counts(counts), None, row)


def _pictures(rng: np.random.Generator) -> list[Image]:
    """Real tissue where there is some, half of it a slide's, half tiles; else what looks alike."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("CELLPAIR_SHARED_DATA", default))
    if not folder.is_dir():
        return [_painted(rng) for _ in range(8)]
    tiles = [
        np.ascontiguousarray(cv2.imread(str(path))[:, :, ::-1])
        for path in sorted((folder / "nuclei").glob("*_he.png"))
    ]
    tiles = [tile for tile in tiles if min(tile.shape[:2]) >= PX]
    slide = tifffile.imread(folder / "slides" / "CMU-1-Small-Region.svs", level=0)
    return [*tiles, *[slide] * len(tiles)]


def _painted(rng: np.random.Generator) -> Image:
    edge = 1024
    tissue = cv2.GaussianBlur(rng.normal(0, 1, (edge, edge, 3)).astype(np.float32), (0, 0), 6) * 60
    tissue += rng.normal(0, 6, tissue.shape) + np.array([215, 165, 205])
    nuclei = cv2.GaussianBlur(rng.normal(0, 1, (edge, edge)).astype(np.float32), (0, 0), 5) > 0.06
    tissue[nuclei] -= np.array([95, 90, 50])
    return tissue.clip(0, 255).astype(np.uint8)
