"""The pipeline as a Prefect flow: one task a run and stage, blocks on Dask inside the task."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx
from prefect import flow, task
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.events import emit_event

from flows.deployed import absolute_config
from flows.transient import is_transient

if TYPE_CHECKING:
    from flows.config import CurateConfig
    from flows.pipeline import Built, Curated

log = logging.getLogger("cellpair")

PROGRESS_KEY = "curate-progress"
DATASET_KEY = "dataset"
# What the deployment of the training waits for.
PUBLISHED = "cellpair.dataset.published"
# A stage keeps the blocks that it has made, so that another try goes on where the last one ended.
RETRY_DELAYS_S = [10.0, 60.0]


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
    from flows.qc import n_stages

    # This process is the run's own. Prefect forwards the logger but leaves its level.
    log.setLevel(logging.INFO)
    read = read_curate_config(path)
    curated = run_pipeline(read, Runtime(), call=StageTasks(n_stages(read)))
    _show_quality(read, curated)
    if curated.failures:
        raise RunsFailed("\n".join(f"{run}: {error}" for run, error in curated.failures.items()))
    assert curated.dataset is not None, "published unless a run failed"
    dataset = f"cellpair.dataset.{curated.dataset.fingerprint}"
    emit_event(
        PUBLISHED, {"prefect.resource.id": dataset, "prefect.resource.name": curated.dataset.name}
    )


class StageTasks:
    """Runs every stage as a task, tried again after transient errors, and shows the progress."""

    def __init__(self, n_stages: int) -> None:
        self._n_stages = n_stages
        self._n_done = 0
        artifact = create_progress_artifact(0.0, key=PROGRESS_KEY, description=self._in_words())
        assert isinstance(artifact, UUID), "a coroutine only where the flow is one"
        self._artifact = artifact

    def __call__(self, name: str, make: Callable[[], Built]) -> Built:
        stage = task(
            name=name,
            task_run_name=name,
            # Artifacts are found by their fingerprint; Prefect's own cache would not know them.
            cache_policy=NO_CACHE,
            persist_result=False,
            retries=len(RETRY_DELAYS_S),
            retry_delay_seconds=RETRY_DELAYS_S,
            retry_condition_fn=_failed_for_now,
        )(make)
        built = stage()
        self._n_done += 1
        try:
            update_progress_artifact(
                self._artifact, 100 * self._n_done / self._n_stages, description=self._in_words()
            )
        except httpx.HTTPError as error:  # a server that is away must not fail what is made
            log.warning("the progress could not be shown: %s", error)
        return built

    def _in_words(self) -> str:
        return f"{self._n_done} of {self._n_stages} stages"


def _failed_for_now(task: Any, task_run: TaskRun, state: State[Any]) -> bool:
    error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and is_transient(error)


def _show_quality(config: CurateConfig, curated: Curated) -> None:
    from flows.qc import artifact_key, dataset_markdown, failure_markdown, run_markdown

    texts = {}
    for curated_run in curated.runs:
        with curated_run.at_hand():
            texts[curated_run.config.id] = run_markdown(config, curated_run)
    texts |= {run: failure_markdown(run, error) for run, error in curated.failures.items()}
    for run, text in texts.items():
        create_markdown_artifact(text, key=artifact_key(run))
    create_markdown_artifact(dataset_markdown(config, curated), key=DATASET_KEY)
