"""What the system is told of how files are read, where it can be told; no byte hangs on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_CAN_BE_TOLD: Final = hasattr(os, "posix_fadvise")  # macOS has none
# Linux fetches as much for one call as it reads ahead of a reader, and forgets the rest: 128 kB
# where nobody has set another, https://docs.kernel.org/admin-guide/abi-stable.html (read_ahead_kb).
_FETCHED_BYTES: Final = 128 * 2**10


def will_need(file: int, start: int, end: int) -> None:
    """These bytes of an open file are read soon: fetch them without waiting to be asked."""
    if _CAN_BE_TOLD:
        for piece in range(start, end, _FETCHED_BYTES):
            n_bytes = min(_FETCHED_BYTES, end - piece)
            os.posix_fadvise(file, piece, n_bytes, os.POSIX_FADV_WILLNEED)


def here_and_there(file: int) -> None:
    """Reads of an open file are not followed by what lies behind them: fetch no more than asked."""
    if _CAN_BE_TOLD:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)


def not_soon(path: Path) -> None:
    """A file that was written and synced is not read soon: its memory is better used."""
    if _CAN_BE_TOLD:
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
