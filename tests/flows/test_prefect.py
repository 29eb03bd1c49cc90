"""The deployments and automations: what infra/ says of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.training import run_trainer
from shards.errors import BadInput
from tests.flows.prefect_server import cellpair, free_port, prefect_home

INFRA = Path(__file__).parents[2] / "infra"
CURATE_TOML = """
name = "pilot"
out = "curated"
[segmentation]
model = "none"
[filters]
min_counts = 1
[split]
assign = {{ D1 = "train" }}
[[runs]]
id = "run-a"
xenium = "{section}/outs"
slide = "{section}/he.ome.tif"
alignment = "{section}/he_imagealignment.csv"
donor = "D1"
"""


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with prefect_home(tmp_path_factory.mktemp("prefect-home")):
        yield


def _definition(with_training: bool = True) -> dict[str, dict[str, Any]]:
    from flows.deploy import prefect_definition

    train = Path("/configs/train.toml") if with_training else None
    definition = prefect_definition(Path("/configs/curate.toml"), train)
    return {d["name"]: d for d in definition["deployments"]}


def _automations() -> list[dict[str, Any]]:
    from flows.deploy import resume_automations

    return [automation.model_dump() for automation in resume_automations()]


def test_deployments_name_flows_that_import() -> None:
    names = {}
    for name, deployment in _definition().items():
        module, _, attribute = deployment["entrypoint"].partition(":")
        flow = getattr(import_module(module), attribute)
        names[name] = flow.name
        assert list(deployment["parameters"]) == list(inspect.signature(flow.fn).parameters)
    assert names == {"xenium": "curate", "contrastive": "pretrain"}


def test_configs_become_the_default_parameters() -> None:
    deployments = _definition()
    assert deployments["xenium"]["parameters"] == {"config": "/configs/curate.toml"}
    assert deployments["contrastive"]["parameters"] == {"config": "/configs/train.toml"}


def test_every_schedule_waits_until_it_is_switched_on() -> None:
    (schedule,) = _definition()["xenium"]["schedules"]
    assert (schedule["cron"], schedule["active"]) == ("0 2 * * *", False)
    assert "schedules" not in _definition()["contrastive"]


def test_training_follows_a_completed_curation_only_where_it_is_asked_for() -> None:
    from flows.curate import PUBLISHED

    (trigger,) = _definition()["contrastive"]["triggers"]
    assert trigger["expect"] == [PUBLISHED]
    assert trigger["match_related"][0]["prefect.resource.name"] == "xenium"
    assert list(_definition(with_training=False)) == ["xenium"]


@pytest.mark.parametrize("name", ["prefect.yaml", "resume.yaml"])
def test_the_definitions_name_no_machine(name: str) -> None:
    text = (INFRA / name).read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if '"/' in line or " /" in line]


def test_prefect_knows_every_key_of_the_automations() -> None:
    given = yaml.safe_load((INFRA / "resume.yaml").read_text(encoding="utf-8"))["automations"]
    for automation, keys in zip(_automations(), given, strict=True):
        assert keys.keys() <= automation.keys()
        assert keys["trigger"].keys() <= automation["trigger"].keys()
        for action, its_keys in zip(automation["actions"], keys["actions"], strict=True):
            assert its_keys.keys() <= action.keys()


def test_automations_find_the_runs_of_every_deployment_by_its_tags() -> None:
    for automation in _automations():
        wanted = automation["trigger"]["match_related"]
        for deployment in _definition().values():
            tags = {f"prefect.tag.{tag}" for tag in deployment["tags"]}
            assert {related["prefect.resource.id"] for related in wanted} <= tags


def test_a_run_is_given_up_for_dead_after_three_beats() -> None:
    (silence,) = (a for a in _automations() if a["name"] == "cellpair zombie-to-crashed")
    within = silence["trigger"]["within"]
    for deployment in _definition().values():
        environment = deployment["work_pool"]["job_variables"]["env"]
        beat = timedelta(seconds=int(environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]))
        assert 3 * beat == within


@pytest.mark.parametrize("entrypoint", ["flows.curate:curate", "flows.pretrain:pretrain"])
def test_a_relative_config_is_refused_with_the_reason(entrypoint: str) -> None:
    module, _, attribute = entrypoint.partition(":")
    flow = getattr(import_module(module), attribute)
    with pytest.raises(BadInput, match="temporary folder"):
        flow.fn("curate.toml")


@pytest.mark.parametrize("answers", ["no URL", pytest.param("no server", marks=pytest.mark.slow)])
def test_deploy_without_a_server_says_how_to_start_one(
    tmp_path: Path, section: Path, answers: str
) -> None:
    (tmp_path / "curate.toml").write_text(CURATE_TOML.format(section=section))
    url = "" if answers == "no URL" else f"http://127.0.0.1:{free_port()}/api"
    done = cellpair("deploy", "curate.toml", cwd=tmp_path, PREFECT_API_URL=url)
    assert done.returncode == 2
    assert "PREFECT_API_URL" in done.stderr
    assert "prefect server start --host 127.0.0.1" in done.stderr


def test_the_trainer_is_heard_and_its_exit_code_kept(tmp_path: Path) -> None:
    lines: list[str] = []
    missing = tmp_path / "missing.toml"
    assert run_trainer("train", str(missing), "--resume", tell=lines.append) == 2
    assert lines[0] == str(missing)


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The names of a section's files; enough for a config that is only read."""
    folder = tmp_path_factory.mktemp("section")
    (folder / "outs").mkdir()
    for name in ("he.ome.tif", "he_imagealignment.csv"):
        (folder / name).touch()
    return folder
