"""The edge of the program: help, usage, exit codes, what the disk refuses, and signals."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.cli import main
from flows.failures import exit_code_of, words_of
from shards.errors import BadInput, BadInputs

COMMANDS = (
    *("demo", "simulate", "init", "curate", "segment", "info", "check", "clean", "train"),
    *("evaluate", "export", "deploy"),
)
FAULT = BadInput("file", expected="one thing", found="another", remedy="mend it")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_words(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    _, _, listed = capsys.readouterr().out.partition("\n\n")
    # An option alone on its line has its words on the next, further in.
    entries = re.findall(r"^  (-?\S.*)\n((?:   .*\n?)*)", listed, re.MULTILINE)
    assert entries
    for entry, more in entries:
        assert re.search(r"\S  +\S", entry) or more.strip(), f"{command}: {entry}"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("curat a.toml", "there is no command curat; did you mean curate?"),
        ("curate a.toml --onyl a", "unknown here: --onyl a; did you mean --only?"),
        ("curate a.toml b.toml", "unknown here: b.toml"),
        ("curate a.toml --workers 0", "0 is not at least 1"),
        ("check", "required: dataset"),
    ],
)
def test_usage_is_told(command: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict a b", "export d --to bags --out o"])
def test_what_is_not_there_yet_says_so(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    assert "not there yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (FAULT, 2, "remedy:   mend it"),
        (BadInputs([FAULT, FAULT]), 2, "expected: one thing"),
        (KeyboardInterrupt(), 3, "stopped; run the same command again to go on"),
        (OSError(errno.ENOSPC, "No space left", "a/b.tar"), 1, "a/b.tar\n  expected: room"),
        (OSError(errno.EDQUOT, "Quota", "b"), 1, "free space and run the same command again"),
        (OSError(errno.ENOSPC, "No space left"), 1, "a file that the system does not name"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), 2, "change its permissions"),
        (OSError(errno.EROFS, "Read-only file system", "a"), 2, "found:    Read-only"),
        (OSError(errno.EPERM, "No", "from", None, "to"), 2, "from -> to"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a"), 2, "mend the path"),
        (OSError(errno.EIO, "Input/output error", "a"), 1, "Input/output error: 'a'"),
        (MemoryError(), 1, "fewer --workers"),
        (RuntimeError("why"), 1, "RuntimeError: why"),
    ],
)
def test_errors_have_words_and_codes(error: BaseException, code: int, words: str) -> None:
    assert exit_code_of(error) == code
    assert words in words_of(error)


def test_a_file_without_a_name_is_said_to_lie_in_the_output() -> None:
    full = OSError(errno.ENOSPC, "No space left")
    assert words_of(full, Path("a/out")).startswith(
        "a file that the system does not name, below a/out\n"
    )


def one_run(run: Path, out: Path) -> tuple[str, ...]:
    """The command for a run of DAPI patches, which needs no network."""
    bundle = str(run / "outs")
    return (
        "curate",
        "--xenium",
        bundle,
        "--image",
        "morphology",
        "--donor",
        "D",
        "--out",
        str(out),
    )


def test_an_output_below_a_file_is_bad_input(
    simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(one_run(simulated, tmp_path / "file" / "out")) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def cellpair(*args: Path | str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flows.cli", *map(str, args)]
    # The options of Popen are too many to be typed here again.
    # Of options that it can't know mypy can't choose Popen's overload.
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full to write to")
def test_an_output_stream_that_is_full_is_told_once(simulated: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = cellpair("info", simulated / "he.ome.tif", stdout=full)
        _, told = process.communicate()
    assert process.returncode == 1
    assert told.startswith("cellpair: a file that the system does not name\n  expected: room")
    assert "Exception ignored" not in told


def test_a_reader_that_goes_away_ends_it_quietly(simulated: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = cellpair("info", simulated / "he.ome.tif", stdout=writing)
    os.close(writing)
    _, told = process.communicate()
    assert (process.returncode, told) == (3, "")


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_a_signal_ends_it_and_its_workers(simulated: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = cellpair(*one_run(simulated, out), "--workers", "2", stdout=subprocess.PIPE)
    while process.poll() is None and len(children(process)) < 3:  # and the tracker of resources
        time.sleep(0.05)
    workers = children(process)
    process.terminate()
    _, told = process.communicate()
    assert process.returncode == 3
    assert "cellpair: stopped; run the same command again to go on\n" in told
    _, alive = psutil.wait_procs(workers, timeout=300)
    assert alive == []
    assert (out / "curate.toml").exists()
    assert not (out / "dataset.json").exists()


def test_a_second_signal_ends_it_at_once() -> None:
    # Holds on whatever it is told, as a library may.
    script = """
import time
from flows.stopping import stopping_on_signals

with stopping_on_signals(within_s=600):
    word = "ready"
    while True:
        try:
            print(word, flush=True)
            time.sleep(600)
        except KeyboardInterrupt:
            word = "no"
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "no\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate()
    assert process.returncode == 3
    assert told.count("cellpair: stopped; run the same command again to go on\n") == 1


def test_what_holds_on_is_ended_in_time() -> None:
    script = """
import os, signal, time
from flows.stopping import stopping_on_signals

with stopping_on_signals(within_s=0.2):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
    except KeyboardInterrupt:
        time.sleep(600)
"""
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE)
    assert done.returncode == 3


def test_an_interrupt_that_falls_into_a_finalizer_ends_it_too() -> None:
    script = """
import os, signal, time
from flows.stopping import stopping_on_signals

class Left:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(600)

with stopping_on_signals(within_s=600):
    left = Left()
    del left
    time.sleep(600)
"""
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert "run the same command again to go on" in done.stderr


def test_a_signal_after_the_work_is_done_takes_nothing_back(simulated: Path) -> None:
    # Python's own end holds on, as that of a library may.
    script = """
import atexit, sys, time
from flows.cli import main

def hold_on():
    print("ending", flush=True)
    time.sleep(600)

atexit.register(hold_on)
sys.exit(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, "info", simulated / "he.ome.tif"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        while process.stdout.readline() != "ending\n":
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, told = process.communicate()
    assert (process.returncode, told) == (0, "")


def test_a_signal_that_it_was_started_to_ignore_stays_ignored(simulated: Path) -> None:
    # Named, since the line is too long with it.
    ignoring = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    process = cellpair("info", simulated / "outs", stdout=subprocess.PIPE, preexec_fn=ignoring)
    for _ in range(40):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    process.communicate()
    assert process.returncode == 0
