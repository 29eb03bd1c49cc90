"""What each curation reused and rebuilt: `OUT/history.jsonl`, one line appended a curation."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints, ValidationError

from shards.schema import Record

log = logging.getLogger("cellpair")

HISTORY_FILE: Final = "history.jsonl"
SCHEMA_VERSION: Final = 1

UtcTime = Annotated[
    str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)$")
]


class StageHistory(Record):
    """One artifact that a curation needed: found (`reused`) or made, and the time that took."""

    run: str
    stage: str
    fingerprint: str
    reused: bool
    seconds: float = Field(ge=0)


class HistoryEntry(Record):
    """One curation: when, how long, by which version, what it published, what it did.

    `started` is ISO 8601 in UTC. `dataset` is the fingerprint of the dataset it published, or null
    where it published none. `failures` names the kind of the exception by run; its message may
    hold folders of the machine and stays in the log.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    started: UtcTime
    seconds: float = Field(ge=0)
    cellpair: str
    dataset: str | None
    failures: dict[str, str]
    stages: tuple[StageHistory, ...]


def append_history(out: Path, entry: HistoryEntry) -> None:
    """Append one line to `out/history.jsonl`, in one write, synced; the folder is made.

    Two curations of one folder may append at once. A last line that a killed process left torn is
    ended first, so that it spoils no line but itself. Raises OSError where the disk is full.
    """
    out.mkdir(parents=True, exist_ok=True)
    line = f"{entry.model_dump_json()}\n".encode()
    fd = os.open(out / HISTORY_FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        n_bytes = os.fstat(fd).st_size
        if n_bytes and os.pread(fd, 1, n_bytes - 1) != b"\n":
            line = b"\n" + line
        if os.write(fd, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out / HISTORY_FILE))
        os.fsync(fd)
    finally:
        os.close(fd)


def read_history(out: Path) -> list[HistoryEntry]:
    """The curations of a folder, oldest first; none where there was none yet.

    A line that is no entry (torn by a kill, or of another version) is told by the log and left out.
    """
    path = out / HISTORY_FILE
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            entries.append(HistoryEntry.model_validate_json(line))
        except ValidationError:
            log.warning("%s, line %d: torn or of another version; left out", path, number)
    return entries
