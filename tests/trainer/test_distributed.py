"""Real processes over gloo: four ranks give what one device gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.errors import BadInput
from tests.trainer.ranks import CASES, N_RANKS, Kind, step
from trainer.distributed import World, start_world

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def free_ports(n: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four ranks left what they computed."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.ranks", str(folder), *free_ports(2)],
        cwd=ROOT,
        env=dict(os.environ) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank-{r}.pt", weights_only=True) for r in range(N_RANKS)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_ranks_equal_one_device(
    ranks: list[dict[str, Any]], case: tuple[Kind, str, int]
) -> None:
    kind, layout, _ = case
    want = step(kind, layout, 1, World(CPU))
    assert want["loss"] > 0
    for rank in ranks:
        found = rank["steps"][case]
        assert found.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
            assert torch.equal(found[name], ranks[0]["steps"][case][name]), name


def test_what_ranks_tell_each_other(ranks: list[dict[str, Any]]) -> None:
    heard = [rank["exchanges"] for rank in ranks]
    for r in range(N_RANKS):
        every = range(N_RANKS)
        assert heard[r]["gathered"].tolist() == [[q, x] for q in every for x in (10.0, 20.0)]
        # The rows 2r and 2r + 1, weighted by each rank's number × 100 more.
        of_row = [4 * (2 * r + i) + 600.0 for i in range(2)]
        assert heard[r]["gathered gradient"].tolist() == [[x, x] for x in of_row]
        assert heard[r]["gathered integers"].tolist() == [2**60 + q for q in every]
        assert heard[r]["total"].tolist() == [4.0, 6.0]
        assert heard[r]["any"].tolist() == [True, False]
        assert heard[r]["broadcast"].tolist() == [7.0] * 3 + [9.0] * 3 + [8.0] * 24
        sums = [4.0] * 4 + [40.0] * 4 + [400.0] * 4 + [4000.0] * 2 + [3.0, 5.0, 7.0, 9.0]
        assert heard[r]["summed gradients"].tolist() == sums


def test_a_rank_that_falls_silent_fails_the_others(folder: Path) -> None:
    for rank in range(N_RANKS - 1):
        assert (folder / f"told-{rank}").read_text()


def test_a_rank_that_never_comes_fails_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    [port] = free_ports(1)
    for name, value in zip(
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
        ("0", "2", "0", "127.0.0.1", port),
        strict=True,
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
        start_world(CPU, timeout_s=1)


def test_alone_nothing_changes() -> None:
    with start_world(CPU) as world:
        assert (world.rank, world.size, world.local_rank) == (0, 1, 0)
        x_BD = torch.randn(3, 2, requires_grad=True)
        assert world.gather(x_BD) is x_BD
        assert not world.total(x_BD).requires_grad
        assert torch.equal(world.total(x_BD), x_BD)
        assert world.any(True)
        assert not world.any(False)
        layer = torch.nn.Linear(2, 2)
        world.broadcast(layer)
        world.sum_gradients(layer.parameters())
        assert layer.weight.grad is None


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(BadInput, match=r"no usable WORLD_SIZE, LOCAL_RANK, MASTER_ADDR"):
        start_world(CPU)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    beyond = torch.cuda.device_count()
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(beyond))
    monkeypatch.setenv("WORLD_SIZE", str(beyond + 1))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(BadInput, match="LOCAL_RANK"):
        start_world(torch.device("cuda"))
