"""`validate` and `describe` for any dataset folder: every promise proved again from the bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from shards.artifact import RECORD_FILE, Identity, read_artifact, sha256_of
from shards.check_composition import REMEDY, composition_faults, section_faults, union_faults
from shards.check_shard import broken_files, sample_faults
from shards.dataset import (
    POINTER_FILE,
    dataset_path,
    panel_path,
    read_dataset,
    read_manifest,
    read_panels,
    read_record,
)
from shards.errors import BadInput
from shards.remote import Location
from shards.schema import (
    INDEX_SCHEMAS,
    NOTE_OF_FLAG,
    NOTES_OF_NULLS,
    Dataset,
    DatasetPointer,
    DatasetRun,
    Manifest,
    Panel,
    Record,
)
from shards.unions import names_that_differ, unions_of
from shards.view import dataset_view
from shards.write import MANIFEST_FILE


def describe(path: Location) -> dict[str, Any]:
    """What a dataset is, for `cellpair info`: runs, donors and splits, samples, totals."""
    dataset, root = read_dataset(path)
    samples = Counter[str]()
    for run in dataset.runs:
        for shard in read_manifest(root / run.path).shards:
            samples[dataset.donors[shard.donor]] += shard.n_samples
    panels = read_panels(dataset, root)
    return {
        "kind": "dataset",
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "runs": [run.run for run in dataset.runs],
        "donors": dict(dataset.donors),
        "samples": {split: samples[split] for split in dataset.shards},
        "genes": {i: len(p.genes) for i, p in panels.items()},
        "unions": {s: len(union.genes) for s, union in unions_of(panels.values()).items()},
        "gene_names": names_that_differ(panels.values()),
        "held_out": {donor: list(why) for donor, why in dataset.held_out.items()},
        "totals": dataset.totals.model_dump(),
    }


# Has the files of a shard there: of which shard set, and its name.
Fetch = Callable[[str, str], None]


def validate(path: Location) -> list[str]:
    """The faults of a dataset, each a line that says where; an empty list is a clean bill.

    Every byte of the dataset, its pointer, panels, manifests, tars and tables is looked at. Of the
    record of an artifact, what decides its bytes, what lies in it and its totals are proved; its
    provenance and other figures are told only. Raises BadInput only where there is no dataset.
    What lies behind a URL is fetched shard by shard.
    """
    if isinstance(path, Path):
        return _faults(path, lambda shard_set, name: None)
    if not (path if path.suffix == ".json" else path / POINTER_FILE).is_file():
        read_dataset(path)  # says what is not there
    with dataset_view(path) as (view, there):
        faults = _faults(there, view.fetch_shard)
        return [view.told(fault) for fault in faults]


def _faults(path: Path, fetch: Fetch) -> list[str]:
    try:
        dataset, root = read_dataset(path)
    except BadInput as error:
        asked = path / POINTER_FILE if path.is_dir() else path
        if not asked.exists():
            raise
        named = "" if error.where == str(asked) else f", which {asked.name} names"
        return [f"{error.where}{named}: {error.found}; {REMEDY}"]
    assert isinstance(root, Path), "the root of a path"
    faults = list(_json_faults(path, dataset, root))
    panels: dict[str, Panel] = {}
    for panel_id, relative in dataset.panels.items():
        faults += _panel_faults(root, panel_id, relative, panels)
    manifests: list[tuple[DatasetRun, Manifest]] = []
    for run in dataset.runs:
        try:
            manifests.append((run, read_manifest(root / run.path)))
        except BadInput as error:
            folder = root / run.path
            found = error.found if folder.is_dir() else "the folder is missing"
            faults.append(f"{run.path}/{MANIFEST_FILE}: {found}; {_remedy_of(run)}")
    faults += composition_faults(dataset, manifests)
    faults += section_faults(dataset, root, manifests)
    faults += union_faults(dataset, root, panels)
    keys: Counter[str] = Counter()
    for run, manifest in manifests:
        faults += _run_faults(root, run, manifest)
        panel = panels.get(manifest.panel_id)
        if panel is None:
            faults.append(f"{run.run}: panel {run.panel_id} is not among the dataset's panels")
        for shard in manifest.shards:
            fetch(run.path, shard.name)
            files = [f"{fault}; {_remedy_of(run)}" for fault in broken_files(root, run.path, shard)]
            faults += files
            if not files and panel is not None:
                faults += sample_faults(root / run.path, shard, manifest, panel, keys)
        faults += _leaks_between_donors(root / run.path, manifest)
        faults += _noted_faults(root / run.path, manifest)
    faults += [f"{key}: {n} samples hold this key" for key, n in keys.items() if n > 1]
    return faults


def _remedy_of(run: DatasetRun) -> str:
    return f"remove the folder {run.path} and run `cellpair curate` again"


def _json_faults(path: Path, dataset: Dataset, root: Path) -> Iterator[str]:
    """Whether the pointer and the dataset are, byte by byte, what was written."""
    relative = dataset_path(dataset.fingerprint)
    if path.is_dir() or path.name == POINTER_FILE:
        pointer = read_record(root / POINTER_FILE, DatasetPointer)
        want = DatasetPointer(fingerprint=dataset.fingerprint, dataset=relative)
        if pointer != want or _was_changed(root / POINTER_FILE, pointer):
            yield f"{POINTER_FILE}: not as it was written, for {relative}; {REMEDY}"
        path = root / pointer.dataset
    if path.name != Path(relative).name:
        yield f"datasets/{path.name}: it says that it is {dataset.fingerprint}; {REMEDY}"
    if _was_changed(path, dataset, dataset.unsaid):
        yield f"datasets/{path.name}: not as it was written; {REMEDY}"
    for panel_id, panel in dataset.panels.items():
        if panel != panel_path(panel_id):
            yield f"datasets/{path.name}: panel {panel_id} would not be in {panel}; {REMEDY}"


def _was_changed(path: Path, record: Record, unsaid: dict[str, Any] | None = None) -> bool:
    return path.read_bytes() != record.model_dump_json(indent=1, exclude=unsaid).encode()


def _panel_faults(
    root: Path, panel_id: str, relative: str, panels: dict[str, Panel]
) -> Iterator[str]:
    """Adds the panel to `panels` where it can be read."""
    try:
        panel = read_record(root / relative, Panel)
    except BadInput as error:
        yield f"{relative}: {error.found}; {REMEDY}"
        return
    panels[panel_id] = panel
    if panel.panel_id != panel_id:
        yield f"{relative}: it holds panel {panel.panel_id}, not {panel_id}; {REMEDY}"
    elif _was_changed(root / relative, panel):
        yield f"{relative}: not as it was written; {REMEDY}"


def _run_faults(root: Path, run: DatasetRun, manifest: Manifest) -> Iterator[str]:
    if sha256_of(root / run.path / MANIFEST_FILE) != run.manifest_sha256:
        yield (
            f"{run.path}/{MANIFEST_FILE}: the manifest is not the one that the dataset was made "
            f"of; {_remedy_of(run)}"
        )
    fields = ["run", "species", "tissue", "panel_id", "totals"]
    if run.section is not None:  # datasets say no source_id before they tell sections
        fields.append("source_id")
    for field in fields:
        if getattr(manifest, field) != getattr(run, field):
            yield f"{run.run}: {field} differs between manifest and dataset"
    for found in _artifact_faults(root / run.path, run, manifest):
        yield f"{run.path}/{RECORD_FILE}: {found}; {_remedy_of(run)}"


def _artifact_faults(folder: Path, run: DatasetRun, manifest: Manifest) -> Iterator[str]:
    try:
        record = read_artifact(folder)
    except (OSError, ValidationError) as error:
        yield str(error).replace("\n", "; ")
        return
    if record is None:
        yield "missing, so the folder was never whole"
        return
    if _was_changed(folder / RECORD_FILE, record):
        yield "not as it was written"
    identity = Identity.model_validate(record.model_dump(include=set(Identity.model_fields)))
    for fingerprint in (record.fingerprint, identity.fingerprint):
        if fingerprint != run.fingerprint:
            yield f"it is of artifact {fingerprint}, the dataset was made of {run.fingerprint}"
    hashes = {MANIFEST_FILE: run.manifest_sha256}
    for shard in manifest.shards:
        hashes |= {
            f"{shard.name}.tar": shard.tar_sha256,
            f"{shard.name}.parquet": shard.table_sha256,
        }
    for name in sorted(hashes.keys() | record.files.keys()):
        facts, path = record.files.get(name), folder / name
        if facts is None or facts.sha256 != hashes.get(name):
            yield f"{name} is not the file of the manifest"
        elif path.is_file() and facts.n_bytes != path.stat().st_size:
            yield f"{name} has {path.stat().st_size} bytes, not {facts.n_bytes}"
    totals = manifest.totals.model_dump()
    if {key: record.summary.get(key) for key in totals} != totals:
        yield "its totals are not those of the manifest"


def _leaks_between_donors(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Neighbours of another donor: their counts lie in a sample that may be in another split."""
    if len({shard.donor for shard in manifest.shards}) < 2:
        return
    tables = [folder / f"{shard.name}.parquet" for shard in manifest.shards]
    donor_of: dict[str, str] = {}
    for path in tables:
        for row in _rows(path, ["cell_id", "donor"]):
            donor_of[row["cell_id"]] = row["donor"]
    for path in tables:
        for row in _rows(path, ["key", "donor", "neighbors"]):
            others = {donor_of.get(n["cell_id"], row["donor"]) for n in row["neighbors"]}
            for other in sorted(others - {row["donor"]}):
                yield (
                    f"{path.stem}, {row['key']}: a neighbour is of donor {other!r}, the sample of "
                    f"{row['donor']!r}"
                )


def _noted_faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Whether as many samples have a flag, or lack a score, as the totals say."""
    noted = manifest.totals.noted
    nullable = {
        note: column
        for column, note in NOTES_OF_NULLS.items()
        if note in noted and column in INDEX_SCHEMAS[manifest.schema_version].names
    }
    flags = [note for note in noted if note.startswith(NOTE_OF_FLAG)]
    if not nullable and not flags:
        return
    found: Counter[str] = Counter()
    for shard in manifest.shards:
        for row in _rows(folder / f"{shard.name}.parquet", [*nullable.values(), "flags"]):
            found.update(note for note, column in nullable.items() if row[column] is None)
            found.update(NOTE_OF_FLAG + flag for flag in row["flags"])
    for note in (*nullable, *flags):
        if found[note] != noted[note]:
            yield (
                f"{manifest.run}: {note.replace('_', ' ')}: {found[note]} samples, but the totals "
                f"say {noted[note]}"
            )


def _rows(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    """Rows of an index table; none of one that does not open, which is told with its shard."""
    try:
        rows: list[dict[str, Any]] = pq.read_table(path, columns=columns).to_pylist()
    except (OSError, pa.ArrowException):
        return []
    return rows if rows and rows[0].keys() == set(columns) else []
