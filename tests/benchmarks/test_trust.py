"""The scripts of trust on a small section: that they find nothing, and that they would."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.trust import again, disk, kill, stop, together
from benchmarks.trust.harness import BAD_INPUT, Place, Promises, difference, listing, made_in
from benchmarks.trust.kill import Undisturbed


@pytest.fixture(scope="module")
def place(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("trust"), simulated, "none")


@pytest.fixture(scope="module")
def reference(place: Place) -> Undisturbed:
    return kill.undisturbed(place, 1)


@pytest.fixture(scope="module")
def seconds_of_two(place: Place, reference: Undisturbed) -> float:
    """What a run of two workers takes, as `stop` starts it."""
    with place.curate(place.fresh("by-two"), 2) as command:
        return command.wait_or_fail()


@pytest.fixture(scope="module")
def finished(place: Place, reference: Undisturbed) -> Path:
    return place.folder / "undisturbed"


def kept(promises: Promises) -> bool:
    return promises.verdict() == 0


def test_a_promise_that_is_not_kept_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    promises = Promises()
    promises.add("exit code", 0, 0)
    promises.nothing("left", [])
    assert kept(promises)
    promises.nothing("differing", ["a.tar", "b.tar"])
    assert not kept(promises)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "NOT KEPT" in line] == [
        ["differing", "2:", "a.tar,", "b.tar", "0", "NOT", "KEPT"]
    ]


def test_another_byte_and_a_file_too_many_are_found(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "logs").mkdir()
    for name in ("runs/a", "runs/b", "logs/r1.log"):
        (tmp_path / name).write_text(name)
    before = made_in(tmp_path)
    assert sorted(before) == ["runs/a", "runs/b"]
    (tmp_path / "runs/a").write_text("c")
    (tmp_path / "runs/.b.partial").write_text("")
    (tmp_path / "logs/r1.log").write_text("told again")
    assert difference(made_in(tmp_path), before) == ["runs/.b.partial", "runs/a"]
    assert listing(tmp_path)[:3] == ["logs", "logs/r1.log", "runs"]


def test_a_file_written_anew_with_the_same_bytes_is_found(tmp_path: Path) -> None:
    for folder in ("runs/r1/shards", "runs/r1/patches", "panels", "datasets"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_text("same")
    (tmp_path / "dataset.json").write_text("same")
    before = again.facts(tmp_path)
    assert len(before) == 5
    aside = tmp_path / "aside"
    aside.write_text("same")
    aside.rename(tmp_path / "panels" / "file")
    (tmp_path / "runs/r1/shards/new").write_text("new")
    after = again.facts(tmp_path)
    assert again.rewritten(before, after) == ["panels/file"]
    assert again.new_stages(before, after) == {"shards"}


def test_a_process_and_what_it_started_are_found_and_ended(place: Place) -> None:
    starts_another = (
        "import subprocess, sys, time; print('here', flush=True); "
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    )
    with place.python("-c", starts_another) as command:
        while "here" not in command.text:
            assert not command.ends_within(0.05)
        command.signal(signal.SIGKILL)
        assert command.wait()[0] == -signal.SIGKILL
        left = command.left(grace_s=0.0)
        assert left
    # A kill takes its moment; and one whose parent is gone may wait to be buried.
    deadline_s = time.monotonic() + 20
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in left):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_killed_run_goes_on(place: Place, reference: Undisturbed) -> None:
    found = kill.kill_runs(place, reference, 1, random.Random(3))
    assert found.hits.total() == 1
    assert (found.failed, found.differing, found.left_in_out) == ([], [], [])
    assert (found.orphans, found.waited) == ([], [])
    assert listing(place.temp) == []


def test_another_order_of_blocks(place: Place, reference: Undisturbed) -> None:
    assert difference(kill.other_order(place, random.Random(1)), reference.made) == []


@pytest.mark.slow
def test_a_killed_worker_is_replaced(place: Place, reference: Undisturbed) -> None:
    found = kill.kill_workers(place, reference, 1, random.Random(1))
    assert found.hits.total() == 1
    assert (found.failed, found.differing, found.left_in_out) == ([], [], [])
    assert (found.orphans, found.waited) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("starts", [(0.0, 0.0), (0.0, 0.2, 0.4)])
def test_several_at_once(place: Place, reference: Undisturbed, starts: tuple[float, ...]) -> None:
    assert kept(together.at_once(place, starts, reference.made, reference.seconds))


@pytest.mark.slow
@pytest.mark.parametrize("how", stop.STOPS, ids=lambda how: how.name)
def test_a_stopped_run_says_so_and_goes_on(
    place: Place, reference: Undisturbed, seconds_of_two: float, how: stop.Stop
) -> None:
    # At 0.45 of the time: near its end, on a machine that others use, it may be done before.
    found = stop.stopped(place, how, 1, seconds_of_two, reference.made, random.Random(11))
    assert dict(found.codes) == {3: 1}
    assert (found.unsaid, found.left, found.differing) == ([], [], [])


@pytest.mark.slow
@pytest.mark.skipif(disk.NEEDS_ROOT, reason="a tmpfs needs Linux and root")
@pytest.mark.parametrize("full", disk.PLACES, ids=lambda full: full.name)
def test_a_full_disk(place: Place, reference: Undisturbed, finished: Path, full: disk.Full) -> None:
    trial = disk.Trial(place, reference.made, Promises())
    disk.full_disks(trial, finished, [full])
    assert kept(trial.promises)


@pytest.mark.slow
@pytest.mark.skipif(disk.NEEDS_ROOT, reason="a tmpfs needs Linux and root")
def test_a_read_only_output(place: Place, reference: Undisturbed, finished: Path) -> None:
    trial = disk.Trial(place, reference.made, Promises())
    disk.read_only(trial, finished)
    assert kept(trial.promises)


@pytest.mark.slow
@pytest.mark.skipif(
    os.name != "posix" or (os.geteuid() == 0 and shutil.which(disk.AS_ANYBODY[0]) is None),
    reason="root needs setpriv to give up its rights",
)
def test_permission_denied(place: Place, reference: Undisturbed, finished: Path) -> None:
    trial = disk.Trial(place, reference.made, Promises())
    disk.forbidden(trial, finished)
    assert kept(trial.promises)


@pytest.mark.slow
def test_the_folder_of_another_config(place: Place, reference: Undisturbed, finished: Path) -> None:
    trial = disk.Trial(place, reference.made, Promises())
    disk.others_folder(trial, finished)
    assert kept(trial.promises)
    assert ("folder of another config: exit code", str(BAD_INPUT), str(BAD_INPUT), True) in (
        trial.promises.rows
    )


@pytest.mark.slow
def test_changes_make_only_what_they_must(
    place: Place, reference: Undisturbed, finished: Path
) -> None:
    out = place.fresh("changed")
    shutil.copytree(finished, out)
    promises = Promises()
    again.changed(place, out, promises)
    assert kept(promises)
