"""What an error means to a person at the prompt, and to whoever reads the exit code."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from shards.errors import BadInput, BadInputs

DONE, FAULTS_FOUND, BAD_INPUT, STOPPED = 0, 1, 2, 3

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_SUCH_PLACE = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
# What was expected and what to do, by what the system refuses.
_REFUSALS = (
    (
        _DISK_FULL,
        "room to write on the disk",
        "free space and run the same command again; what was made is kept",
    ),
    (
        _REFUSED,
        "a place that this user may read, and write to where it is an output",
        "change its permissions, or name another place; then run the same command again",
    ),
    (_NO_SUCH_PLACE, "a folder or a file, each where the command needs one", "mend the path"),
)

_SECRET_OF_URL = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#\"']*@")


def exit_code_of(error: BaseException) -> int:
    """2 for what the user can mend in the command or its files, 3 for a stop, else 1."""
    if isinstance(error, KeyboardInterrupt | BrokenPipeError):
        return STOPPED
    if isinstance(error, BadInput | BadInputs):
        return BAD_INPUT
    if isinstance(error, OSError) and error.errno in (*_REFUSED, *_NO_SUCH_PLACE):
        return BAD_INPUT
    return FAULTS_FOUND


def words_of(error: BaseException, within: Path | None = None) -> str:
    """The error in words: where, what was expected, what was found, what to do.

    `within` is the folder that is written to: of a file that was open already the system says no
    name. Of URLs in it the name and the password before the host are left out.
    """
    return _SECRET_OF_URL.sub(r"\1***@", _words_of(error, within))


def _words_of(error: BaseException, within: Path | None) -> str:
    if isinstance(error, BadInput | BadInputs):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped; run the same command again to go on"
    if isinstance(error, MemoryError):
        return f"not enough memory: run the same command again with fewer --workers. {error}"
    if isinstance(error, OSError):
        for numbers, expected, remedy in _REFUSALS:
            if error.errno in numbers:
                names = [str(n) for n in (error.filename, error.filename2) if n is not None]
                unnamed = "a file that the system does not name"
                if within is not None:
                    unnamed += f", below {within}"
                where = " -> ".join(names) or unnamed
                found = error.strerror or str(error)
                return str(BadInput(where, expected=expected, found=found, remedy=remedy))
    return f"{type(error).__name__}: {error}"
