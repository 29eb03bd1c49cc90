"""Prefect's processes on this machine alone, and what their server answers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@contextmanager
def prefect_home(home: Path) -> Iterator[None]:
    """A Prefect of its own, that reports to nobody."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PREFECT_")]:
            patch.delenv(name)
        patch.setenv("PREFECT_HOME", str(home))
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        patch.setenv("PREFECT_SERVER_EPHEMERAL_ENABLED", "false")
        patch.setenv("DO_NOT_TRACK", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def cellpair(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`cellpair ARGS`, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *args],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@contextmanager
def running(*args: str) -> Iterator[subprocess.Popen[bytes]]:
    """`prefect ARGS` in a process group of its own, ended with all its children in any case."""
    log = Path(os.environ["PREFECT_HOME"]) / f"{args[0]}.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *args],
            cwd=log.parent,
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
            end(family(process), gently=True)
            process.wait()


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The process and all below it, which are known only while it lives."""
    if process.poll() is not None:
        return []
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def end(members: list[psutil.Process], *, gently: bool) -> None:
    """End these processes; where not gently, by SIGKILL alone."""
    for number in (signal.SIGTERM, signal.SIGKILL) if gently else (signal.SIGKILL,):
        for member in members:
            if member.is_running():
                member.send_signal(number)
        _, members = psutil.wait_procs(members, timeout=15)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def wait_for(
    condition: Callable[[], Any], process: subprocess.Popen[bytes], every_s: float = 1
) -> None:
    until = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, "the Prefect process has ended"
        assert time.monotonic() < until, "waited in vain"
        time.sleep(every_s)


class Server:
    """What a server knows, asked over its API."""

    def __init__(self, url: str) -> None:
        self.api = httpx.Client(base_url=url, timeout=30)

    def is_healthy(self) -> bool:
        try:
            return self.api.get("/health").is_success
        except httpx.TransportError:
            return False

    def start_curate(self, *options: str) -> str:
        """`prefect deployment run curate/xenium`; returns the id of the flow run."""
        known = {run["id"] for run in self.flow_runs("curate")}
        subprocess.run(
            [sys.executable, "-m", "prefect", "deployment", "run", "curate/xenium", *options],
            stdin=subprocess.DEVNULL,
            check=True,
        )
        (new,) = {run["id"] for run in self.flow_runs("curate")} - known
        return str(new)

    def curate(self, worker: subprocess.Popen[bytes], *options: str) -> dict[str, Any]:
        """The flow run of a curation that has ended."""
        started = self.start_curate(*options)
        wait_for(lambda: self.flow_run(started)["state_type"] in FINAL, worker)
        return self.flow_run(started)

    def flow_run(self, flow_run: str) -> dict[str, Any]:
        found: dict[str, Any] = self.api.get(f"/flow_runs/{flow_run}").raise_for_status().json()
        return found

    def flow_runs(self, flow: str) -> list[dict[str, Any]]:
        return self.filtered("flow_runs", flows={"name": {"any_": [flow]}})

    def states(self, flow_run: str) -> list[dict[str, Any]]:
        answer = self.api.get("/flow_run_states/", params={"flow_run_id": flow_run})
        found: list[dict[str, Any]] = answer.raise_for_status().json()
        return found

    def log_lines(self, flow_run: str) -> list[str]:
        logs = self.filtered("logs", logs={"flow_run_id": {"any_": [flow_run]}})
        return [log["message"] for log in logs]

    def artifacts(self, flow_run: str) -> dict[str, dict[str, Any]]:
        found = self.filtered("artifacts", artifacts={"flow_run_id": {"any_": [flow_run]}})
        return {artifact["key"]: artifact for artifact in found}

    def filtered(self, what: str, **filters: Any) -> list[dict[str, Any]]:
        answer = self.api.post(f"/{what}/filter", json=filters)
        found: list[dict[str, Any]] = answer.raise_for_status().json()
        return found
