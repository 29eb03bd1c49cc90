"""A dataset behind a URL, as the folder that an export reads: what it needs of it, and no more."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows.export.record import Format
from flows.export.source import checked_dataset
from pairing.cells import CELLS_FILE
from pairing.registration.record import FIELD_FILE
from segmentation.config import NUCLEI_FILE
from shards.artifact import RECORD_FILE, ArtifactRecord
from shards.dataset import read_manifest, read_record
from shards.errors import BadInput
from shards.remote import RemotePath
from shards.schema import Split
from shards.view import View, dataset_view

# Of the artifacts behind shards, what stores of spatialdata are made from besides texts.
_PLACED_BY = {"cells": CELLS_FILE, "nuclei": NUCLEI_FILE, "registration": FIELD_FILE}


@contextmanager
def copied(
    asked: RemotePath, to: Format, splits: Sequence[Split], runs: Collection[str]
) -> Iterator[Path]:
    """The dataset's path in a folder of the cache, gone on leaving; names it by its URL in errors.

    The shards of these splits and `runs` (all, where none is named) are there whole; for
    spatialdata so are the artifacts with places and outlines. Raises BadInput where there is no
    dataset, BadSetting where the cache has no room.
    """
    with dataset_view(asked) as (view, path):
        try:
            dataset, _ = checked_dataset(path, runs)
            for run in dataset.runs:
                shards = [
                    shard.name
                    for shard in read_manifest(view.root / run.path).shards
                    if dataset.donors[shard.donor] in splits and (not runs or run.run in runs)
                ]
                view.fetch(f"{run.path}/{name}{s}" for name in shards for s in (".tar", ".parquet"))
                if shards and to == "spatialdata":
                    _fetch_places(view, run.path)
            yield path
        except BadInput as error:
            raise type(error)(
                view.told(error.where),
                expected=view.told(error.expected),
                found=view.told(error.found),
                remedy=view.told(error.remedy),
            ) from error


def _fetch_places(view: View, shard_set: str) -> None:
    """Artifacts that the shards and their cells were made from; who reads them says which lack."""
    stages = Path(shard_set).parent.parent
    parents = dict(read_record(view.root / shard_set / RECORD_FILE, ArtifactRecord).parents)
    for stage, file in _PLACED_BY.items():  # the cells name the others
        if stage not in parents:
            continue
        folder = (stages / stage / parents[stage]).as_posix()
        view.add(folder)
        view.fetch([f"{folder}/{file}"])
        record = view.root / folder / RECORD_FILE
        if record.exists():
            parents |= read_record(record, ArtifactRecord).parents
