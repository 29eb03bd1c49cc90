"""An artifact is whole or absent, and made once."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from shards import lock
from shards.artifact import (
    Identity,
    Lost,
    build_artifact,
    find_artifact,
    link_or_copy,
    read_artifact,
    write_atomically,
    written_aside,
)

IDENTITY = Identity(
    stage="cells",
    stage_version=1,
    config={"a": 1},
    parents={"nuclei": "f"},
    inputs={"xenium": "h"},
)


def build(parent: Path, make: Any, identity: Identity = IDENTITY, **more: Any) -> tuple[Path, bool]:
    options = {"provenance": {}, "check_inputs": lambda: None, **more}
    folder, _, reused = build_artifact(parent, identity, make, **options)
    return folder, reused


def write_one(out: Path, blocks: Path) -> dict[str, Any]:
    (out / "x.txt").write_text("hello")
    return {"n": 1}


def never(out: Path, blocks: Path) -> dict[str, Any]:
    raise AssertionError("made twice")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_second_build_reuses_the_first(tmp_path: Path) -> None:
    folder, reused = build(tmp_path, write_one)
    assert not reused
    record = read_artifact(folder)
    assert record is not None
    assert record.summary == {"n": 1}
    assert record.files["x.txt"].n_bytes == 5
    assert build(tmp_path, never) == (folder, True)
    changed = IDENTITY.model_copy(update={"config": {"a": 2}})
    assert build(tmp_path, write_one, changed)[0] != folder
    assert len(names(tmp_path)) == 2  # no lock, no blocks, nothing aside


def test_a_failed_stage_leaves_its_blocks_and_nothing_else(tmp_path: Path) -> None:
    def fail(out: Path, blocks: Path) -> dict[str, Any]:
        write_one(out, blocks)
        (blocks / "1").write_text("a block")
        raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(OSError, match="disk full"):
        build(tmp_path, fail)
    assert names(tmp_path) == [f".{IDENTITY.fingerprint}.blocks"]

    def go_on(out: Path, blocks: Path) -> dict[str, Any]:
        link_or_copy(blocks / "1", out / "1")
        return {}

    folder, reused = build(tmp_path, go_on)
    assert not reused
    assert names(folder) == ["1", "artifact.json"]
    assert names(tmp_path) == [folder.name]


KILLED = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from shards.artifact import Identity, build_artifact
    def make(out, blocks):
        (out / "half").write_text("half")
        (blocks / "1").write_text("a block")
        print("writing", flush=True)
        time.sleep(60)
    build_artifact(Path(sys.argv[1]), Identity.model_validate_json(sys.argv[2]), make,
                   provenance={}, check_inputs=lambda: None)
    """
)


def test_a_killed_stage_leaves_its_blocks_and_no_artifact(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), IDENTITY.model_dump_json()],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert find_artifact(tmp_path / IDENTITY.fingerprint) is None

    def go_on(out: Path, blocks: Path) -> dict[str, Any]:
        assert names(out) == []
        assert names(blocks) == ["1"]
        return write_one(out, blocks)

    folder, reused = build(tmp_path, go_on)
    assert not reused
    assert names(folder) == ["artifact.json", "x.txt"]
    assert names(tmp_path) == [folder.name]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "x.txt").unlink(),
        lambda folder: (folder / "x.txt").write_text("hell"),
        lambda folder: (folder / "artifact.json").write_text('{"stage": "cel'),
        lambda folder: (folder / "artifact.json").unlink(),
    ],
    ids=["file missing", "file cut", "record cut", "record missing"],
)
def test_what_is_damaged_is_put_away_and_made_again(tmp_path: Path, spoil: Any) -> None:
    folder, _ = build(tmp_path, write_one)
    before = (folder / "artifact.json").read_bytes()
    spoil(folder)
    again, reused = build(tmp_path, write_one)
    assert (again, reused) == (folder, False)
    assert (folder / "artifact.json").read_bytes() == before
    assert names(folder) == ["artifact.json", "x.txt"]
    assert len(names(tmp_path)) == 2  # the damaged one is kept beside until `clean`


def test_an_input_that_changed_publishes_nothing(tmp_path: Path) -> None:
    def changed() -> None:
        raise ValueError("changed meanwhile")

    with pytest.raises(ValueError, match="changed meanwhile"):
        build(tmp_path, write_one, check_inputs=changed)
    assert find_artifact(tmp_path / IDENTITY.fingerprint) is None


def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    made: list[int] = []

    def slow(out: Path, blocks: Path) -> dict[str, Any]:
        made.append(1)
        time.sleep(0.5)
        return write_one(out, blocks)

    results: list[tuple[Path, bool]] = []
    threads = [
        threading.Thread(target=lambda: results.append(build(tmp_path, slow))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert sorted(reused for _, reused in results) == [False, True, True]


def test_who_was_taken_over_throws_its_work_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that stood still for longer than its heart may, and then goes on."""
    monkeypatch.setattr(lock, "STALE_S", 0.3)
    monkeypatch.setattr(lock, "is_dead", lambda owner: False)

    def stand_still(out: Path, blocks: Path) -> dict[str, Any]:
        (out / "x.txt").write_text("late")
        other, reused = build(tmp_path, write_one)  # takes over after 0.3 s without a beat
        assert not reused
        assert (other / "x.txt").read_text() == "hello"
        return {}

    folder, reused = build(tmp_path, stand_still)
    assert reused
    assert (folder / "x.txt").read_text() == "hello"


def test_who_was_taken_over_publishes_nothing_while_the_other_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "STALE_S", 0.3)
    monkeypatch.setattr(lock, "is_dead", lambda owner: False)
    working, ended = threading.Event(), threading.Event()

    def other(out: Path, blocks: Path) -> dict[str, Any]:
        working.set()
        assert ended.wait(10)
        return write_one(out, blocks)

    def stand_still(out: Path, blocks: Path) -> dict[str, Any]:
        (out / "x.txt").write_text("late")
        taker.start()
        assert working.wait(10)
        return {}

    taker = threading.Thread(target=lambda: build(tmp_path, other))
    with pytest.raises(Lost, match="another process took over"):
        build(tmp_path, stand_still)
    assert find_artifact(tmp_path / IDENTITY.fingerprint) is None
    ended.set()
    taker.join()
    assert (tmp_path / IDENTITY.fingerprint / "x.txt").read_text() == "hello"
    assert names(tmp_path) == [IDENTITY.fingerprint]


def test_the_fingerprint_hangs_on_all_that_it_is_made_from() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"stage": "nuclei"},
        {"stage_version": 2},
        {"config": {"a": 2}},
        {"parents": {"nuclei": "g"}},
        {"inputs": {"xenium": "i"}},
    ]
    assert len({IDENTITY.model_copy(update=change).fingerprint for change in changes}) == 6


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, b"old")

    def write_half() -> None:
        with written_aside(path) as aside:
            aside.write_bytes(b"ne")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["x.json"]
