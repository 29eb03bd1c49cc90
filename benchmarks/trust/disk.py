"""A disk that is full at some place of the run, an output that can't be written, another's folder.

    python -m benchmarks.trust.disk [--cells N] [--out DIR]

Each must end with the promised exit code and say where and what to do; once mended, the same
command goes on to the bytes of an undisturbed run. A small tmpfs stands for the disk, which needs
Linux and root; where these are missing it is said.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from benchmarks.trust.harness import (
    BAD_INPUT,
    DONE,
    FAULTS,
    STAGES,
    WAITED,
    Changes,
    Place,
    Promises,
    difference,
    made_in,
    parser,
    place_of,
)

DISK_BYTES = 1 << 30
KIB = 1 << 10
NEEDS_ROOT = os.geteuid() != 0 or not sys.platform.startswith("linux")
# What a person needs of a full disk's message, and of bad input's: any of each group.
FULL_DISK = (("No space left", "disk is full"), ("free ", "room"))
REFUSED = (("expected:",), ("found:",), ("remedy:",))
# Root may write anywhere, unless it gives up the right to.
AS_ANYBODY = ("setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner")


@dataclass(frozen=True, slots=True)
class Full:
    """A place where the disk is full: what was made before, and the room that is left.

    The room is a share of what the next stage makes, and some more bytes.
    """

    name: str
    n_stages: int
    share: float = 0.0
    n_bytes: int = 0
    published: bool = False
    reported: bool = False


PLACES = (
    Full("nothing fits", 0),
    Full("registration", 0, n_bytes=20 * KIB),
    Full("nuclei, first block", 1, n_bytes=28 * KIB),
    Full("nuclei, later", 1, share=0.9),
    Full("cells", 2, share=0.5),
    Full("patches, first block", 3, share=0.1),
    Full("patches, last block", 3, share=0.98),
    Full("shards, at their start", 4, share=0.1),
    Full("shards, at their end", 4, share=0.98),
    Full("dataset", 5, n_bytes=32 * KIB),
    Full("report", 5, n_bytes=100 * KIB, published=True),
    Full("log", 5, published=True, reported=True),
)


class Disk:
    """A tmpfs whose size and mode are changed while it is in use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def remount(self, options: str) -> None:
        _run("mount", "-o", f"remount,{options}", str(self.folder))

    def leave(self, n_bytes: int) -> None:
        """Make it so small that this much room is left, in whole pages."""
        facts = os.statvfs(self.folder)
        used = (facts.f_blocks - facts.f_bfree) * facts.f_frsize
        self.remount(f"size={used + n_bytes // facts.f_frsize * facts.f_frsize or facts.f_frsize}")

    def grow(self) -> None:
        self.remount(f"size={DISK_BYTES}")


@contextmanager
def small_disk(place: Place) -> Iterator[Disk]:
    folder = place.fresh("disk")
    folder.mkdir()
    _run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder))
    try:
        yield Disk(folder)
    finally:
        # Lazily: processes that were ended a moment ago may not be gone yet.
        _run("umount", "--lazy", str(folder))


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


def copy_made(reference: Path, out: Path, full: Full) -> None:
    """What a run leaves that came so far; nothing where it did not begin."""
    if not full.n_stages:
        return
    out.mkdir()
    for name in ("cellpair.json", "content-hashes.json"):
        shutil.copy2(reference / name, out)
    for part in (Path("runs/r1") / stage for stage in STAGES[: full.n_stages]):
        if (reference / part).exists():
            shutil.copytree(reference / part, out / part)
    if full.published:
        for folder in ("panels", "datasets"):
            shutil.copytree(reference / folder, out / folder)
        shutil.copy2(reference / "dataset.json", out)
    if full.reported:
        shutil.copytree(reference / "report", out / "report")


def room_for(reference: Path, full: Full) -> int:
    if not full.share:
        return full.n_bytes
    stage = reference / "runs" / "r1" / STAGES[full.n_stages]
    made = sum(p.stat().st_size for p in stage.rglob("*") if p.is_file())
    return int(full.share * made) + full.n_bytes


@dataclass(frozen=True, slots=True)
class Trial:
    """What every fault is tried with: the fault is there, is told, is mended; the run goes on."""

    place: Place
    made: dict[str, str]
    promises: Promises

    def run(
        self,
        what: str,
        out: Path,
        mend: Callable[[], None],
        *,
        code: int,
        words: tuple[tuple[str, ...], ...],
        workers: int = 1,
        prefix: Sequence[str] = (),
        **changes: Unpack[Changes],
    ) -> None:
        with self.place.curate(out, workers, prefix=prefix, **changes) as command:
            found, seconds = command.wait()
            left = command.left()
            text = command.text
        mend()
        print(f"{what}: exit {found} in {seconds:.1f} s at {command.at()}", flush=True)
        missing = [f"'{group[0]}'" for group in words if not any(w in text for w in group)]
        missing += [] if str(out) in text else ["the path"]
        missing += ["no Traceback"] if "Traceback" in text else []
        self.promises.add(f"{what}: exit code", found, code)
        self.promises.nothing(f"{what}: not said", missing)
        self.promises.nothing(f"{what}: processes left", left)
        with self.place.curate(out) as again:
            found, seconds = again.wait()
            waited = WAITED.findall(again.text)
        print(f"{what}, mended: exit {found} in {seconds:.1f} s", flush=True)
        self.promises.add(f"{what}, mended: exit code", found, DONE)
        self.promises.nothing(f"{what}, mended: waited for an owner that is gone", waited)
        self.promises.nothing(
            f"{what}, mended: differing files", difference(made_in(out), self.made)
        )


def full_disks(trial: Trial, reference: Path, places: Sequence[Full]) -> None:
    for i, full in enumerate(places):
        with small_disk(trial.place) as disk:
            out = disk.folder / "out"
            copy_made(reference, out, full)
            disk.leave(room_for(reference, full))
            trial.run(
                f"disk full: {full.name}",
                out,
                disk.grow,
                code=FAULTS,
                words=FULL_DISK,
                workers=1 + i % 2,
            )


def read_only(trial: Trial, reference: Path) -> None:
    for name, n_stages in (("anew", 0), ("halfway", 3)):
        with small_disk(trial.place) as disk:
            out = disk.folder / "out"
            copy_made(reference, out, Full(name, n_stages))
            disk.remount("ro")
            trial.run(
                f"read-only output, {name}",
                out,
                lambda disk=disk: disk.remount("rw"),  # type: ignore[misc]  # of a default
                code=BAD_INPUT,
                words=REFUSED,
            )


def forbidden(trial: Trial, reference: Path) -> None:
    prefix = AS_ANYBODY if os.geteuid() == 0 else ()
    if prefix and shutil.which(prefix[0]) is None:
        print("permission denied: not tried: root needs setpriv (util-linux) to give up its rights")
        return
    for name, inside in (("of the folder", "."), ("of one of its folders", "runs/r1/patches")):
        out = trial.place.fresh("forbidden")
        copy_made(reference, out, Full(name, 3))
        folder = out / inside
        folder.mkdir(exist_ok=True)
        folder.chmod(0o555)
        trial.run(
            f"permission denied, {name}",
            out,
            lambda folder=folder: folder.chmod(0o755),  # type: ignore[misc]  # of a default
            code=BAD_INPUT,
            words=REFUSED,
            prefix=prefix,
        )


def others_folder(trial: Trial, reference: Path) -> None:
    out = trial.place.fresh("theirs")
    shutil.copytree(reference, out)
    trial.run(
        "folder of another config", out, lambda: None, code=BAD_INPUT, words=REFUSED, name="other"
    )


def show(args: argparse.Namespace, places: Sequence[Full] = PLACES) -> int:
    promises = Promises()
    with place_of(args) as place:
        reference = place.fresh("reference")
        with place.curate(reference) as command:
            command.wait_or_fail()
        trial = Trial(place, made_in(reference), promises)
        if NEEDS_ROOT:
            print("disk full, read-only output: not tried: a tmpfs needs Linux and root")
        else:
            full_disks(trial, reference, places)
            read_only(trial, reference)
        forbidden(trial, reference)
        others_folder(trial, reference)
    return promises.verdict()


def main() -> int:
    return show(parser(__doc__, 1000).parse_args())


if __name__ == "__main__":
    sys.exit(main())
