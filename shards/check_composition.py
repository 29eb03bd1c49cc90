"""Promises of a whole dataset: of its hashes, donors, hold-outs, sections and unions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from shards.artifact import ArtifactRecord, Identity, read_artifact
from shards.dataset import dataset_path, read_record
from shards.errors import BadInput
from shards.schema import Dataset, DatasetRun, Manifest, Panel, Section, Split
from shards.sections import Centres, overlap
from shards.unions import PanelUnion, union_path, unions_of

REMEDY = "remove it if it is there, and run `cellpair curate` again"

Runs = Sequence[tuple[DatasetRun, Manifest]]


def composition_faults(dataset: Dataset, runs: Runs) -> Iterator[str]:
    """Whether the dataset is of these runs, each shard in one split, each person in one split."""
    rebuilt = Dataset.of(
        dataset.name,
        dataset.runs,
        dataset.panels,
        dataset.donors,
        dataset.shards,
        dataset.aliases,
        unions=dataset.unions,
        hold_out=dataset.hold_out,
        held_out=dataset.held_out,
    )
    where = dataset_path(dataset.fingerprint)
    if rebuilt.fingerprint != dataset.fingerprint:
        yield f"{where}: its content hashes to {rebuilt.fingerprint}; {REMEDY}"
    if rebuilt.totals != dataset.totals:
        yield f"{where}: totals are {dataset.totals}, but the runs add up to {rebuilt.totals}"
    yield from _straddling_donors(dataset)
    yield from _hold_out_faults(dataset, runs)
    listed = Counter(name for names in dataset.shards.values() for name in names)
    yield from (f"{name}: listed in {n} places" for name, n in listed.items() if n > 1)
    of_split = {split: set(names) for split, names in dataset.shards.items()}
    for run, manifest in runs:
        for shard in manifest.shards:
            name = f"{run.path}/{shard.name}"
            split = dataset.donors.get(shard.donor)
            if split is None:
                yield f"{name}: donor {shard.donor!r} has no split"
            elif name not in of_split.get(split, ()):
                yield f"{name}: donor {shard.donor!r} is in {split}, but the shard is not"
            if run.section is not None and shard.donor not in run.donors:
                yield f"{name}: donor {shard.donor!r} is none of those that the dataset tells"
            listed.pop(name, None)
    readable = {run.path for run, _ in runs}
    for name in listed:
        if name.rpartition("/")[0] in readable:
            yield f"{name}: listed, but in no manifest"


def _straddling_donors(dataset: Dataset) -> Iterator[str]:
    """Names of one person in several splits."""
    splits_of: dict[str, dict[str, Split]] = {}
    for donor, split in dataset.donors.items():
        splits_of.setdefault(dataset.canonical(donor), {})[donor] = split
    for canonical, splits in splits_of.items():
        if len(set(splits.values())) > 1:
            told = ", ".join(f"{donor!r} in {split}" for donor, split in sorted(splits.items()))
            where = dataset_path(dataset.fingerprint)
            yield f"{where}: donor {canonical!r} straddles splits: {told}"


def _hold_out_faults(dataset: Dataset, runs: Runs) -> Iterator[str]:
    """Donors of samples that are held out, found anew from the manifests, in another split."""
    held = {source_id for source_ids in dataset.hold_out.values() for source_id in source_ids}
    why = {donor: set(source_ids) for donor, source_ids in dataset.held_out.items()}
    for run, manifest in runs:
        if manifest.source_id in held:
            for donor in {*run.donors, *(shard.donor for shard in manifest.shards)}:
                why.setdefault(dataset.canonical(donor), set()).add(manifest.source_id)
    where = dataset_path(dataset.fingerprint)
    for donor, split in dataset.donors.items():
        source_ids = why.get(dataset.canonical(donor))
        if source_ids and split != "test":
            told = ", ".join(sorted(source_ids))
            yield f"{where}: donor {donor!r} is held out for {told}, but in {split}"
    for donor, source_ids in sorted(why.items()):
        if source_ids - set(dataset.held_out.get(donor, ())) or source_ids - held:
            told = ", ".join(sorted(source_ids))
            yield f"{where}: donor {donor!r} is held out for {told}, which it tells otherwise"


def union_faults(dataset: Dataset, root: Path, panels: Mapping[str, Panel]) -> Iterator[str]:
    """Whether the unions are those of the panels; of a dataset that has some, and sound panels."""
    if not dataset.unions or panels.keys() != dataset.panels.keys():
        return
    wanted = unions_of(panels[panel_id] for panel_id in dataset.panels)
    paths = {species: union_path(union) for species, union in wanted.items()}
    if dataset.unions != paths:
        where = dataset_path(dataset.fingerprint)
        yield f"{where}: unions are {dataset.unions}, not {paths}; {REMEDY}"
    for species, union in wanted.items():
        try:
            read_record(root / paths[species], PanelUnion)
        except BadInput as error:
            yield f"{paths[species]}: {error.found}; {REMEDY}"
            continue
        if (root / paths[species]).read_bytes() != union.model_dump_json(indent=1).encode():
            yield f"{paths[species]}: not the union of its panels; {REMEDY}"


def section_faults(dataset: Dataset, root: Path, runs: Runs) -> Iterator[str]:
    """Sections that lie in two splits.

    A section is what one bundle holds, and what lies at one place of one slide. So a cell of a
    bundle that comes twice has one donor and one split, and runs of one slide whose cells lie on
    each other are in one split. Cores of several donors, and runs side by side, are sections of
    their own. A run of an earlier dataset, which tells no section, is passed over.
    """
    by_bundle: dict[str, list[tuple[DatasetRun, Manifest]]] = defaultdict(list)
    by_slide: dict[str, list[tuple[DatasetRun, Manifest]]] = defaultdict(list)
    for run, manifest in runs:
        if run.section is None:
            continue
        yield from _recorded_faults(root, run, run.section)
        by_bundle[run.section.bundle].append((run, manifest))
        if run.section.slide is not None:
            by_slide[run.section.slide].append((run, manifest))
    for same in by_bundle.values():
        for a, b in combinations(same, 2):
            yield from _same_cells(dataset, root, a, b)
    for same in by_slide.values():
        for a, b in combinations(same, 2):
            yield from _same_place(dataset, root, a, b)


def _recorded_faults(root: Path, run: DatasetRun, section: Section) -> Iterator[str]:
    """Whether the records of the stages, where they are there, say the same."""
    shards = _record(root / run.path)
    if shards is None:
        return  # which is told with the run
    told = {"xenium": section.bundle, "slide": section.slide}
    folder = (root / run.path).parent.parent
    for stage, fingerprint in shards.parents.items():
        record = _record(folder / stage / fingerprint)
        if record is None:
            continue  # a dataset that was copied without what it was made of
        identity = Identity.model_validate(record.model_dump(include=set(Identity.model_fields)))
        found = {key: record.inputs.get(key, told[key]) for key in told}
        if stage == "patches":
            found["slide"] = record.inputs.get("slide")
        if identity.fingerprint != fingerprint or found != told:
            where = f"{run.path}: section {section.model_dump_json(exclude_none=True)}"
            yield f"{where} is not what {stage}/{fingerprint} was made of; {REMEDY}"


def _record(folder: Path) -> ArtifactRecord | None:
    try:
        return read_artifact(folder)
    except (OSError, ValidationError):
        return None


def _same_cells(
    dataset: Dataset,
    root: Path,
    a: tuple[DatasetRun, Manifest],
    b: tuple[DatasetRun, Manifest],
) -> Iterator[str]:
    of_a, of_b = (_donor_of_cell(root, run, manifest) for run, manifest in (a, b))
    differing = {
        (of_a[cell], of_b[cell])
        for cell in of_a.keys() & of_b.keys()
        if dataset.canonical(of_a[cell]) != dataset.canonical(of_b[cell])
    }
    for donor, other in sorted(differing):
        splits = f"{dataset.donors.get(donor)} and {dataset.donors.get(other)}"
        yield (
            f"{a[0].run} and {b[0].run} have the same bundle, but cells that are of donor "
            f"{donor!r} in one and of {other!r} in the other, in {splits}"
        )


def _donor_of_cell(root: Path, run: DatasetRun, manifest: Manifest) -> dict[str, str]:
    donor_of: dict[str, str] = {}
    for shard in manifest.shards:
        table = _columns(root / run.path / f"{shard.name}.parquet", "cell_id")
        if table is not None:
            donor_of |= dict.fromkeys(table["cell_id"].to_pylist(), shard.donor)
    return donor_of


def _same_place(
    dataset: Dataset,
    root: Path,
    a: tuple[DatasetRun, Manifest],
    b: tuple[DatasetRun, Manifest],
) -> Iterator[str]:
    splits = {
        dataset.donors.get(shard.donor) for _, manifest in (a, b) for shard in manifest.shards
    }
    section = a[0].section
    if len(splits) < 2 or section is None or section.slide_mpp is None:
        return
    few, many = sorted((_centres_px(root, *run) for run in (a, b)), key=len)
    n_meet = overlap(few, many, section.slide_mpp)
    if n_meet is not None:
        told = " and ".join(sorted(map(str, splits)))
        yield (
            f"{a[0].run} and {b[0].run} overlap on one slide, {n_meet} of {len(few)} cells, and "
            f"are in {told}: one section straddles splits"
        )


def _centres_px(root: Path, run: DatasetRun, manifest: Manifest) -> Centres:
    """(n, 2) centres of the samples, in level-0 pixels of their slide."""
    columns = ("x_px", "y_px")
    tables = [_columns(root / run.path / f"{s.name}.parquet", *columns) for s in manifest.shards]
    found = [
        np.stack([t[name].to_numpy() for name in columns], axis=1) for t in tables if t is not None
    ]
    return np.concatenate([np.zeros((0, 2)), *found])


def _columns(path: Path, *names: str) -> pa.Table | None:
    """Columns of an index table; None of one that does not open, which is told with its shard."""
    try:
        table = pq.read_table(path, columns=list(names))
    except (OSError, pa.ArrowException):
        return None
    return table if table.column_names == list(names) else None
