"""A small dataset on disk, made through the public writer: random patches, random sparse counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import simplejpeg

from shards.artifact import Identity, build_artifact, sha256_of, write_atomically
from shards.dataset import panel_path, publish_dataset, read_manifest
from shards.schema import (
    INDEX_SCHEMAS,
    NOT_ASSESSED,
    NOTE_OF_FLAG,
    Dataset,
    DatasetRun,
    Gene,
    Manifest,
    Panel,
    PatchSpec,
    ShardInfo,
    Split,
    Totals,
)
from shards.write import MANIFEST_FILE, Sample, narrow_counts, write_shards

PATCH = PatchSpec(image="he", fov_um=32.0, size_px=32, center="nucleus", jpeg_quality=95)


def tiny_panel(n_genes: int = 40) -> Panel:
    return Panel.of(
        "human", [Gene(symbol=f"GENE{i}", ensembl=f"ENSG{i:011d}") for i in range(n_genes)]
    )


def tiny_samples(run: str, donor: str, n: int, panel: Panel, seed: int) -> list[Sample]:
    """`n` samples whose patch brightness and expression both follow one of four types."""
    rng = np.random.default_rng(seed)
    profiles = np.random.default_rng(0).gamma(0.5, 1.0, (4, len(panel.genes)))
    samples = []
    for i in range(n):
        kind = int(rng.integers(4))
        image = rng.normal(60 + 45 * kind, 12, (PATCH.size_px, PATCH.size_px, 3))
        dense = rng.poisson(60 * profiles[kind] / profiles[kind].sum())
        genes = np.flatnonzero(dense)
        neighbors = [{"cell_id": f"n{i}-1", "dx_um": 3.0, "dy_um": -4.0}]
        row = {
            "tissue": "test",
            "species": panel.species,
            "label": f"type{kind}",
            "panel": panel.panel_id,
            "x_um": float(i),
            "y_um": 2.0 * i,
            "x_px": 4.0 * i,
            "y_px": 8.0 * i,
            "center": "nucleus",
            "mpp": PATCH.mpp,
            "fov_um": PATCH.fov_um,
            "n_counts": int(dense.sum()),
            "nucleus": {"id": i, "area_um2": 30.0 + 10 * kind, "iou": 0.8, "distance_um": 0.3}
            if i % 5
            else None,
            "registration_error_um": None,
            "neighbors": neighbors,
            "flags": [],
        }
        samples.append(
            Sample(
                cell_id=f"{run}{i:05d}-1",
                donor=donor,
                image_jpeg=simplejpeg.encode_jpeg(
                    np.ascontiguousarray(image.clip(0, 255).astype(np.uint8)),
                    quality=PATCH.jpeg_quality,
                    colorspace="RGB",
                    colorsubsampling="420",
                ),
                counts=narrow_counts(np.stack([genes, dense[genes]]).astype(np.int64)),
                neighbors=narrow_counts(np.array([[0], [3], [2]], dtype=np.int64)),
                row=row,
            )
        )
    return samples


def write_tiny_dataset(
    root: Path,
    donors: dict[str, Split] | None = None,
    *,
    n_per_donor: int = 50,
    max_samples: int = 20,
    seed: int = 0,
    n_not_assessed: int | None = None,
    n_flagged: int | None = None,
    panel: Panel | None = None,
    version: Literal[1, 2] = 2,
    parents: dict[str, str] | None = None,
    panels: Mapping[str, Panel] | None = None,
    changed: Callable[[list[Sample]], list[Sample]] = lambda samples: samples,
) -> Path:
    """One run a donor, under `root`, laid out as `curate` lays it out; returns `root`.

    `n_not_assessed` is what the totals say of samples without a registration error (all lack it).
    `n_flagged` is what they say of samples with the flag pen; None: nothing. `version` is that of
    the manifests and of the tables beside their shards. `panels` names donors whose panel is not
    `panel`; `parents` are of every shard set. `changed` makes of each donor's samples what is
    written.
    """
    donors = donors or {"D1": "train", "D2": "train", "D3": "test"}
    panel_of = dict.fromkeys(donors, panel or tiny_panel()) | dict(panels or {})
    paths = {}
    runs, shards = [], {split: [] for split in ("train", "val", "test")}
    for k, (donor, split) in enumerate(donors.items()):
        panel = panel_of[donor]
        paths[panel.panel_id] = path = panel_path(panel.panel_id)
        write_atomically(root / path, panel.model_dump_json(indent=1).encode())
        run = f"run{k}"
        samples = changed(tiny_samples(run, donor, n_per_donor, panel, seed + k))
        noted = {NOT_ASSESSED: n_per_donor if n_not_assessed is None else n_not_assessed}
        if n_flagged is not None:
            noted[NOTE_OF_FLAG + "pen"] = n_flagged
        dropped = {"low_counts": 1}
        totals = Totals(seen=n_per_donor + 1, kept=n_per_donor, dropped=dropped, noted=noted)
        folder, record, _ = build_artifact(
            root / "runs" / run / "shards",
            Identity(
                stage="shards",
                stage_version=1,
                config={"donor": donor, "seed": seed, "n": n_per_donor, "max": max_samples},
                parents=parents or {},
                inputs={},
            ),
            partial(_write_set, run, panel, samples, totals, max_samples, version),
            provenance={},
            check_inputs=lambda: None,
        )
        relative = folder.relative_to(root).as_posix()
        runs.append(
            DatasetRun(
                run=run,
                path=relative,
                fingerprint=record.fingerprint,
                manifest_sha256=sha256_of(folder / MANIFEST_FILE),
                species=panel.species,
                tissue="test",
                panel_id=panel.panel_id,
                totals=totals,
            )
        )
        shards[split] += [f"{relative}/{info.name}" for info in read_manifest(folder).shards]
    dataset = Dataset.of(
        "tiny",
        runs,
        paths,
        donors,
        {split: tuple(names) for split, names in shards.items()},
    )
    publish_dataset(root, dataset)
    return root


def _write_set(
    run: str,
    panel: Panel,
    samples: list[Sample],
    totals: Totals,
    max_samples: int,
    version: Literal[1, 2],
    folder: Path,
    blocks: Path,
) -> dict[str, Any]:
    shards = write_shards(folder, samples, run=run, max_samples=max_samples)
    manifest = Manifest(
        schema_version=version,
        run=run,
        source_id=None,
        tissue="test",
        species=panel.species,
        panel_id=panel.panel_id,
        patch=PATCH,
        totals=totals,
        shards=tuple(with_table_of(folder, shard, version) for shard in shards),
    )
    write_atomically(folder / MANIFEST_FILE, manifest.model_dump_json(indent=1).encode())
    return totals.model_dump()


def with_table_of(folder: Path, shard: ShardInfo, version: Literal[1, 2]) -> ShardInfo:
    """The shard with its table written anew, with the columns of that version alone."""
    path = folder / f"{shard.name}.parquet"
    schema = INDEX_SCHEMAS[version]
    pq.write_table(pq.read_table(path).select(schema.names).cast(schema), path, compression="zstd")
    return shard.model_copy(update={"table_sha256": sha256_of(path)})
