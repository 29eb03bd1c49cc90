"""The deployments: what infra/prefect.yaml says, and what a real server and worker make of it."""

from __future__ import annotations

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows.training import run_trainer
from shards.dataset import read_dataset
from shards.errors import BadInput
from shards.stream import read_stream

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
EMPTY_RUN_TOML = """
[[runs]]
id = "run-b"
xenium = "empty"
image = "morphology"
donor = "D2"
"""
TRAIN_TOML = """
preset = "small"
data = "curated/dataset.json"
[model]
image_px = 32
[optim]
steps = 3
warmup_steps = 1
[data_loading]
batch_size = 16
[run]
out = "training"
device = "cpu"
checkpoint_every = 3
"""


@pytest.fixture(scope="module", autouse=True)
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Prefect of its own, on this machine alone, that reports to nobody."""
    home = tmp_path_factory.mktemp("prefect-home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PREFECT_")]:
            patch.delenv(name)
        patch.setenv("PREFECT_HOME", str(home))
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        patch.setenv("PREFECT_SERVER_EPHEMERAL_ENABLED", "false")
        patch.setenv("DO_NOT_TRACK", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield home


def _definition(with_training: bool = True) -> dict[str, dict[str, Any]]:
    from flows.deploy import prefect_definition

    train = Path("/configs/train.toml") if with_training else None
    definition = prefect_definition(Path("/configs/curate.toml"), train)
    return {d["name"]: d for d in definition["deployments"]}


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
    (trigger,) = _definition()["contrastive"]["triggers"]
    assert trigger["expect"] == ["prefect.flow-run.Completed"]
    assert trigger["match_related"][0]["prefect.resource.name"] == "xenium"
    assert list(_definition(with_training=False)) == ["xenium"]


def test_the_definition_names_no_machine() -> None:
    text = (Path(__file__).parents[2] / "infra" / "prefect.yaml").read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if '"/' in line or " /" in line]


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
    url = "" if answers == "no URL" else f"http://127.0.0.1:{_free_port()}/api"
    done = _cellpair("deploy", "curate.toml", cwd=tmp_path, PREFECT_API_URL=url)
    assert done.returncode == 2
    assert "PREFECT_API_URL" in done.stderr
    assert "prefect server start --host 127.0.0.1" in done.stderr


def test_the_trainer_is_heard_and_its_exit_code_kept(tmp_path: Path) -> None:
    lines: list[str] = []
    missing = tmp_path / "missing.toml"
    assert run_trainer("train", str(missing), "--resume", tell=lines.append) == 2
    assert lines[0] == str(missing)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_deployed_flows_curate_train_and_reuse(tmp_path: Path) -> None:
    from pairing.simulate import SimulationParams, simulate

    folder = tmp_path / "räume und pfade"
    folder.mkdir()
    simulate(folder / "section", SimulationParams(n_cells=150, seed=3))
    curate_toml = CURATE_TOML.format(section="section")
    (folder / "curate.toml").write_text(curate_toml, encoding="utf-8")
    (folder / "empty").mkdir()
    (folder / "faulty.toml").write_text(curate_toml + EMPTY_RUN_TOML, encoding="utf-8")
    (folder / "train.toml").write_text(TRAIN_TOML, encoding="utf-8")

    port = _free_port()
    environment = {
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }

    with (
        _running("server", "start", "--host", "127.0.0.1", "--port", str(port)) as server,
        httpx.Client(base_url=environment["PREFECT_API_URL"], timeout=30) as api,
    ):
        _wait_for(lambda: _is_healthy(api), server)
        done = _cellpair(
            "deploy", "curate.toml", "--train", "train.toml", cwd=folder, **environment
        )
        assert done.returncode == 0, done.stderr
        with _running("worker", "start", "--pool", "cellpair", **environment) as worker:
            first = _run_curate(api, **environment)
            _wait_for(lambda: _ended(api, "pretrain", 1), worker)
            made = _files(folder)
            second = _run_curate(api, **environment)
            _wait_for(lambda: _ended(api, "pretrain", 2), worker)
            found = _files(folder)
            faulty = _run_curate(api, "--param", f"config={folder / 'faulty.toml'}", **environment)
        tasks = _filtered(api, "task_runs", flows={"name": {"any_": ["curate"]}})
        lines = _log_lines(api, second["id"])
        trainings = [run["state_type"] for run in _flow_runs(api, "pretrain")]

    assert first["state_type"] == "COMPLETED", first
    stages = ["registration", "cells", "patches", "shards"]
    names = [t["name"] for t in tasks if t["flow_run_id"] == first["id"]]
    assert sorted(names) == sorted(f"run-a/{stage}" for stage in stages)
    dataset, _ = read_dataset(folder / "curated")
    assert dataset.totals.kept > 0
    (checkpoint,) = (folder / "training" / "checkpoints").glob("step-*")
    meta = json.loads((checkpoint / "meta.json").read_text())
    assert meta["step"] == 3
    assert meta["stream"] == read_stream([folder / "curated"], "train").fingerprint

    assert second["state_type"] == "COMPLETED", second
    for stage in stages:
        assert any(f"run-a {stage}: reused" in line for line in lines), lines
    assert found == made

    assert faulty["state_type"] == "FAILED", faulty
    assert "RunsFailed: run-b: " in faulty["state"]["message"]
    # The failed one started none.
    assert trainings == ["COMPLETED", "COMPLETED"]


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The names of a section's files; enough for a config that is only read."""
    folder = tmp_path_factory.mktemp("section")
    (folder / "outs").mkdir()
    for name in ("he.ome.tif", "he_imagealignment.csv"):
        (folder / name).touch()
    return folder


def _cellpair(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *args],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@contextmanager
def _running(*args: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """`prefect ARGS` in a process group of its own, ended with all its children in any case."""
    log = Path(os.environ["PREFECT_HOME"]) / f"{args[0]}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *args],
            cwd=log.parent,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        except BaseException:
            print(f"--- {log.name}\n{log.read_text(errors='replace')}")
            raise
        finally:
            # Children that left the group are known only while their parent lives.
            family = [psutil.Process(process.pid)] if process.poll() is None else []
            family += [child for parent in family for child in parent.children(recursive=True)]
            for number, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
                for member in family:
                    if member.is_running():
                        member.send_signal(number)
                _, family = psutil.wait_procs(family, timeout=seconds)
            process.wait()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _wait_for(condition: Any, process: subprocess.Popen[bytes], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the Prefect process has ended"
        assert time.monotonic() < until, "waited in vain"
        time.sleep(1)


def _is_healthy(api: httpx.Client) -> bool:
    try:
        return api.get("/health").is_success
    except httpx.TransportError:
        return False


def _run_curate(api: httpx.Client, *options: str, **environment: str) -> dict[str, Any]:
    """`prefect deployment run curate/xenium`, watched to its end; returns the flow run."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "prefect",
            "deployment",
            "run",
            "curate/xenium",
            "--watch",
            *options,
        ],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
    )
    return _flow_runs(api, "curate")[-1]


def _filtered(api: httpx.Client, what: str, **filters: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (
        api.post(f"/{what}/filter", json=filters).raise_for_status().json()
    )
    return found


def _flow_runs(api: httpx.Client, flow: str) -> list[dict[str, Any]]:
    runs = _filtered(api, "flow_runs", flows={"name": {"any_": [flow]}})
    return sorted(runs, key=lambda run: str(run["created"]))


def _ended(api: httpx.Client, flow: str, n_runs: int) -> bool:
    runs = _flow_runs(api, flow)
    final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    return len(runs) >= n_runs and all(run["state_type"] in final for run in runs)


def _log_lines(api: httpx.Client, flow_run_id: str) -> list[str]:
    logs = _filtered(api, "logs", logs={"flow_run_id": {"any_": [flow_run_id]}})
    return [log["message"] for log in logs]


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every artifact and checkpoint: a file made anew differs."""
    within = (folder / "curated" / "runs", folder / "training" / "checkpoints")
    paths = [path for root in within for path in root.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}
