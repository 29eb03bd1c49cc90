"""One machine makes an artifact behind a URL at a time: a claim is an object with a heartbeat.

The claim is put only where there is none, by one conditional request, as S3 has them; its owner
writes it anew with the next number while it works. One that stands still, as the waiter's own clock
measures it, is taken over. Should two work all the same (a store without conditional requests, a
machine that slept), time is lost and no more: on CPUs both put the same bytes, and of whatever else
was put the record's hashes tell.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from pydantic import ValidationError

from shards.lock import Owner, is_dead, this_process
from shards.remote import RemotePath
from shards.schema import Record

log = logging.getLogger("cellpair")

CLAIM_SUFFIX: Final = ".claim"
HEARTBEAT_S = 20.0
STALE_S = 120.0
_POLL_S = 2.0
_TELL_S = 60.0


class Claim(Record):
    """Who works on an artifact, and how often that was said."""

    owner: Owner
    beat: int


@contextmanager
def claimed(place: RemotePath, what: str) -> Iterator[None]:
    """Hold the claim at `place`, waiting for whoever has it; it is removed on leaving.

    Who is waited for is logged, with `what` it is about. One thread of a process asks for a claim
    at a time, as one lock of this machine sees to.
    """
    mine = Claim(owner=this_process(), beat=0)
    _acquire(place, mine, what)
    stop = threading.Event()
    heart = threading.Thread(target=_beat, args=(place, mine.owner, stop), daemon=True)
    heart.start()
    try:
        yield
    finally:
        stop.set()
        heart.join()
        _let_go(place, mine.owner)


def read_claim(place: RemotePath) -> Claim | None:
    """The claim there; None where there is none, or one that can't be read."""
    try:
        return Claim.model_validate_json(place.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _acquire(place: RemotePath, mine: Claim, what: str) -> None:
    seen: Claim | None = None
    since_s, told_s = time.monotonic(), float("-inf")
    while not place.create(mine.model_dump_json().encode()):
        now_s, found = time.monotonic(), read_claim(place)
        if found != seen:
            seen, since_s = found, now_s
        # One of this process is of an earlier try, which could not remove it: see `_let_go`.
        gone = found is not None and (found.owner == mine.owner or is_dead(found.owner))
        if gone or now_s - since_s >= STALE_S:
            log.warning("%s: taken over from a process that is gone", what)
            place.write_bytes(mine.model_dump_json().encode())
            time.sleep(_POLL_S)  # another may do the same: who wrote last has it
            if read_claim(place) == mine:
                return
            continue
        if now_s - told_s >= _TELL_S:
            told_s = now_s
            who = "another process" if found is None else f"process {found.owner.pid}"
            where = "" if found is None else f" on {found.owner.host.split()[0]}"
            log.warning("%s: waiting for %s%s, which works on it", what, who, where)
        time.sleep(_POLL_S)


def _beat(place: RemotePath, owner: Owner, stop: threading.Event) -> None:
    beat = 0
    while not stop.wait(HEARTBEAT_S):
        beat += 1
        try:
            found = read_claim(place)
            if found is None or found.owner != owner:  # taken over
                return
            place.write_bytes(Claim(owner=owner, beat=beat).model_dump_json().encode())
        except OSError as error:  # the work itself will say more
            log.debug("%s: %s", place, error)


def _let_go(place: RemotePath, owner: Owner) -> None:
    try:
        found = read_claim(place)
        if found is not None and found.owner == owner:
            place.parent.remove([place.name])
    except OSError as error:  # a claim that stays is taken over by the next
        log.debug("%s: %s", place, error)
