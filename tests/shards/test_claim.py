"""Two machines that make the same artifact: one works, the other waits; the dead are told."""

from __future__ import annotations

import threading
import time

import pytest

from shards import claim as claim_module
from shards.claim import Claim, claimed, read_claim
from shards.lock import Owner, this_process
from shards.remote import RemotePath, remote_path
from tests.s3 import Line

FAR_AWAY = Owner(host="far-away x", pid=7, started_s=1.0)


@pytest.fixture
def place(bucket: str, s3: Line, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    monkeypatch.setattr(claim_module, "_POLL_S", 0.05)
    return remote_path(bucket) / ".fp.claim"


def test_a_claim_is_there_while_it_is_held_and_beats(
    place: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_module, "HEARTBEAT_S", 0.1)
    with claimed(place, "r1 cells"):
        until_s = time.monotonic() + 20
        while (found := read_claim(place)) is None or not found.beat:
            assert time.monotonic() < until_s
            time.sleep(0.05)
        assert found.owner == this_process()
    assert not place.is_file()


def test_another_machine_waits_until_it_is_done(
    place: RemotePath, caplog: pytest.LogCaptureFixture
) -> None:
    place.write_bytes(Claim(owner=FAR_AWAY, beat=0).model_dump_json().encode())
    done = threading.Timer(0.5, lambda: place.parent.remove([place.name]))
    done.start()
    started_s = time.monotonic()
    with claimed(place, "r1 cells"):
        assert time.monotonic() - started_s >= 0.5
    done.join()
    assert "r1 cells: waiting for process 7 on far-away, which works on it" in caplog.text


@pytest.mark.parametrize(
    "owner",
    [
        pytest.param(FAR_AWAY, id="stands still"),
        pytest.param(this_process().model_copy(update={"started_s": 1.0}), id="known to be dead"),
        pytest.param(this_process(), id="an earlier try of this process"),
    ],
)
def test_a_claim_that_nobody_holds_is_taken_over(
    place: RemotePath, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_module, "STALE_S", 0.5 if owner == FAR_AWAY else 60.0)
    place.write_bytes(Claim(owner=owner, beat=3).model_dump_json().encode())
    with claimed(place, "r1 cells"):
        found = read_claim(place)
        assert found is not None
        assert found.owner == this_process()
    assert not place.is_file()
