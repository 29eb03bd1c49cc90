"""The stages in order, with the caller handed in: neither Prefect nor Dask is known here."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flows import conflicts
from flows.built import Blocks, Built, Call, CuratedRun, direct
from flows.compose import compose, held_out_of
from flows.config import CurateConfig, GivenRun
from flows.failures import words_of
from flows.log import working_on
from flows.stages import RunStages
from shards.cache import Holding
from shards.content import ContentHashes
from shards.errors import BadInput
from shards.schema import Dataset
from shards.store import Store, store_of

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
    store: Store,
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
        with _collecting(run.id, config.out, failures), closing(Holding()) as held:
            planned.append(RunStages(config, run, hashes, blocks, device, call, store, held))
            hashes.save()
    bundles = [(p.run, p.inputs["xenium"]) for p in planned]
    _add(conflicts.same_bundles(bundles, config.split), failures)
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
    store: Store | None = None,
) -> Curated:
    """Everything from raw runs to the dataset under `config.out`.

    So many runs are worked on at once, each by a thread, so that one has blocks for the workers
    while another has none; `blocks` and `call` are then called by several threads. A failed run
    lets the others finish, but leaves the published dataset where it was, unless `partial_dataset`
    says otherwise. `only` names the runs to look at; the dataset is then made of these. What exists
    under its fingerprint is not made again.
    """
    store = store or store_of(config.out, config.remote)
    held_out = held_out_of(config)
    everything, failures = plan_runs(config, blocks, store, device=device, call=call, only=only)
    n_registered_at_once = 1 if runs_at_once == 1 else _REGISTRATIONS_PER_RUN_AT_ONCE * runs_at_once
    _each(everything, RunStages.register, n_registered_at_once, failures)
    planned = _without(everything, failures)
    _add(_overlaps(planned), failures)
    _add(_other_donors(_without(planned, failures)), failures)
    runs = _each(_without(planned, failures), RunStages.finish, runs_at_once, failures)
    built = tuple(b for stages in everything for b in stages.built.values())
    if not runs or (failures and not partial_dataset):
        return Curated(tuple(runs), failures, None, built)
    dataset = compose(config, runs, held_out, store)
    store.publish(dataset)
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
        with _collecting(stages.run.id, stages.config.out, failures), closing_copies(stages):
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


def _other_donors(planned: list[RunStages]) -> dict[str, Exception]:
    """Runs of one bundle that the files of donors part in two ways."""
    bundles = Counter(stages.inputs["xenium"] for stages in planned)
    return conflicts.other_donors(
        [
            _of_cells(stages)
            for stages in planned
            if stages.run.donors is not None and bundles[stages.inputs["xenium"]] > 1
        ]
    )


def _of_cells(stages: RunStages) -> conflicts.RunOfCells:
    with closing_copies(stages):
        return conflicts.RunOfCells(stages.run, stages.inputs["xenium"], stages.donor_of_cells())


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
