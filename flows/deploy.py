"""`cellpair deploy`: registers what infra/ defines, with configs as the deployments' defaults."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker

from flows.config import read_curate_config
from shards.errors import BadInput

_START_SERVER = (
    "start one with `PREFECT_SERVER_ANALYTICS_ENABLED=false prefect server start --host 127.0.0.1`"
    " and set PREFECT_API_URL=http://127.0.0.1:4200/api"
)


def deploy(curate_toml: Path, train_toml: Path | None) -> None:
    """Register `curate/xenium` and, with a train config, `pretrain/contrastive` and its trigger.

    The absolute paths of the configs become the deployments' default parameters. The automations
    of infra/resume.yaml go with them. What was registered before under these names is replaced.
    Raises BadInput(s) for a faulty config and where no Prefect server answers.
    """
    read_curate_config(curate_toml)
    if train_toml is not None:
        _check_is_toml(train_toml)
    definition = prefect_definition(curate_toml, train_toml)
    url = _api_url()
    with get_client(sync_client=True) as client:
        _check_answers(client, url)
        for name in sorted({d["work_pool"]["name"] for d in definition["deployments"]}):
            _create_work_pool_if_absent(client, name)
        for automation in resume_automations():
            _register(client, automation)
        _prefect_deploy(definition)
        left = train_toml is None and _is_deployed(client, "pretrain/contrastive")
    print(f"curate/xenium: {curate_toml}")
    if train_toml is not None:
        print(f"pretrain/contrastive, after each completed curate/xenium: {train_toml}")
    if left:
        print(
            "pretrain/contrastive of an earlier deploy is still there and still follows "
            "curate/xenium; remove it with `prefect deployment delete pretrain/contrastive`"
        )
    print("start a worker:  prefect worker start --pool cellpair")
    print("start a run:     prefect deployment run curate/xenium")


def prefect_definition(curate_toml: Path, train_toml: Path | None) -> dict[str, Any]:
    """infra/prefect.yaml with the configs filled in; without a train config, `xenium` alone."""
    definition = _read_definition("prefect.yaml")
    configs = {"xenium": curate_toml, "contrastive": train_toml}
    filled = []
    for deployment in definition["deployments"]:
        config = configs[deployment["name"]]
        if config is not None:
            filled.append({**deepcopy(deployment), "parameters": {"config": str(config.resolve())}})
    return {**definition, "deployments": filled}


def resume_automations() -> list[AutomationCore]:
    """The automations of infra/resume.yaml."""
    definition = _read_definition("resume.yaml")
    return [AutomationCore.model_validate(a) for a in definition["automations"]]


def _read_definition(name: str) -> dict[str, Any]:
    definition: dict[str, Any] = yaml.safe_load((files("infra") / name).read_text("utf-8"))
    return definition


def _check_is_toml(path: Path) -> None:
    # Its keys are the trainer's, which reads them when it starts.
    try:
        tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(
            path,
            expected="a readable TOML file with a train config",
            found=str(error),
            remedy="mend the path or the file",
        ) from error


def _api_url() -> str:
    # Asked first: without a URL, Prefect would start a temporary server that nobody could use.
    url = get_current_settings().api.url
    if not url:
        raise BadInput(
            "PREFECT_API_URL",
            expected="the URL of a Prefect server",
            found="none",
            remedy=_START_SERVER,
        )
    return url


def _check_answers(client: SyncPrefectClient, url: str) -> None:
    error = client.api_healthcheck()
    if error is not None:
        raise BadInput(
            f"PREFECT_API_URL {url}",
            expected="the URL of a Prefect server that answers",
            found=f"{type(error).__name__}: {error}",
            remedy=_START_SERVER,
        ) from error


def _create_work_pool_if_absent(client: SyncPrefectClient, name: str) -> None:
    try:
        client.read_work_pool(name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(
            WorkPoolCreate(name=name, type=ProcessWorker.type, base_job_template=template)
        )


def _register(client: SyncPrefectClient, automation: AutomationCore) -> None:
    registered = client.read_automations_by_name(automation.name)
    # One that is as it should be stays: a new one would know nothing of the runs under way.
    same = [a for a in registered if AutomationCore.model_validate(a.model_dump()) == automation]
    for other in registered:
        if other not in same[:1]:
            client.delete_automation(other.id)
    if not same:
        client.create_automation(automation)


def _is_deployed(client: SyncPrefectClient, name: str) -> bool:
    try:
        client.read_deployment_by_name(name)
    except ObjectNotFound:
        return False
    return True


def _prefect_deploy(definition: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefect.yaml"
        command = ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(path)]
        path.write_text(yaml.safe_dump(definition, sort_keys=False), encoding="ascii")
        done = subprocess.run(
            [sys.executable, "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"`prefect deploy` failed:\n{done.stdout}")
