"""Fixtures for every test: where the real data lies, and one simulated run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from pairing.simulate import SimulationParams, simulate
from shards.remote import _filesystem
from tests.s3 import BUCKET, ENVIRONMENT, Line, make_bucket, server


def pytest_configure() -> None:
    """Hear SIGINT, as must the processes that tests start and stop by it.

    A shell starts what it puts in the background, as this run of tests may be, with it ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # How long an example takes says how busy the machine is.
    settings.register_profile("cellpair", deadline=None)
    settings.load_profile("cellpair")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever tests read is indexed in a folder of theirs, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLPAIR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, or a skip that says what is missing."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CELLPAIR_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}: set CELLPAIR_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated run of 300 cells, in a folder whose path holds spaces and more than ASCII."""
    out = tmp_path_factory.mktemp("simulated") / "Gewebe, März é 1" / "run 1"
    out.parent.mkdir()
    simulate(out, SimulationParams(n_cells=300, seed=7))
    return out


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an S3 server on this machine, with the tests' bucket."""
    with server(tmp_path_factory.mktemp("s3") / "server.log") as port:
        make_bucket(port)
        yield port


@pytest.fixture
def s3(s3_server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """A line to the server, to which the environment points."""
    line = Line(s3_server)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{line.port}")
    _filesystem.cache_clear()
    yield line
    line.cut()
    _filesystem.cache_clear()


@pytest.fixture
def bucket(s3: Line, tmp_path: Path) -> str:
    """A URL of this test's own."""
    return f"s3://{BUCKET}/{tmp_path.name}"
