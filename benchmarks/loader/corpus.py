"""Runs of made-up samples, written and published as `curate` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shards.artifact import Identity, build_artifact, sha256_of, write_atomically
from shards.dataset import POINTER_FILE, panel_path, publish_dataset, read_manifest
from shards.schema import Dataset, DatasetRun, Manifest, Panel, PatchSpec, Totals
from shards.write import MANIFEST_FILE, Sample, write_shards

# Of a run: its panel, donor, how many, and its number as a seed.
Samples = Callable[[Panel, str, int, int], Iterator[Sample]]


def publish_runs(
    root: Path,
    panel: Panel,
    patch: PatchSpec,
    sizes: Sequence[int],
    samples: Samples,
    max_samples: int,
    parents: Callable[[Path, int], dict[str, str]] = lambda runs, n: {},
) -> Path:
    """Runs of so many samples, one donor each, all to train on; left where they are already.

    `parents` makes the artifacts, in the folder of a run of so many samples, that its shards name.
    """
    if (root / POINTER_FILE).exists():
        return root
    write_atomically(root / panel_path(panel.panel_id), panel.model_dump_json().encode())
    runs, shards, donors = [], [], {}
    for r, n in enumerate(sizes):
        run, donor = f"run{r}", f"D{r}"
        folder, record, _ = build_artifact(
            root / "runs" / run / "shards",
            Identity(
                stage="shards",
                stage_version=1,
                config={"run": run, "n": n},
                parents=parents(root / "runs" / run, n),
                inputs={},
            ),
            partial(_write_run, run, panel, patch, samples(panel, donor, n, r), n, max_samples),
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
    publish_dataset(root, Dataset.of("made up", runs, panels, donors, {"train": tuple(shards)}))
    return root


def _write_run(
    run: str,
    panel: Panel,
    patch: PatchSpec,
    samples: Iterator[Sample],
    n: int,
    max_samples: int,
    folder: Path,
    blocks: Path,
) -> dict[str, Any]:
    totals = Totals(seen=n, kept=n, dropped={}, noted={})
    manifest = Manifest(
        run=run,
        source_id=None,
        tissue="test",
        species=panel.species,
        panel_id=panel.panel_id,
        patch=patch,
        totals=totals,
        shards=tuple(write_shards(folder, samples, run=run, max_samples=max_samples)),
    )
    write_atomically(folder / MANIFEST_FILE, manifest.model_dump_json().encode())
    return totals.model_dump()


def plain_row(panel: Panel, patch: PatchSpec, i: int, n_counts: int) -> dict[str, Any]:
    """Metadata of a sample about which there is nothing to say."""
    return {
        "tissue": "test",
        "species": panel.species,
        "label": None,
        "panel": panel.panel_id,
        "x_um": float(i),
        "y_um": 0.0,
        "x_px": float(i),
        "y_px": 0.0,
        "center": "nucleus",
        "mpp": patch.mpp,
        "fov_um": patch.fov_um,
        "n_counts": n_counts,
        "nucleus": None,
        "registration_error_um": 1.0,
        "neighbors": [],
        "flags": [],
    }
