"""Fixtures for every test: where the real data lies, and one simulated run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pairing.simulate import SimulationParams, simulate


def pytest_configure() -> None:
    """Hear SIGINT, as must the processes that tests start and stop by it.

    A shell starts what it puts in the background, as this run of tests may be, with it ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
