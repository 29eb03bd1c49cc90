"""One process builds an artifact at a time: numbered claims with owner and heartbeat.

A lock is a folder of claims; the highest number holds it. A claim is a file made exclusively, with
its owner's host, pid and start, whose time its owner renews. A dead owner is told at once on its
own machine by the process table, elsewhere by a heart that stands still, as the waiter's own clock
measures it; so clocks of two machines need not agree, and it works where `flock` does not.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import ValidationError

from shards.schema import Record

log = logging.getLogger("cellpair")

HEARTBEAT_S = 5.0
# Twelve missed beats: longer than a file system's caches and a machine's swapping last.
STALE_S = 60.0
_POLL_S = 0.2
_TELL_S = 60.0
# Starts of processes are counted from the boot, whose own time may be mended by a second.
_START_TOLERANCE_S = 2.0


class Owner(Record):
    """A process, told from any other that ever bore its number; `host` names its process table."""

    host: str
    pid: int
    started_s: float


def this_process() -> Owner:
    """The owner that this process is."""
    pid = os.getpid()
    return Owner(host=_host(), pid=pid, started_s=psutil.Process(pid).create_time())


def is_dead(owner: Owner) -> bool:
    """Whether the owner is known to be gone; one on another host never is."""
    if owner.host != _host():
        return False
    try:
        process = psutil.Process(owner.pid)
        started_s: float = process.create_time()
        return (
            abs(started_s - owner.started_s) > _START_TOLERANCE_S
            or str(process.status()) == psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        return True


def living_owner(lock: Path) -> Owner | None:
    """Who holds the lock folder, as far as can be told at once; None for nobody, or for a dead one.

    An owner on another host counts as living while its heart has beaten within twelve beats of this
    machine's clock.
    """
    claim = _newest_claim(lock)
    if claim is None:
        return None
    try:
        beat_s = claim.stat().st_mtime
    except FileNotFoundError:
        return None
    owner = _read_owner(claim)
    quiet = abs(time.time() - beat_s) > STALE_S
    if owner is None:  # made, and not yet written, or never to be
        return None if quiet else Owner(host="?", pid=0, started_s=0)
    if owner.host == _host():
        return None if is_dead(owner) else owner
    return None if quiet else owner


@dataclass(frozen=True, slots=True)
class Claim:
    """A lock that is held: `number` tells it from every other claim on the same lock."""

    path: Path

    @property
    def number(self) -> int:
        return int(self.path.stem)

    def is_held(self) -> bool:
        """Whether it was not taken over: a process may be stopped for longer than its heart may."""
        return _newest_claim(self.path.parent) == self.path


@contextmanager
def hold(lock: Path, what: str) -> Iterator[Claim]:
    """Hold the lock folder `lock`, waiting for a living owner and taking over a dead one's.

    Who is waited for is logged, with `what` it is about. On leaving, the folder is gone.
    """
    claim = Claim(_acquire(lock, what))
    stop = threading.Event()
    heart = threading.Thread(target=_beat, args=(claim.path, stop), daemon=True)
    heart.start()
    try:
        yield claim
    finally:
        stop.set()
        heart.join()
        if claim.is_held():
            shutil.rmtree(lock, ignore_errors=True)


def _acquire(lock: Path, what: str) -> Path:
    seen: tuple[Path, int] | None = None  # a claim and its last beat
    since_s = told_s = float("-inf")
    while True:
        newest, owner = _newest_claim(lock), None
        if newest is not None:
            try:
                beat = (newest, newest.stat().st_mtime_ns)
            except FileNotFoundError:  # released in this moment
                continue
            now_s = time.monotonic()
            if beat != seen:
                seen, since_s = beat, now_s
            owner = _read_owner(newest)
            if not (owner is not None and is_dead(owner)) and now_s - since_s < STALE_S:
                if now_s - told_s >= _TELL_S:
                    told_s = now_s
                    who = "another process" if owner is None else f"process {owner.pid}"
                    where = "" if owner is None or owner.host == _host() else f" on {owner.host}"
                    log.warning("%s: waiting for %s%s, which works on it", what, who, where)
                time.sleep(_POLL_S)
                continue
            log.warning("%s: taken over from a process that is gone", what)
        claim = _try_claim(lock, newest, owner)
        if claim is not None:
            return claim


def _try_claim(lock: Path, after: Path | None, dead: Owner | None) -> Path | None:
    """The number after that of a dead owner's claim, unless somebody else was faster."""
    try:
        lock.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        if lock.is_file():
            raise
        return None  # it has just gone
    claim = lock / f"{1 if after is None else int(after.stem) + 1:06d}.json"
    try:
        fd = os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except (FileExistsError, FileNotFoundError):  # another was faster; or has just released
        return None
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(this_process().model_dump_json().encode())
    except OSError:  # a full disk: nobody is to wait for a claim without an owner
        claim.unlink(missing_ok=True)
        raise
    # The lock may have been released and claimed anew, from 1, since its owner was found dead.
    if after is not None and (not after.exists() or _read_owner(after) != dead):
        claim.unlink(missing_ok=True)
        return None
    return claim


def _beat(claim: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        try:
            os.utime(claim)
        except FileNotFoundError:  # taken over
            return


def _newest_claim(lock: Path) -> Path | None:
    # Not by glob, which looks whether a folder is there and then fails if it has just gone.
    try:
        names = os.listdir(lock)
    except FileNotFoundError:
        return None
    return max((lock / n for n in names if n[0].isdigit() and n.endswith(".json")), default=None)


def _read_owner(claim: Path) -> Owner | None:
    with suppress(FileNotFoundError, ValidationError):
        return Owner.model_validate_json(claim.read_bytes())
    return None


def _host() -> str:
    # Two containers may share a name but not a process table.
    table = Path("/proc/self/ns/pid")
    return f"{platform.node()} {os.readlink(table)}" if table.is_symlink() else platform.node()
