"""`cellpair curate`: the pipeline with a direct caller, no server, and the report at its end."""

from __future__ import annotations

import logging
from pathlib import Path

from flows import pipeline
from flows.cluster import BlockMap, Runtime
from flows.config import CurateConfig, read_curate_config
from flows.report import write_report
from shards.errors import BadInput, BadInputs

log = logging.getLogger("cellpair")


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
    return exit_code(curated)


def run_pipeline(
    config: CurateConfig,
    runtime: Runtime,
    *,
    call: pipeline.Call = pipeline.direct,
    only: tuple[str, ...] = (),
    partial_dataset: bool = False,
) -> pipeline.Curated:
    """The pipeline on local or remote Dask workers, then the report."""
    with BlockMap(runtime) as blocks:
        curated = pipeline.curate(
            config,
            blocks,
            device=runtime.device,
            call=call,
            only=only,
            partial_dataset=partial_dataset,
        )
    page = write_report(config, curated)
    if curated.dataset is None:
        log.error("no dataset was published; what was there before is unchanged")
    else:
        totals = curated.dataset.totals
        dropped = ", ".join(f"{n} {reason}" for reason, n in totals.dropped.items() if n) or "none"
        print(f"{totals.seen} cells seen, {totals.kept} kept, dropped: {dropped}")
        if curated.failures:
            print(f"published without the failed runs: {', '.join(curated.failures)}")
    print(f"report: {page}")
    return curated


def exit_code(curated: pipeline.Curated) -> int:
    """0 when every run went through, 2 when every failure is bad input, else 1."""
    if not curated.failures:
        return 0
    bad = all(isinstance(e, BadInput | BadInputs) for e in curated.failures.values())
    return 2 if bad else 1
