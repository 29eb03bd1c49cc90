"""What the scripts of trust share: a section, `cellpair` as a process, folders compared, a verdict.

Every process that a script starts bears a mark in its environment, which its children inherit: so
whatever it leaves behind is found, and ended, without touching anybody else's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypedDict, Unpack

import psutil

from pairing.simulate import SimulationParams, simulate
from shards.artifact import sha256_of, write_atomically
from shards.schema import digest

DONE, FAULTS, BAD_INPUT, STOPPED = 0, 1, 2, 3
STAGES = ("registration", "nuclei", "cells", "patches", "shards")
# The longest run that a script waits for, and by how much a disturbed one may exceed a usual one.
LIMIT_S = 3600.0
LIMIT_TIMES, LIMIT_MORE_S = 5.0, 120.0
# What a dead parent's children are given to notice it and end.
GRACE_S = 20.0
# What a run says that waits for another: nobody is there to wait for, where only one works.
WAITED = re.compile(r"waiting for [^,\n]*")
_MARK = "CELLPAIR_TRUST"
_POLL_S = 0.02
_number = itertools.count()

# What a run makes; the rest of its folder tells or remembers.
_MADE = ("runs", "panels", "datasets", "dataset.json")

CONFIG = """\
name = {name}
out = {out}
[segmentation]
model = {model}
[filters]
min_counts = {min_counts}
[split]
assign = {{ D1 = {split} }}
{more}
[[runs]]
id = "r1"
xenium = {xenium}
slide = {slide}
alignment = {alignment}
donor = "D1"
"""


class Changes(TypedDict, total=False):
    """What a config says differently."""

    name: str
    min_counts: int
    split: str
    more: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a script works: what it keeps between calls, the section, and a temporary folder.

    The temporary folder is the system's one for every process that is started here, so that what
    they leave there is told from what others do.
    """

    folder: Path
    section: Path
    model: str

    @property
    def temp(self) -> Path:
        return self.folder / "temp"

    def config(self, out: Path, changes: Changes) -> Path:
        """A config for `out`, in a file that is the same for the same config."""
        texts = {
            "name": changes.get("name", "trust"),
            "out": out,
            "model": self.model,
            "split": changes.get("split", "train"),
            "xenium": self.section / "outs",
            "slide": self.section / "he.ome.tif",
            "alignment": self.section / "he_imagealignment.csv",
        }
        quoted = {key: json.dumps(str(text), ensure_ascii=False) for key, text in texts.items()}
        min_counts, more = changes.get("min_counts", 10), changes.get("more", "")
        text = CONFIG.format(**quoted, min_counts=min_counts, more=more)
        path = self.folder / "configs" / f"{digest([text])}.toml"
        if not path.exists():
            write_atomically(path, text.encode())
        return path

    def curate(
        self, out: Path, workers: int = 1, *, prefix: Sequence[str] = (), **changes: Unpack[Changes]
    ) -> Command:
        """`cellpair curate` of the section into `out`, started; `prefix` is what starts it."""
        config = self.config(out, changes)
        return self.cellpair("curate", str(config), "--workers", str(workers), prefix=prefix)

    def cellpair(self, *argv: str, prefix: Sequence[str] = ()) -> Command:
        """Any command of `cellpair`, started."""
        return self.python("-m", "flows.cli", *argv, prefix=prefix)

    def python(self, *argv: str, prefix: Sequence[str] = ()) -> Command:
        return Command([*prefix, sys.executable, *argv], self)

    def fresh(self, name: str) -> Path:
        """A path of this name, of which nothing is there."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path


class Command:
    """A command as a process of its own, at the head of a process group, its lines in a file."""

    def __init__(self, argv: Sequence[str], place: Place) -> None:
        n = next(_number)
        self.mark = f"{os.getpid()}-{n}"
        place.temp.mkdir(parents=True, exist_ok=True)
        # Files, not pipes: a killed parent's children would hold the pipe open.
        self.path = place.folder / "lines" / f"{n:04d}.txt"
        self.path.parent.mkdir(exist_ok=True)
        environ = {**os.environ, _MARK: self.mark, "TMPDIR": str(place.temp)}
        if environ.pop("PYTHONDONTWRITEBYTECODE", None):
            # As on a user's machine: the second start of Python finds the bytecode of the first.
            environ["PYTHONPYCACHEPREFIX"] = str(place.folder / "bytecode")
        self.started_s = time.monotonic()
        with self.path.open("wb") as lines:
            self.process = subprocess.Popen(
                argv, env=environ, stdout=lines, stderr=lines, start_new_session=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        end(self.mark)
        self.process.wait()

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8", errors="replace")

    def at(self) -> str:
        """The stage that is at work, by the last line that tells of one."""
        return _at(self.text)

    def wait(self, timeout_s: float = LIMIT_S) -> tuple[int, float]:
        """The exit code and the seconds that it took; it is ended (-9) where it takes longer."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            end(self.mark)
            code = self.process.wait()
        return code, time.monotonic() - self.started_s

    def wait_more(self, timeout_s: float) -> float:
        """The seconds that it takes from now on; it is ended where it takes longer."""
        now_s = time.monotonic()
        self.wait(timeout_s)
        return time.monotonic() - now_s

    def wait_or_fail(self) -> float:
        """The seconds that it took. Raises RuntimeError where it does not end well."""
        code, seconds = self.wait()
        if code != DONE:
            raise RuntimeError(f"exit {code}:\n{self.text}")
        return seconds

    def ends_within(self, seconds: float) -> bool:
        """Whether it ends by itself before so many seconds have passed."""
        try:
            self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return False
        return True

    def signal(self, signum: int, *, group: bool = False) -> None:
        """To its process alone, or as a terminal does: to its children too."""
        if group:
            os.killpg(self.process.pid, signum)
        else:
            self.process.send_signal(signum)

    def children(self) -> list[psutil.Process]:
        """Its Dask workers."""
        with _gone_is_none():
            found = psutil.Process(self.process.pid).children(recursive=True)
            return [p for p in found if _is_worker(p)]
        return []

    def left(self, grace_s: float = GRACE_S) -> list[psutil.Process]:
        """Processes of it that still live after `grace_s`, once it has ended itself."""
        deadline = time.monotonic() + grace_s
        while (left := marked(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left


def _at(text: str) -> str:
    done = re.findall(rf"^\S+ ({'|'.join(STAGES)}): (?:made|reused)", text, re.MULTILINE)
    if not done:
        return "start or registration"
    following = STAGES.index(done[-1]) + 1
    return STAGES[following] if following < len(STAGES) else "dataset and report"


def marked(mark: str) -> list[psutil.Process]:
    """Living processes that bear this mark."""
    found = []
    for process in psutil.process_iter():
        with _gone_is_none():
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(_MARK) == mark:
                found.append(process)
    return found


def end(mark: str) -> None:
    """Kill whatever bears this mark."""
    for process in marked(mark):
        with _gone_is_none():
            process.kill()


def _is_worker(process: psutil.Process) -> bool:
    with _gone_is_none():
        command = " ".join(process.cmdline())
        return "multiprocessing.spawn" in command or "multiprocessing.forkserver" in command
    return False


@contextmanager
def _gone_is_none() -> Iterator[None]:
    """A process may end while it is asked about; others' processes may not be asked."""
    try:
        yield
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return


def section(folder: Path, n_cells: int, seed: int) -> Path:
    """A simulated section in `folder`, made once and kept."""
    path = folder / f"section-{n_cells}-{seed}"
    if not path.exists():
        print(f"simulating {n_cells:,} cells", flush=True)
        aside = path.with_name(f"{path.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        simulate(aside, SimulationParams(n_cells=n_cells, seed=seed), workers=2)
        aside.rename(path)
    return path


def made_in(out: Path) -> dict[str, str]:
    """SHA-256 of every file that is promised to be the same, hidden leftovers too."""
    return {
        name: sha256_of(out / name)
        for name in listing(out)
        if (out / name).is_file() and name.split("/")[0] in _MADE
    }


def listing(out: Path) -> list[str]:
    """Everything below a folder, hidden or not, as relative paths."""
    return sorted(p.relative_to(out).as_posix() for p in out.rglob("*"))


def difference(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Names that are missing, are there in addition, or hold other bytes."""
    return sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))


def in_shared_memory() -> set[str]:
    """What lies in the machine's shared memory, where it has a folder for it."""
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


@dataclass(slots=True)
class Promises:
    """A table of what was found beside what is promised."""

    rows: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def add(self, name: str, found: object, promised: object, kept: bool | None = None) -> None:
        """`kept` where it is not that both are the same."""
        kept = found == promised if kept is None else kept
        self.rows.append((name, str(found), str(promised), kept))

    def nothing(self, name: str, found: Sequence[object]) -> None:
        """That there is none of `found`; the first few are named where there is."""
        told = ", ".join(map(str, found[:3])) + (" …" if len(found) > 3 else "")
        self.add(name, f"{len(found)}: {told}" if found else 0, 0, not found)

    def verdict(self) -> int:
        """Print the table; 1 where a promise is not kept."""
        print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        width = max(len(name) for name, *_ in self.rows)
        for name, found, promised, kept in self.rows:
            verdict = "kept" if kept else "NOT KEPT"
            print(f"{name:<{width}}  {found:<24}  {promised:<16}  {verdict}")
        kept = all(row[-1] for row in self.rows)
        print("ok" if kept else "NOT MET")
        return DONE if kept else FAULTS


def parser(doc: str | None, n_cells: int) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    options = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--cells", type=int, default=n_cells)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--model", default="compact", help="compact, or none for a quick look")
    options.add_argument("--out", type=Path, help="kept: the section is simulated but once")
    return options


@contextmanager
def place_of(args: argparse.Namespace) -> Iterator[Place]:
    """Where the script works: the folder that was given, or one that is gone at the end."""
    with tempfile.TemporaryDirectory() as gone:
        folder = (args.out or Path(gone)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "temp", ignore_errors=True)
        place = Place(folder, section(folder, args.cells, args.seed), args.model)
        with place.python("-c", "import flows.local, distributed") as compiled:
            compiled.wait()
        # As after an error: what was started is ended.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield place


def limit_s(usual_s: float) -> float:
    """How long to wait for a run that takes `usual_s` undisturbed, before it is said to hang."""
    return LIMIT_TIMES * usual_s + LIMIT_MORE_S


def stop_hard(command: Command) -> None:
    """kill -9 of its process, not of its group."""
    command.signal(signal.SIGKILL)
    command.process.wait()
