"""`validate` and `describe` for any dataset folder: every promise proved again from the bytes."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import simplejpeg

from shards.artifact import sha256_of
from shards.dataset import read_dataset, read_manifest, read_panels
from shards.errors import BadInput
from shards.schema import (
    COUNTS_MEMBER,
    IMAGE_MEMBER,
    INDEX_SCHEMA,
    NEIGHBORS_MEMBER,
    Dataset,
    DatasetRun,
    Manifest,
    Panel,
    ShardInfo,
    Split,
    sample_key,
)
from shards.write import MANIFEST_FILE


def describe(path: Path) -> dict[str, Any]:
    """What a dataset is, for `cellpair info`: runs, donors and splits, samples, totals."""
    dataset, root = read_dataset(path)
    samples = Counter[str]()
    for run in dataset.runs:
        for shard in read_manifest(root / run.path).shards:
            samples[dataset.donors[shard.donor]] += shard.n_samples
    return {
        "kind": "dataset",
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "runs": [run.run for run in dataset.runs],
        "donors": dict(dataset.donors),
        "samples": {split: samples[split] for split in dataset.shards},
        "genes": {i: len(p.genes) for i, p in read_panels(dataset, root).items()},
        "totals": dataset.totals.model_dump(),
    }


def validate(path: Path) -> list[str]:
    """The faults of a dataset, each a line that says where; an empty list is a clean bill.

    Raises BadInput only where the dataset itself or its manifests cannot be read at all.
    """
    dataset, root = read_dataset(path)
    panels = read_panels(dataset, root)
    faults = list(_composition_faults(dataset, root))
    keys: Counter[str] = Counter()
    for run in dataset.runs:
        try:
            manifest = read_manifest(root / run.path)
        except BadInput as error:
            faults.append(str(error))
            continue
        if run.panel_id not in panels:
            faults.append(f"{run.run}: panel {run.panel_id} is not among the dataset's panels")
            continue
        faults += _run_faults(root, run, manifest)
        for shard in manifest.shards:
            folder = root / run.path
            faults += _shard_faults(folder, shard, manifest, panels[run.panel_id], keys)
        faults += _leaks_between_donors(root / run.path, manifest)
    faults += [f"{key}: {n} samples hold this key" for key, n in keys.items() if n > 1]
    return faults


def _composition_faults(dataset: Dataset, root: Path) -> Iterator[str]:
    rebuilt = Dataset.of(
        dataset.name,
        dataset.runs,
        dataset.panels,
        dataset.donors,
        dataset.shards,
        dataset.aliases,
    )
    if rebuilt.fingerprint != dataset.fingerprint:
        yield f"dataset: its content hashes to {rebuilt.fingerprint}, not {dataset.fingerprint}"
    if rebuilt.totals != dataset.totals:
        yield f"dataset: totals are {dataset.totals}, but the runs add up to {rebuilt.totals}"
    yield from _straddling_donors(dataset)
    listed = Counter(name for names in dataset.shards.values() for name in names)
    yield from (f"{name}: listed in {n} places" for name, n in listed.items() if n > 1)
    expected = set()
    for run in dataset.runs:
        try:
            manifest = read_manifest(root / run.path)
        except BadInput:
            continue  # validate() reports it with its run
        for shard in manifest.shards:
            expected.add(f"{run.path}/{shard.name}")
            split = dataset.donors.get(shard.donor)
            if split is None:
                yield f"{shard.name}: donor {shard.donor!r} has no split"
            elif f"{run.path}/{shard.name}" not in dataset.shards[split]:
                yield f"{shard.name}: donor {shard.donor!r} is in {split}, but the shard is not"
    yield from (f"{name}: listed, but in no manifest" for name in listed.keys() - expected)
    species = {p.species for p in read_panels(dataset, root).values()}
    runs_species = {r.species for r in dataset.runs}
    if not runs_species <= species:
        yield f"dataset: runs of {sorted(runs_species)}, panels of {sorted(species)}"


def _straddling_donors(dataset: Dataset) -> Iterator[str]:
    """Names of one person in several splits."""
    splits_of: dict[str, dict[str, Split]] = {}
    for donor, split in dataset.donors.items():
        splits_of.setdefault(dataset.aliases.get(donor, donor), {})[donor] = split
    for canonical, splits in splits_of.items():
        if len(set(splits.values())) > 1:
            told = ", ".join(f"{donor!r} in {split}" for donor, split in sorted(splits.items()))
            yield f"dataset: donor {canonical!r} straddles splits: {told}"


def _run_faults(root: Path, run: DatasetRun, manifest: Manifest) -> Iterator[str]:
    if sha256_of(root / run.path / MANIFEST_FILE) != run.manifest_sha256:
        yield f"{run.run}: the manifest is not the one that the dataset was made of"
    for field in ("run", "species", "tissue", "panel_id", "totals"):
        if getattr(manifest, field) != getattr(run, field):
            yield f"{run.run}: {field} differs between manifest and dataset"


def _shard_faults(
    folder: Path, shard: ShardInfo, manifest: Manifest, panel: Panel, keys: Counter[str]
) -> Iterator[str]:
    tar_path, table_path = folder / f"{shard.name}.tar", folder / f"{shard.name}.parquet"
    for path, want in ((tar_path, shard.tar_sha256), (table_path, shard.table_sha256)):
        if not path.is_file():
            yield f"{path.name}: missing"
            return
        if (found := sha256_of(path)) != want:
            yield f"{path.name}: sha256 {found[:12]}…, the manifest says {want[:12]}…"
            return
    if tar_path.stat().st_size != shard.tar_bytes:
        yield f"{tar_path.name}: {tar_path.stat().st_size} bytes, not {shard.tar_bytes}"
    table = pq.read_table(table_path)
    if not table.schema.equals(INDEX_SCHEMA):
        yield f"{table_path.name}: its columns are not those of this schema version"
        return
    if table.num_rows != shard.n_samples:
        yield f"{table_path.name}: {table.num_rows} rows, the manifest says {shard.n_samples}"
    with tarfile.open(tar_path, "r:") as archive:
        members = [(m.name, m.offset_data, m.size) for m in archive.getmembers()]
    rows = table.to_pylist()
    listed = [
        (f"{row['key']}.{member}", row[f"{column}_offset"], row[f"{column}_size"])
        for row in rows
        for member, column in (
            (IMAGE_MEMBER, "jpg"),
            (COUNTS_MEMBER, "counts"),
            (NEIGHBORS_MEMBER, "neighbors"),
        )
        if row[f"{column}_offset"] is not None
    ]
    if members != listed:
        yield f"{shard.name}: the members of the tar are not those of the index table"
        return
    with tar_path.open("rb") as f:
        tar = f.fileno()
        for row in rows:
            keys[row["key"]] += 1
            contents = {
                column: os.pread(tar, row[f"{column}_size"], row[f"{column}_offset"])
                for column in ("jpg", "counts", "neighbors")
                if row[f"{column}_offset"] is not None
            }
            for fault in _sample_faults(row, contents, shard, manifest, panel):
                yield f"{shard.name}, {row['key']}: {fault}"


def _leaks_between_donors(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Neighbours of another donor: their counts lie in a sample that may be in another split."""
    if len({shard.donor for shard in manifest.shards}) < 2:
        return
    tables = [folder / f"{shard.name}.parquet" for shard in manifest.shards]
    donor_of: dict[str, str] = {}
    for path in filter(Path.is_file, tables):  # a missing one is told with its shard
        table = pq.read_table(path, columns=["cell_id", "donor"])
        donor_of |= zip(table["cell_id"].to_pylist(), table["donor"].to_pylist(), strict=True)
    for path in filter(Path.is_file, tables):
        for row in pq.read_table(path, columns=["key", "donor", "neighbors"]).to_pylist():
            others = {donor_of.get(n["cell_id"], row["donor"]) for n in row["neighbors"]}
            for other in sorted(others - {row["donor"]}):
                yield (
                    f"{path.stem}, {row['key']}: a neighbour is of donor {other!r}, the sample of "
                    f"{row['donor']!r}"
                )


def _sample_faults(
    row: dict[str, Any],
    contents: dict[str, bytes],
    shard: ShardInfo,
    manifest: Manifest,
    panel: Panel,
) -> Iterator[str]:
    crc = 0
    for content in contents.values():
        crc = zlib.crc32(content, crc)
    if crc != row["crc32"]:
        yield "crc32 differs"
    if row["key"] != sample_key(row["run"], row["cell_id"]) or row["run"] != manifest.run:
        yield "the key is not that of its run and cell"
    if row["donor"] != shard.donor:
        yield f"donor {row['donor']!r} in a shard of {shard.donor!r}"
    if row["panel"] != panel.panel_id or row["species"] != panel.species:
        yield "its panel or species is not the run's"
    patch = manifest.patch
    if (row["fov_um"], row["mpp"]) != (patch.fov_um, patch.mpp):
        yield "its field of view or mpp is not the manifest's"
    try:
        image = simplejpeg.decode_jpeg(contents["jpg"], colorspace="RGB")
    except ValueError as error:
        yield f"the patch does not decode: {error}"
    else:
        if image.shape != (patch.size_px, patch.size_px, 3):
            yield f"the patch is {image.shape}, not {patch.size_px} px square"
    if "counts" in contents:
        genes = np.load(io.BytesIO(contents["counts"]), allow_pickle=False).astype(np.int64)
        if genes.ndim != 2 or genes.shape[0] != 2 or (genes[1] <= 0).any():
            yield "counts.npy is not (2, n) with counts above 0"
        elif (np.diff(genes[0]) <= 0).any() or (genes[0] >= len(panel.genes)).any():
            yield "genes of counts.npy are not ascending on the panel"
        elif genes[1].sum() != row["n_counts"]:
            yield f"counts add up to {genes[1].sum()}, the table says {row['n_counts']}"
    if "neighbors" in contents:
        cells = np.load(io.BytesIO(contents["neighbors"]), allow_pickle=False).astype(np.int64)
        if cells.ndim != 2 or cells.shape[0] != 3 or (cells[2] <= 0).any():
            yield "neighbors.npy is not (3, m) with counts above 0"
        elif (cells[0] >= len(row["neighbors"])).any() or (cells[1] >= len(panel.genes)).any():
            yield "neighbors.npy names a neighbour or a gene that is not there"
