"""One shard proved from its bytes: its two files against the manifest, its samples against them."""

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
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg

from shards.artifact import sha256_of
from shards.schema import (
    COUNTS_MEMBER,
    IMAGE_MEMBER,
    INDEX_SCHEMAS,
    NEIGHBORS_MEMBER,
    Manifest,
    Panel,
    ShardInfo,
    sample_key,
)

_MEMBERS = ((IMAGE_MEMBER, "jpg"), (COUNTS_MEMBER, "counts"), (NEIGHBORS_MEMBER, "neighbors"))


def broken_files(root: Path, shard_set: str, shard: ShardInfo) -> Iterator[str]:
    """What is wrong with the tar and the table of a shard as files; paths are below `root`."""
    hashes = {"tar": shard.tar_sha256, "parquet": shard.table_sha256}
    for suffix, want in hashes.items():
        relative = f"{shard_set}/{shard.name}.{suffix}"
        path = root / relative
        if not path.is_file():
            yield f"{relative}: {'not a file' if path.exists() else 'missing'}"
            continue
        n_bytes = path.stat().st_size
        if suffix == "tar" and n_bytes != shard.tar_bytes:
            yield f"{relative}: {n_bytes} bytes, the manifest says {shard.tar_bytes}"
        elif (found := sha256_of(path)) != want:
            yield f"{relative}: sha256 {found[:12]}…, the manifest says {want[:12]}…"


def sample_faults(
    folder: Path, shard: ShardInfo, manifest: Manifest, panel: Panel, keys: Counter[str]
) -> Iterator[str]:
    """What is wrong inside a shard whose files are whole; adds its keys to `keys`."""
    try:
        yield from _sample_faults(folder, shard, manifest, panel, keys)
    except (pa.ArrowException, tarfile.TarError, OSError, EOFError, ValueError) as error:
        # Files with the hashes that the manifest says: whoever wrote it wrote them broken.
        yield f"{shard.name}: does not open: {error}"


def _sample_faults(
    folder: Path, shard: ShardInfo, manifest: Manifest, panel: Panel, keys: Counter[str]
) -> Iterator[str]:
    tar_path, table_path = folder / f"{shard.name}.tar", folder / f"{shard.name}.parquet"
    table = pq.read_table(table_path)
    if not table.schema.equals(INDEX_SCHEMAS[manifest.schema_version]):
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
        for member, column in _MEMBERS
        if row[f"{column}_offset"] is not None
    ]
    if members != listed:
        yield f"{shard.name}: the members of the tar are not those of the index table"
        return
    with tar_path.open("rb") as f:
        for row in rows:
            keys[row["key"]] += 1
            contents = {
                column: os.pread(f.fileno(), row[f"{column}_size"], row[f"{column}_offset"])
                for _, column in _MEMBERS
                if row[f"{column}_offset"] is not None
            }
            for fault in _faults_of_sample(row, contents, shard, manifest, panel):
                yield f"{shard.name}, {row['key']}: {fault}"


def _faults_of_sample(
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
