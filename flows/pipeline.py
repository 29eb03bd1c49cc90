"""The stages in order, with the caller handed in: neither Prefect nor Dask is known here."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flows import conflicts
from flows.built import Blocks, Built, Call, CuratedRun, direct
from flows.config import CurateConfig, RunConfig, split_of
from flows.failures import words_of
from flows.log import working_on
from flows.stages import RunStages
from pairing import cells
from shards.artifact import sha256_of, write_if_changed
from shards.content import ContentHashes
from shards.dataset import panel_path, publish_dataset, read_manifest, read_record
from shards.errors import BadInput
from shards.schema import SPLITS, Dataset, DatasetRun, Panel, Split
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

T = TypeVar("T")

# A registration is one block, on which its run waits and does nothing else.
_REGISTRATIONS_PER_RUN_AT_ONCE = 16


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
) -> tuple[list[RunStages], dict[str, Exception]]:
    """The stages of each run, their inputs hashed and their identities known, and what failed.

    `only` names the runs to look at. Runs that are the same bundle under several donors fail.
    """
    hashes = ContentHashes(config.out / "content-hashes.json")
    planned: list[RunStages] = []
    failures: dict[str, Exception] = {}
    for run in _chosen(config, only):
        with _collecting(run.id, config.out, failures):
            planned.append(RunStages(config, run, hashes, blocks, device, call))
            hashes.save()
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
    runs_at_once: int = 1,
) -> Curated:
    """Everything from raw runs to the dataset under `config.out`.

    So many runs are worked on at once, each by a thread, so that one has blocks for the workers
    while another has none; `blocks` and `call` are then called by several threads. A failed run
    lets the others finish, but leaves the published dataset where it was, unless `partial_dataset`
    says otherwise. `only` names the runs to look at; the dataset is then made of these. What exists
    under its fingerprint is not made again.
    """
    everything, failures = plan_runs(config, blocks, device=device, call=call, only=only)
    n_registered_at_once = 1 if runs_at_once == 1 else _REGISTRATIONS_PER_RUN_AT_ONCE * runs_at_once
    _each(everything, RunStages.register, n_registered_at_once, failures)
    planned = _without(everything, failures)
    _add(_overlaps(planned), failures)
    runs = _each(_without(planned, failures), RunStages.finish, runs_at_once, failures)
    built = tuple(b for stages in everything for b in stages.built.values())
    if not runs or (failures and not partial_dataset):
        return Curated(tuple(runs), failures, None, built)
    dataset = compose(config, runs)
    publish_dataset(config.out, dataset)
    log.info("dataset %s: %d pairs", dataset.fingerprint, dataset.totals.kept)
    return Curated(tuple(runs), failures, dataset, built)


def _each(
    planned: list[RunStages],
    work: Callable[[RunStages], T],
    at_once: int,
    failures: dict[str, Exception],
) -> list[T]:
    """What `work` returns of each run, in their order, without those that fail meanwhile."""
    done: dict[str, T] = {}

    def collected(stages: RunStages) -> None:
        with _collecting(stages.run.id, stages.config.out, failures):
            done[stages.run.id] = work(stages)

    if at_once == 1:
        for stages in planned:
            collected(stages)
    else:
        threads = ThreadPoolExecutor(at_once, "run")
        try:
            for _ in threads.map(collected, planned):
                pass
        finally:
            # After an interrupt nobody waits for them: they find the cluster closed, and end.
            threads.shutdown(wait=False, cancel_futures=True)
    return [done[stages.run.id] for stages in planned if stages.run.id in done]


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
    return conflicts.overlaps(
        [
            conflicts.RunOnSlide(s.run.id, s.inputs["slide"], s.centres_px(), s.image_mpp())
            for s in shared
        ]
    )


def compose(config: CurateConfig, runs: list[CuratedRun]) -> Dataset:
    """The dataset of these runs: a composition of their shard sets; no shard is rewritten."""
    entries, panels = [], {}
    donors: dict[str, Split] = {}
    shards: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for run in runs:
        folder = run.built["shards"].folder
        manifest = read_manifest(folder)
        relative = folder.relative_to(config.out).as_posix()
        panel = read_record(run.built["cells"].folder / cells.PANEL_FILE, Panel)
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
                manifest_sha256=sha256_of(folder / MANIFEST_FILE),
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


def _chosen(config: CurateConfig, only: tuple[str, ...]) -> list[RunConfig]:
    unknown = sorted(set(only) - {run.id for run in config.runs})
    if unknown:
        raise BadInput(
            "--only",
            expected=f"ids of runs: {', '.join(run.id for run in config.runs)}",
            found=", ".join(unknown),
            remedy="name runs of the config",
        )
    return [run for run in config.active_runs if not only or run.id in only]
