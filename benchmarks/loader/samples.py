"""A dataset of real size to read: patches of 224 px at quality 95, some 100 genes of 377 each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
import tifffile

from shards.artifact import Identity, build_artifact, sha256_of, write_atomically
from shards.dataset import POINTER_FILE, panel_path, publish_dataset, read_manifest
from shards.schema import Dataset, DatasetRun, Gene, Manifest, Panel, PatchSpec, Totals
from shards.write import MANIFEST_FILE, Sample, narrow_counts, write_shards

PX = 224
PATCH = PatchSpec(image="he", fov_um=56.0, size_px=PX, center="nucleus", jpeg_quality=95)
N_RUNS = 4
N_GENES = 377
GENES_OF_A_CELL = 100

Image = npt.NDArray[np.uint8]


def dataset(root: Path, n_samples: int) -> Path:
    """`n_samples` in `N_RUNS` runs of one donor each, made where `root` does not have them yet."""
    if (root / POINTER_FILE).exists():
        return root
    panel = Panel.of("human", [Gene(symbol=f"GENE{i}", ensembl=None) for i in range(N_GENES)])
    write_atomically(root / panel_path(panel.panel_id), panel.model_dump_json().encode())
    runs, shards, donors = [], [], {}
    for r in range(N_RUNS):
        run, donor = f"run{r}", f"D{r}"
        n = n_samples // N_RUNS
        identity = Identity(
            stage="shards", stage_version=1, config={"run": run, "n": n}, parents={}, inputs={}
        )
        folder, record, _ = build_artifact(
            root / "runs" / run / "shards",
            identity,
            partial(_write_run, run, donor, panel, n, r),
            provenance={},
            check_inputs=lambda: None,
        )
        path = folder.relative_to(root).as_posix()
        manifest = read_manifest(folder)
        runs.append(
            DatasetRun(
                run=run,
                path=path,
                fingerprint=record.fingerprint,
                manifest_sha256=sha256_of(folder / MANIFEST_FILE),
                species=panel.species,
                tissue=manifest.tissue,
                panel_id=panel.panel_id,
                totals=manifest.totals,
            )
        )
        shards += [f"{path}/{info.name}" for info in manifest.shards]
        donors[donor] = "train"
    panels = {panel.panel_id: panel_path(panel.panel_id)}
    publish_dataset(root, Dataset.of("reading", runs, panels, donors, {"train": tuple(shards)}))
    return root


def _write_run(
    run: str, donor: str, panel: Panel, n: int, seed: int, folder: Path, blocks: Path
) -> dict[str, Any]:
    totals = Totals(seen=n, kept=n, dropped={}, noted={})
    infos = write_shards(
        folder, _samples(panel, donor, n, seed), run=run, max_samples=min(1024, n // 3)
    )
    manifest = Manifest(
        run=run,
        source_id=None,
        tissue="test",
        species=panel.species,
        panel_id=panel.panel_id,
        patch=PATCH,
        totals=totals,
        shards=tuple(infos),
    )
    write_atomically(folder / MANIFEST_FILE, manifest.model_dump_json().encode())
    return totals.model_dump()


def _samples(panel: Panel, donor: str, n: int, seed: int) -> Iterator[Sample]:
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
        row = {
            "tissue": "test",
            "species": panel.species,
            "label": None,
            "panel": panel.panel_id,
            "x_um": float(i),
            "y_um": 0.0,
            "x_px": float(i),
            "y_px": 0.0,
            "center": "nucleus",
            "mpp": PATCH.mpp,
            "fov_um": PATCH.fov_um,
            "n_counts": int(counts[1].sum()),
            "nucleus": None,
            "registration_error_um": 1.0,
            "neighbors": [],
            "flags": [],
        }
        jpeg = simplejpeg.encode_jpeg(
            patch, quality=PATCH.jpeg_quality, colorspace="RGB", colorsubsampling="420"
        )
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
