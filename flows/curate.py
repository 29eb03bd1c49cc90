"""The pipeline as a Prefect flow: one task a run and stage, blocks on Dask inside the task."""

from __future__ import annotations

from collections.abc import Callable

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.cluster import Runtime
from flows.config import read_curate_config
from flows.deployed import absolute_config
from flows.local import run_pipeline
from flows.pipeline import Built


class RunsFailed(Exception):
    """Some runs failed; the message holds every run's own."""


@flow(name="curate", log_prints=True)
def curate(config: str) -> None:
    """Curate the config at this absolute path, on this machine's cores.

    Raises RunsFailed when the other runs are done; the published dataset then stays as it was.
    """
    curated = run_pipeline(read_curate_config(absolute_config(config)), Runtime(), call=_as_task)
    if curated.failures:
        raise RunsFailed("\n".join(f"{run}: {error}" for run, error in curated.failures.items()))


def _as_task(name: str, make: Callable[[], Built]) -> Built:
    # Artifacts are found by their fingerprint; Prefect's own cache would not know them.
    stage = task(name=name, cache_policy=NO_CACHE, persist_result=False)(make)
    return stage()
