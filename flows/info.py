"""`cellpair info`: what a path is, told by what is in it."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from flows.export.record import EXPORT_FILE, Export
from pairing.slide import open_slide
from pairing.xenium import open_xenium
from segmentation.config import FACTS_FILE, SegmentationFacts
from shards.artifact import link_or_copy
from shards.cache import Cache, Holding
from shards.check import describe
from shards.copies import Copies, look_at
from shards.dataset import POINTER_FILE, read_record
from shards.errors import BadInput
from shards.remote import Location, RemotePath


def describe_path(path: Location) -> dict[str, Any]:
    """Facts of a dataset, export, checkpoint, shard, bundle, slide or its nuclei, `kind` first.

    What lies behind a URL is fetched, but for datasets. Raises BadInput where it is none of these.
    """
    if isinstance(path, RemotePath):
        return _describe_remote(path)
    if not path.exists():
        raise BadInput(
            path, expected="an existing file or folder", found="nothing", remedy="mend the path"
        )
    if (path / POINTER_FILE).exists() or path.suffix == ".json":
        return describe(path)
    if (path / EXPORT_FILE).exists():
        return {"kind": "export", **read_record(path / EXPORT_FILE, Export).model_dump(mode="json")}
    if (path / "meta.json").exists():
        return {"kind": "checkpoint", **json.loads((path / "meta.json").read_text())}
    if (path / FACTS_FILE).exists():
        facts = read_record(path / FACTS_FILE, SegmentationFacts)
        return {"kind": "nuclei", **facts.model_dump(mode="json")}
    if path.suffix == ".tar":
        return _shard(path)
    if path.is_dir() or path.suffix == ".zip":
        return _bundle(path)
    return _slide(path)


def _describe_remote(path: RemotePath) -> dict[str, Any]:
    if path.suffix == ".json" or (path / POINTER_FILE).is_file():
        return describe(path)
    copies = Copies(Cache.of_user())
    with closing(Holding()) as held:
        seen = look_at(path)
        copies.hold(path, seen, held)
        copy = copies.place(path, seen)
        if path.suffix == ".tar" and (table := path.with_suffix(".parquet")).is_file():
            seen = look_at(table)
            copies.hold(table, seen, held)
            link_or_copy(copies.place(table, seen), copy.with_suffix(".parquet"))
        return describe_path(copy)


def _shard(path: Path) -> dict[str, Any]:
    table_path = path.with_suffix(".parquet")
    if not table_path.exists():
        raise BadInput(
            path,
            expected=f"its index table {table_path.name} beside it",
            found="no such file",
            remedy="copy the table along with the tar",
        )
    table = pq.read_table(table_path, columns=["run", "donor", "panel", "mpp", "n_counts"])
    return {
        "kind": "shard",
        "samples": table.num_rows,
        "bytes": path.stat().st_size,
        **{k: sorted(set(table[k].to_pylist())) for k in ("run", "donor", "panel", "mpp")},
        "counts": sum(table["n_counts"].to_pylist()),
    }


def _bundle(path: Path) -> dict[str, Any]:
    with open_xenium(path) as run:
        return {
            "kind": "xenium",
            "layout": run.layout,
            "cells": run.n_cells,
            "genes": len(run.genes()),
            "species": run.species,
            "pixel_size_um": run.pixel_size_um,
            "transcripts": run.has_transcripts,
            **run.provenance,
        }


def _slide(path: Path) -> dict[str, Any]:
    with open_slide(path) as slide:
        return {
            "kind": "slide",
            "size_px": slide.size_px,
            "mpp": slide.mpp,
            "levels": [(*level.size_px, level.downsample) for level in slide.levels],
            "channels": slide.n_channels,
            "dtype": str(slide.dtype),
            "notes": slide.notes,
        }
