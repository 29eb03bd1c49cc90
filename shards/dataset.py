"""Read and publish datasets: the immutable composition and the pointer to the newest."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from shards.artifact import write_atomically, write_if_changed
from shards.errors import BadInput
from shards.remote import Location
from shards.schema import Dataset, DatasetPointer, Manifest, Panel, Record
from shards.write import MANIFEST_FILE

POINTER_FILE = "dataset.json"

R = TypeVar("R", bound=Record)


def read_record(path: Location, kind: type[R]) -> R:
    """A JSON record from disk. Raises BadInput where it can't be read or is of another version."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        found = "no such file"
    except ConnectionError:  # no fault of the file's
        raise
    except OSError as error:
        found = str(error.strerror)
    except (ValidationError, UnicodeDecodeError) as error:
        found = str(error).replace("\n", "; ")
    raise BadInput(
        path,
        expected=f"a {kind.__name__} record of this version",
        found=found,
        remedy="give the output folder of a finished `cellpair curate`, or run it again",
    )


def read_dataset(path: Location) -> tuple[Dataset, Location]:
    """The dataset at `path` and its root folder.

    `path` is the output folder of `curate` or its URL, its `dataset.json`, or one of
    `datasets/*.json`.
    """
    if path.is_dir():
        path = path / POINTER_FILE
    if path.name == POINTER_FILE:
        path = path.parent / read_record(path, DatasetPointer).dataset
    return read_record(path, Dataset), path.parent.parent


def read_manifest(shard_set: Location) -> Manifest:
    return read_record(shard_set / MANIFEST_FILE, Manifest)


def read_panels(dataset: Dataset, root: Location) -> dict[str, Panel]:
    return {panel_id: read_record(root / p, Panel) for panel_id, p in dataset.panels.items()}


def panel_path(panel_id: str) -> str:
    return f"panels/panel-{panel_id}.json"


def dataset_path(fingerprint: str) -> str:
    return f"datasets/{fingerprint}.json"


def publish_dataset(root: Path, dataset: Dataset) -> None:
    """Write the dataset, then move the pointer to it; what was there before stays readable."""
    relative = dataset_path(dataset.fingerprint)
    if not (root / relative).exists():
        write_atomically(root / relative, dataset.model_dump_json(indent=1).encode())
    pointer = DatasetPointer(fingerprint=dataset.fingerprint, dataset=relative)
    write_if_changed(root / POINTER_FILE, pointer.model_dump_json(indent=1).encode())
