"""The dataset of curated runs: shard sets, splits, panels and their unions, and what is odd."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from flows.built import CuratedRun
from flows.config import CurateConfig, GivenRun, split_of
from flows.donor_names import confusable
from flows.hold_out import (
    contradictions,
    held_out_donors,
    held_out_source_ids,
    source_ids_of,
    unknown_names,
)
from flows.toml_text import quoted
from pairing import cells
from pairing.annotations import donors_named
from pairing.registration.record import REGISTRATION_FILE, Registration
from shards.artifact import RECORD_FILE, ArtifactRecord, sha256_of, write_if_changed
from shards.cache import Cache, Holding
from shards.copies import Copies, look_at
from shards.dataset import panel_path, read_manifest, read_record
from shards.errors import BadInput, BadInputs
from shards.remote import RemotePath
from shards.schema import SPLITS, Dataset, DatasetRun, Manifest, Panel, Section, Split
from shards.store import Store
from shards.unions import names_that_differ, union_path, unions_of
from shards.write import MANIFEST_FILE

log = logging.getLogger("cellpair")

_N_TOLD = 5


def held_out_of(config: CurateConfig) -> dict[str, tuple[str, ...]]:
    """Canonical donors who are in test for `split.hold_out`, with the source_ids because of which.

    Of all runs of the config, those too that are not looked at now or fail: whoever is held out is
    so in every dataset. Raises BadInput where a file of donors can't be read, and where `assign`
    sends such a donor elsewhere.
    """
    split = config.split
    wanted = held_out_source_ids(split)
    samples = [(r.source_id, _donors(r)) for r in config.runs if r.source_id in wanted]
    held_out = held_out_donors(samples, split)
    faults = [
        BadInput(
            "[split]",
            expected="donors of held-out samples in test",
            found=words,
            remedy="take the donor out of assign, or the sample out of hold_out",
        )
        for words in contradictions(held_out, split)
    ]
    if faults:
        raise BadInputs(faults)
    return held_out


def _donors(run: GivenRun) -> Sequence[str]:
    if isinstance(run.donors, RemotePath):
        copies, seen = Copies(Cache.of_user()), look_at(run.donors)
        with closing(Holding()) as held:
            copies.hold(run.donors, seen, held)
            return donors_named(copies.place(run.donors, seen))
    if run.donors is not None:
        return donors_named(run.donors)
    assert run.donor is not None
    return (run.donor,)


def compose(
    config: CurateConfig,
    runs: Sequence[CuratedRun],
    held_out: Mapping[str, tuple[str, ...]],
    store: Store,
) -> Dataset:
    """The dataset of these runs: a composition of their shard sets; no shard is rewritten.

    Writes the panels and their unions under `config.out`. `held_out` is what `held_out_of` says.
    """
    with closing(Holding()) as held:
        for run in runs:
            for stage in ("registration", "cells", "patches", "shards"):
                if stage in run.built:
                    store.at_hand(run.built[stage].folder, held, texts=True)
        return _composed(config, runs, held_out)


def _composed(
    config: CurateConfig, runs: Sequence[CuratedRun], held_out: Mapping[str, tuple[str, ...]]
) -> Dataset:
    manifests = [read_manifest(run.built["shards"].folder) for run in runs]
    entries = [_entry(run, m) for run, m in zip(runs, manifests, strict=True)]
    # In the order of the shards, each donor once: there may be thousands of shards.
    in_order = dict.fromkeys(shard.donor for manifest in manifests for shard in manifest.shards)
    donors = {donor: split_of(donor, config.split, held_out) for donor in in_order}
    shards: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for entry, manifest in zip(entries, manifests, strict=True):
        for shard in manifest.shards:
            shards[donors[shard.donor]].append(f"{entry.path}/{shard.name}")
    panels = panels_of(runs, manifests).values()
    named = sorted({*donors, *(donor for entry in entries for donor in entry.donors)})
    canonical = {donor: config.split.canonical(donor) for donor in named}
    dataset = Dataset.of(
        config.name,
        entries,
        _write_panels(config.out, panels),
        donors,
        {split: tuple(names) for split, names in shards.items()},
        {donor: name for donor, name in canonical.items() if name != donor},
        unions=_write_unions(config.out, panels),
        hold_out=source_ids_of(config.split.hold_out),
        held_out={d: why for d, why in held_out.items() if d in canonical.values()},
    )
    if len(runs) == len(config.active_runs):
        _tell_unknown_names(config, donors)
        _tell_withdrawal(config, runs, named)
    _tell_empty_splits(dataset)
    _tell_names(panels, named, canonical)
    return dataset


def _entry(run: CuratedRun, manifest: Manifest) -> DatasetRun:
    built = run.built["shards"]
    n_cells_of_donor: dict[str, int] = built.summary["n_cells_of_donor"]
    with_pairs = {shard.donor for shard in manifest.shards}
    for donor, n_cells in n_cells_of_donor.items():
        if donor not in with_pairs:
            log.warning("%s: no pair of donor %r, of %d cells", manifest.run, donor, n_cells)
    return DatasetRun(
        run=manifest.run,
        path=f"runs/{run.config.id}/shards/{built.folder.name}",
        fingerprint=built.fingerprint,
        manifest_sha256=sha256_of(built.folder / MANIFEST_FILE),
        species=manifest.species,
        tissue=manifest.tissue,
        panel_id=manifest.panel_id,
        totals=manifest.totals,
        source_id=manifest.source_id,
        donors=tuple(sorted(n_cells_of_donor)),
        section=_section(run),
    )


def _section(run: CuratedRun) -> Section:
    """By what the records of the stages say that they were made of."""
    of_cells, of_patches = (
        read_record(run.built[stage].folder / RECORD_FILE, ArtifactRecord).inputs
        for stage in ("cells", "patches")
    )
    if "slide" not in of_patches:
        return Section(bundle=of_cells["xenium"])
    path = run.built["registration"].folder / REGISTRATION_FILE
    return Section(
        bundle=of_cells["xenium"],
        slide=of_patches["slide"],
        slide_mpp=read_record(path, Registration).slide_mpp,
    )


def panels_of(runs: Sequence[CuratedRun], manifests: Sequence[Manifest]) -> dict[str, Panel]:
    """The panels by id, in the order of the runs; of runs of one panel it is read once."""
    panels: dict[str, Panel] = {}
    for run, manifest in zip(runs, manifests, strict=True):
        if manifest.panel_id not in panels:
            path = run.built["cells"].folder / cells.PANEL_FILE
            panels[manifest.panel_id] = read_record(path, Panel)
    return panels


def _write_panels(out: Path, panels: Collection[Panel]) -> dict[str, str]:
    for panel in panels:
        path = out / panel_path(panel.panel_id)
        write_if_changed(path, panel.model_dump_json(indent=1).encode())
    return {panel.panel_id: panel_path(panel.panel_id) for panel in panels}


def _write_unions(out: Path, panels: Iterable[Panel]) -> dict[str, str]:
    unions = unions_of(panels)
    for union in unions.values():
        write_if_changed(out / union_path(union), union.model_dump_json(indent=1).encode())
    return {species: union_path(union) for species, union in unions.items()}


def _tell_unknown_names(config: CurateConfig, donors: Mapping[str, Split]) -> None:
    split = config.split
    assigned = {split.canonical(name) for name in split.assign if not split.is_withdrawn(name)}
    unknown = sorted(assigned - set(map(split.canonical, donors)))
    if unknown:
        log.warning("[split] assign names donors without a pair: %s", ", ".join(unknown))
    source_ids = [run.source_id for run in config.runs if run.source_id is not None]
    _, without_run = unknown_names(split.hold_out, source_ids)
    if without_run:
        log.warning("[split] hold_out names source_ids that no run has: %s", ", ".join(without_run))


def _tell_withdrawal(
    config: CurateConfig, runs: Sequence[CuratedRun], donors: Sequence[str]
) -> None:
    split = config.split
    if not split.withdraw:
        return
    of_runs = {run.donor for run in config.runs if run.donor is not None}
    of_runs |= {donor for run in runs for donor in run.withdrawn}
    known = {split.canonical(donor) for donor in of_runs if split.is_withdrawn(donor)}
    for name in split.withdraw:
        if split.canonical(name) not in known:
            alike = [d for d in donors if confusable([name, d], {})]
            log.warning(
                "[split] withdraw names a donor of no run: %r%s",
                name,
                f"; is {' or '.join(map(repr, alike))} meant?" if alike else "",
            )
    log.info(
        "withdrawn donors are in no part of this dataset; what the folder still holds of them goes "
        "by `cellpair clean`, and exports that were made before by whoever has them"
    )


def _tell_empty_splits(dataset: Dataset) -> None:
    for split in ("val", "test"):
        if not dataset.shards[split]:
            log.warning(
                'the %s split is empty: assign donors by [split] assign, as { "%s" = "%s" }',
                split,
                min(dataset.donors),
                split,
            )


def _tell_names(
    panels: Iterable[Panel], donors: Sequence[str], canonical: Mapping[str, str]
) -> None:
    for names in confusable(donors, canonical):
        first, *others = names
        log.warning(
            "donors %s are told apart by their names alone: if they are one person, say "
            "[split] aliases = { %s = %s }",
            " and ".join(map(repr, names)),
            quoted(first),
            f"[{', '.join(map(quoted, others))}]",
        )
    differing = names_that_differ(panels)
    if differing:
        log.warning(
            "panels name %d genes differently, all told by `cellpair info`: %s%s",
            len(differing),
            "; ".join(differing[:_N_TOLD]),
            " …" if len(differing) > _N_TOLD else "",
        )
