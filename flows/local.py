"""`cellpair curate`: the pipeline with a direct caller, no server, and the report at its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from flows import pipeline
from flows.built import cellpair_version
from flows.clean import wait_for_clean
from flows.cluster import BlockMap, Runtime
from flows.config import CurateConfig, read_curate_config
from flows.failures import BAD_INPUT, DONE, FAULTS_FOUND, exit_code_of
from flows.history import HistoryEntry, StageHistory, append_history
from flows.log import logged_to
from flows.outfolder import claim_out
from flows.scratch import scratch
from shards.artifact import write_atomically
from shards.schema import digest
from shards.store import Store, store_of

log = logging.getLogger("cellpair")

REPORT_FOLDER = "report"
INDEX_FILE = "index.html"
_STATE_FILE = ".says"  # what the pages were written of


def curate_locally(
    config_path: Path,
    runtime: Runtime,
    *,
    only: tuple[str, ...] = (),
    partial_dataset: bool = False,
) -> int:
    """Curate a config file; prints where the dataset and the report are; returns the exit code."""
    config = read_curate_config(config_path)
    curated = run_pipeline(config, runtime, only=only, partial_dataset=partial_dataset)
    return exit_code(curated.failures)


def run_pipeline(
    config: CurateConfig,
    runtime: Runtime,
    *,
    call: pipeline.Call = pipeline.direct,
    only: tuple[str, ...] = (),
    partial_dataset: bool = False,
) -> pipeline.Curated:
    """The pipeline on local or remote Dask workers, then the report.

    Raises BadInput where the output folder is another config's or can't be written.
    """
    store = store_of(config.out, config.remote)
    with _naming(config.out):
        claim_out(config.out, config.name, config.split.withdrawn_names, store)
        with logged_to(config.out), scratch(config.out), BlockMap(runtime) as blocks:
            wait_for_clean(config.out)
            curated = curate_and_remember(
                config,
                blocks,
                device=runtime.device,
                call=call,
                only=only,
                partial_dataset=partial_dataset,
                runs_at_once=runtime.runs_at_once,
                store=store,
            )
            page = store.told(_write_report(config, curated))
        store.save()
        _tell(curated, page)
    return curated


@contextmanager
def _naming(out: Path) -> Iterator[None]:
    """Of a file that is open already a full disk says no name: then the folder is named."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = f"{out} or below it"
        raise


def _write_report(config: CurateConfig, curated: pipeline.Curated) -> Path:
    """The pages, written anew where they would say something else than they do."""
    folder = config.out / REPORT_FOLDER
    says = digest(
        [
            cellpair_version(),
            config.model_dump(mode="json", exclude={"out"}),  # a working copy lies anywhere
            curated.dataset.fingerprint if curated.dataset else None,
            [b.fingerprint for run in curated.runs for b in run.built.values()],
        ]
    )
    index, state = folder / INDEX_FILE, folder / _STATE_FILE
    made = any(not b.reused for run in curated.runs for b in run.built.values())
    there = index.exists() and state.exists() and state.read_text() == says
    if there and not made and not curated.failures:
        return index
    # Seconds of matplotlib, and pictures of every slide, which a run that changed nothing spares.
    from flows.report import write_report

    state.unlink(missing_ok=True)
    page = write_report(config, curated)
    if not curated.failures:
        write_atomically(state, says.encode())
    return page


def curate_and_remember(
    config: CurateConfig,
    blocks: BlockMap,
    *,
    device: str,
    call: pipeline.Call = pipeline.direct,
    only: tuple[str, ...] = (),
    partial_dataset: bool = False,
    runs_at_once: int = 1,
    store: Store | None = None,
) -> pipeline.Curated:
    """The pipeline, and a line in the folder's history of what it reused and made."""
    started, start_s = datetime.now(UTC), time.monotonic()
    curated = pipeline.curate(
        config,
        blocks,
        device=device,
        call=call,
        only=only,
        partial_dataset=partial_dataset,
        runs_at_once=runs_at_once,
        store=store,
    )
    append_history(config.out, _entry(curated, started, time.monotonic() - start_s))
    return curated


def _entry(curated: pipeline.Curated, started: datetime, seconds: float) -> HistoryEntry:
    return HistoryEntry(
        started=started.isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        cellpair=cellpair_version(),
        dataset=curated.dataset.fingerprint if curated.dataset else None,
        failures={run: type(error).__name__ for run, error in curated.failures.items()},
        stages=tuple(
            StageHistory(
                run=b.run,
                stage=b.stage,
                fingerprint=b.fingerprint,
                reused=b.reused,
                seconds=b.seconds,
            )
            for b in curated.built
        ),
    )


def _tell(curated: pipeline.Curated, page: str) -> None:
    if curated.dataset is None:
        log.error("no dataset was published; what was there before is unchanged")
    else:
        totals = curated.dataset.totals
        dropped = ", ".join(f"{n} {reason}" for reason, n in totals.dropped.items() if n) or "none"
        print(f"{totals.seen} cells seen, {totals.kept} kept, dropped: {dropped}")
        if curated.failures:
            print(f"published without the failed runs: {', '.join(curated.failures)}")
    print(f"report: {page}")


def exit_code(failures: Mapping[str, Exception]) -> int:
    """0 when every run went through, 2 when every failure is bad input, else 1."""
    if not failures:
        return DONE
    bad = all(exit_code_of(error) == BAD_INPUT for error in failures.values())
    return BAD_INPUT if bad else FAULTS_FOUND
