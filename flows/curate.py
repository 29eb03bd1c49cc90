"""The pipeline as a Prefect flow: one task a run and stage, blocks on Dask inside the task."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.deployed import absolute_config

if TYPE_CHECKING:
    from flows.pipeline import Built


class RunsFailed(Exception):
    """Some runs failed; the message holds every run's own."""


@flow(name="curate", log_prints=True)
def curate(config: str) -> None:
    """Curate the config at this absolute path, on this machine's cores.

    Raises RunsFailed when the other runs are done; the published dataset then stays as it was.
    """
    path = absolute_config(config)
    # Seconds of torch that registering the flow does not need.
    from flows.cluster import Runtime
    from flows.config import read_curate_config
    from flows.local import run_pipeline

    # This process is the run's own. Prefect forwards the logger but leaves its level.
    logging.getLogger("cellpair").setLevel(logging.INFO)
    curated = run_pipeline(read_curate_config(path), Runtime(), call=_as_task)
    if curated.failures:
        raise RunsFailed("\n".join(f"{run}: {error}" for run, error in curated.failures.items()))


def _as_task(name: str, make: Callable[[], Built]) -> Built:
    # Artifacts are found by their fingerprint; Prefect's own cache would not know them.
    stage = task(name=name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False)(make)
    return stage()
