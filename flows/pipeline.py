"""The stages in order, with the caller handed in: neither Prefect nor Dask is known here."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flows import conflicts
from flows.built import Blocks, Built, Call, CuratedRun, direct
from flows.config import CurateConfig, GivenRun, split_of
from flows.failures import words_of
from flows.log import working_on
from flows.stages import RunStages
from pairing import cells
from shards.artifact import sha256_of, write_if_changed
from shards.content import ContentHashes
from shards.dataset import panel_path, read_manifest, read_record
from shards.errors import BadInput
from shards.schema import SPLITS, Dataset, DatasetRun, Panel, Split
from shards.store import Store, store_of
from shards.write import MANIFEST_FILE

__all__ = [
    "Blocks",
    "Built",
    "Call",
    "Curated",
    "CuratedRun",
    "compose",
    "curate",
    "direct",
    "plan_runs",
]

log = logging.getLogger("cellpair")


@dataclass(frozen=True, slots=True)
class Curated:
    """What `curate` leaves: the runs that went through, the failures, the dataset if published.

    `built` holds every artifact that was needed, those of runs that failed later too.
    """

    runs: tuple[CuratedRun, ...]
    failures: dict[str, Exception]
    dataset: Dataset | None
    built: tuple[Built, ...] = ()


def plan_runs(
    config: CurateConfig,
    blocks: Blocks,
    *,
    device: str = "auto",
    call: Call = direct,
    only: tuple[str, ...] = (),
    store: Store | None = None,
) -> tuple[list[RunStages], dict[str, Exception]]:
    """The stages of each run, their inputs hashed and their identities known, and what failed.

    `only` names the runs to look at. Runs that are the same bundle under several donors fail.
    """
    store = store or store_of(config.out, config.remote)
    hashes = ContentHashes(config.out / "content-hashes.json")
    planned: list[RunStages] = []
    failures: dict[str, Exception] = {}
    for run in _chosen(config, only):
        with _collecting(run.id, config.out, failures):
            planned.append(RunStages(config, run, hashes, blocks, device, call, store))
            hashes.save()
            hashes.release()
    _add(conflicts.same_bundles([(p.run, p.inputs["xenium"]) for p in planned]), failures)
    return _without(planned, failures), failures


def curate(
    config: CurateConfig,
    blocks: Blocks,
    *,
    device: str = "auto",
    call: Call = direct,
    only: tuple[str, ...] = (),
    partial_dataset: bool = False,
    store: Store | None = None,
) -> Curated:
    """Everything from raw runs to the dataset under `config.out`.

    A failed run lets the others finish, but leaves the published dataset where it was, unless
    `partial_dataset` says otherwise. `only` names the runs to look at; the dataset is then made of
    these. What exists under its fingerprint is not made again.
    """
    store = store or store_of(config.out, config.remote)
    everything, failures = plan_runs(
        config, blocks, device=device, call=call, only=only, store=store
    )
    for stages in everything:
        with _collecting(stages.run.id, config.out, failures), closing_copies(stages):
            stages.register()
    planned = _without(everything, failures)
    _add(_overlaps(planned), failures)
    runs: list[CuratedRun] = []
    for stages in _without(planned, failures):
        with _collecting(stages.run.id, config.out, failures), closing_copies(stages):
            runs.append(stages.finish())
    built = tuple(b for stages in everything for b in stages.built.values())
    if not runs or (failures and not partial_dataset):
        return Curated(tuple(runs), failures, None, built)
    dataset = compose(config, runs, store)
    store.publish(dataset)
    log.info("dataset %s: %d pairs", dataset.fingerprint, dataset.totals.kept)
    return Curated(tuple(runs), failures, dataset, built)


@contextmanager
def closing_copies(stages: RunStages) -> Iterator[None]:
    """Copies of inputs and artifacts that the work on a run needs are there inside alone."""
    try:
        yield
    finally:
        stages.release()


@contextmanager
def _collecting(run: str, out: Path, failures: dict[str, Exception]) -> Iterator[None]:
    with working_on(run):
        try:
            yield
        except Exception as error:  # collected: one run's failure leaves the others going
            log.error("%s: failed: %s", run, words_of(error, out))
            log.debug("", exc_info=True)
            failures[run] = error


def _add(found: dict[str, Exception], failures: dict[str, Exception]) -> None:
    for run, error in found.items():
        with working_on(run):
            log.error("%s: failed: %s", run, words_of(error))
    failures |= found


def _without(planned: list[RunStages], failures: dict[str, Exception]) -> list[RunStages]:
    return [stages for stages in planned if stages.run.id not in failures]


def _overlaps(planned: list[RunStages]) -> dict[str, Exception]:
    """Runs whose cells lie on those of another run, on the same slide."""
    slides = Counter(stages.inputs.get("slide") for stages in planned)
    shared = [s for s in planned if s.run.slide is not None and slides[s.inputs["slide"]] > 1]
    return conflicts.overlaps([_on_slide(stages) for stages in shared])


def _on_slide(stages: RunStages) -> conflicts.RunOnSlide:
    with closing_copies(stages):
        return conflicts.RunOnSlide(
            stages.run.id, stages.inputs["slide"], stages.centres_px(), stages.image_mpp()
        )


def compose(config: CurateConfig, runs: list[CuratedRun], store: Store) -> Dataset:
    """The dataset of these runs: a composition of their shard sets; no shard is rewritten."""
    entries, panels = [], {}
    donors: dict[str, Split] = {}
    shards: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for run in runs:
        folder = store.at_hand(run.built["shards"].folder, texts=True)
        manifest, manifest_sha256 = read_manifest(folder), sha256_of(folder / MANIFEST_FILE)
        relative = f"runs/{run.config.id}/shards/{folder.name}"
        cells_folder = store.at_hand(run.built["cells"].folder, texts=True)
        panel = read_record(cells_folder / cells.PANEL_FILE, Panel)
        store.release()
        panels[panel.panel_id] = panel_path(panel.panel_id)
        write_if_changed(
            config.out / panel_path(panel.panel_id), panel.model_dump_json(indent=1).encode()
        )
        for donor, n_cells in run.built["shards"].summary["n_cells_of_donor"].items():
            if donor not in {shard.donor for shard in manifest.shards}:
                log.warning("%s: no pair of donor %r, of %d cells", manifest.run, donor, n_cells)
        for shard in manifest.shards:
            donors[shard.donor] = split_of(shard.donor, config.split)
            shards[donors[shard.donor]].append(f"{relative}/{shard.name}")
        entries.append(
            DatasetRun(
                run=manifest.run,
                path=relative,
                fingerprint=run.built["shards"].fingerprint,
                manifest_sha256=manifest_sha256,
                species=manifest.species,
                tissue=manifest.tissue,
                panel_id=manifest.panel_id,
                totals=manifest.totals,
            )
        )
    canonical = config.split.canonical
    assigned = {name for name in config.split.assign if not config.split.is_withdrawn(name)}
    unknown = sorted(set(map(canonical, assigned)) - set(map(canonical, donors)))
    if unknown and len(runs) == len(config.active_runs):
        log.warning("[split] assign names donors without a pair: %s", ", ".join(unknown))
    for split in ("val", "test"):
        if not shards[split]:
            log.warning(
                'the %s split is empty: assign donors by [split] assign, as { "%s" = "%s" }',
                split,
                min(donors),
                split,
            )
    return Dataset.of(
        config.name,
        entries,
        panels,
        donors,
        {k: tuple(v) for k, v in shards.items()},
        {donor: canonical(donor) for donor in donors if canonical(donor) != donor},
    )


def _chosen(config: CurateConfig, only: tuple[str, ...]) -> list[GivenRun]:
    unknown = sorted(set(only) - {run.id for run in config.runs})
    if unknown:
        raise BadInput(
            "--only",
            expected=f"ids of runs: {', '.join(run.id for run in config.runs)}",
            found=", ".join(unknown),
            remedy="name runs of the config",
        )
    return [run for run in config.active_runs if not only or run.id in only]
