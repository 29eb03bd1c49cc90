"""What a real Prefect server and worker make of the deployments, whoever is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from pairing.simulate import SimulationParams, simulate
from shards.dataset import read_dataset
from shards.stream import read_stream
from tests.flows.prefect_server import (
    Server,
    cellpair,
    end,
    family,
    free_port,
    prefect_home,
    running,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CURATE_TOML = """
name = "pilot"
out = "{out}"
[segmentation]
model = "none"
[filters]
min_counts = 1
[split]
assign = {{ D1 = "train" }}
[[runs]]
id = "run-a"
xenium = "section/outs"
slide = "section/he.ome.tif"
alignment = "section/he_imagealignment.csv"
donor = "D1"
"""
EMPTY_RUN_TOML = """
[[runs]]
id = "Run_B"
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
STAGES = ["registration", "cells", "patches", "shards"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs and what they name."""
    folder = tmp_path_factory.mktemp("prefect") / "räume und pfade"
    folder.mkdir()
    simulate(folder / "section", SimulationParams(n_cells=400, seed=3))
    (folder / "empty").mkdir()
    for name in ("curated", "killed", "undisturbed"):
        (folder / f"{name}.toml").write_text(CURATE_TOML.format(out=name), encoding="utf-8")
    faulty = CURATE_TOML.format(out="curated") + EMPTY_RUN_TOML
    (folder / "faulty.toml").write_text(faulty, encoding="utf-8")
    (folder / "train.toml").write_text(TRAIN_TOML, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Server]:
    """A server that knows the deployments."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    with (
        prefect_home(tmp_path_factory.mktemp("prefect-home")),
        pytest.MonkeyPatch.context() as patch,
        running("server", "start", "--host", "127.0.0.1", "--port", str(port)) as process,
    ):
        patch.setenv("PREFECT_API_URL", url)
        patch.setenv("PREFECT_WORKER_QUERY_SECONDS", "2")
        server = Server(url)
        with server.api:
            wait_for(server.is_healthy, process)
            _deploy(folder)
            yield server


def _deploy(folder: Path) -> None:
    done = cellpair("deploy", "curated.toml", "--train", "train.toml", cwd=folder)
    assert done.returncode == 0, done.stderr


def test_deployed_flows_curate_train_and_reuse(server: Server, folder: Path) -> None:
    with running("worker", "start", "--pool", "cellpair") as worker:
        first = server.curate(worker)
        wait_for(lambda: _has_trained(server, first), worker)
        made = _files(folder)
        second = server.curate(worker)
        wait_for(lambda: _has_trained(server, second), worker)
        found = _files(folder)
        faulty = server.curate(worker, "--param", f"config={folder / 'faulty.toml'}")

    assert first["state_type"] == "COMPLETED", first
    tasks = server.filtered("task_runs", flow_runs={"id": {"any_": [first["id"]]}})
    assert sorted(t["name"] for t in tasks) == sorted(f"run-a/{stage}" for stage in STAGES)
    dataset, _ = read_dataset(folder / "curated")
    assert dataset.totals.kept > 0
    (checkpoint,) = (folder / "training" / "checkpoints").glob("step-*")
    meta = json.loads((checkpoint / "meta.json").read_text())
    assert meta["step"] == 3
    assert meta["stream"] == read_stream([folder / "curated"], "train").fingerprint

    assert second["state_type"] == "COMPLETED", second
    lines = server.log_lines(second["id"])
    for stage in STAGES:
        assert any(f"run-a {stage}: reused" in line for line in lines), lines
    assert found == made
    artifacts = server.artifacts(second["id"])
    assert artifacts.keys() == {"curate-progress", "qc-run-a", "dataset"}
    assert artifacts["curate-progress"]["data"] == 100
    assert artifacts["curate-progress"]["description"] == "4 of 4 stages"
    page = folder / "curated" / "report" / "run-a.html"
    assert page.is_file()
    assert f"(file://{page})" in unquote(artifacts["qc-run-a"]["data"])
    assert f"| kept | {dataset.totals.kept} |" in artifacts["qc-run-a"]["data"]
    assert dataset.fingerprint in artifacts["dataset"]["data"]

    assert faulty["state_type"] == "FAILED", faulty
    assert "RunsFailed: Run_B: " in faulty["state"]["message"]
    artifacts = server.artifacts(faulty["id"])
    assert "Failed:" in artifacts["qc-run-b-683d1b0c"]["data"]
    assert artifacts["curate-progress"]["description"] == "4 of 7 stages"
    # Each dataset has started one, the failed curation none.
    assert len(server.flow_runs("pretrain")) == 2


def test_deploying_again_doubles_nothing(server: Server, folder: Path) -> None:
    before = server.filtered("automations")
    _deploy(folder)
    after = server.filtered("automations")
    assert Counter(a["name"] for a in before).most_common(1)[0][1] == 1
    assert {a["name"] for a in after} == {a["name"] for a in before}
    # Another id would mean another automation, that knows nothing of the runs under way.
    ours = {a["id"] for a in before if a["name"].startswith("cellpair ")}
    assert len(ours) == 4
    assert ours <= {a["id"] for a in after}


def test_only_transient_errors_are_tried_again(server: Server) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRIES_SCRIPT], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "tries": {"lost twice": 3, "lost for good": 3, "bad": 1, "full": 1},
        "ended": {"lost for good": "ConnectionResetError", "bad": "BadInput", "full": "OSError"},
    }
    (run,) = server.flow_runs("stages")
    assert server.artifacts(run["id"])["curate-progress"]["data"] == 25


def test_code_that_cannot_be_imported_is_not_tried_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").write_text("raise ImportError('a broken release')")
    broken = json.dumps({"PYTHONPATH": str(tmp_path)})
    with running("worker", "start", "--pool", "cellpair") as worker:
        run = server.curate(worker, "--job-variable", f"env={broken}")
    assert (run["state_name"], run["run_count"]) == ("Crashed", 0)


def test_a_run_killed_twice_is_brought_back_and_has_the_bytes_of_an_undisturbed_one(
    server: Server, folder: Path
) -> None:
    crashed_before = [r["id"] for r in server.flow_runs("curate") if r["state_type"] == "CRASHED"]
    with running("worker", "start", "--pool", "cellpair") as worker:
        run = server.start_curate("--param", f"config={folder / 'killed.toml'}")
        wait_for(lambda: _is_made(folder, "registration"), worker, every_s=0.02)
        end(family(worker)[1:], gently=False)
        wait_for(lambda: _is_made(folder, "cells"), worker, every_s=0.02)
        end(family(worker), gently=False)
    assert not _is_made(folder, "shards")
    assert server.flow_run(run)["state_type"] == "RUNNING"
    with running("worker", "start", "--pool", "cellpair") as worker:
        done = cellpair("curate", "undisturbed.toml", cwd=folder)
        assert done.returncode == 0, done.stderr
        wait_for(lambda: server.flow_run(run)["state_type"] in ("COMPLETED", "FAILED"), worker)

    ended = server.flow_run(run)
    assert (ended["state_type"], ended["run_count"]) == ("COMPLETED", 3), ended
    states = server.states(run)
    assert [s["name"] for s in states].count("Resuming") == 2
    crashes = [s["message"] for s in states if s["name"] == "Crashed"]
    assert len(crashes) == 2, crashes
    assert "-9" in crashes[0]
    assert crashes[1].startswith("No heartbeat")
    lines = server.log_lines(run)
    for stage in ("registration", "cells"):
        assert any(f"run-a {stage}: reused" in line for line in lines), lines
    assert any("run-a shards: made" in line for line in lines), lines
    assert _bytes(folder / "killed") == _bytes(folder / "undisturbed")
    # What crashed before it ran has not been started in these minutes either.
    for other in crashed_before:
        assert server.flow_run(other)["run_count"] == 0


TRIES_SCRIPT = """
import errno, json
from collections import Counter
from prefect import flow
from flows import curate
from shards.errors import BadInput

curate.RETRY_DELAYS_S[:] = [0.1, 0.1]
tries, ended = Counter(), {}

def failing(name, error, times):
    def make():
        tries[name] += 1
        if tries[name] <= times:
            raise error
    return make

@flow
def stages():
    call = curate.StageTasks(4)
    for name, error, times in [
        ("lost twice", TimeoutError("late"), 2),
        ("lost for good", ConnectionResetError("gone"), 9),
        ("bad", BadInput("a", expected="b", found="c", remedy="d"), 9),
        ("full", OSError(errno.ENOSPC, "No space left on device"), 9),
    ]:
        try:
            call(name, failing(name, error, times))
        except (OSError, BadInput) as error:
            ended[name] = type(error).__name__

stages()
print(json.dumps({"tries": tries, "ended": ended}))
"""


def _has_trained(server: Server, curated: dict[str, Any]) -> bool:
    """Whether the training that follows has ended well."""
    runs = [run for run in server.flow_runs("pretrain") if _is_after(run, curated)]
    assert {run["state_type"] for run in runs}.isdisjoint({"FAILED", "CRASHED"})
    return bool(runs) and all(run["state_type"] == "COMPLETED" for run in runs)


def _is_after(run: dict[str, Any], curated: dict[str, Any]) -> bool:
    return datetime.fromisoformat(run["created"]) > datetime.fromisoformat(curated["start_time"])


def _is_made(folder: Path, stage: str) -> bool:
    return any((folder / "killed" / "runs" / "run-a" / stage).glob("*/artifact.json"))


def _bytes(out: Path) -> dict[str, bytes]:
    """The shards, their tables and manifests, and the dataset."""
    paths = [*out.glob("runs/*/shards/*/*"), *out.glob("datasets/*"), out / "dataset.json"]
    read = {str(p.relative_to(out)): p.read_bytes() for p in paths}
    assert {Path(name).suffix for name in read} == {".tar", ".parquet", ".json"}
    return read


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every artifact and checkpoint: a file made anew differs."""
    within = (folder / "curated" / "runs", folder / "training" / "checkpoints")
    paths = [path for root in within for path in root.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}
