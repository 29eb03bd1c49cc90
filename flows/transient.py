"""The errors that are worth another try: an allow-list, so that bad input fails at once."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

log = logging.getLogger("cellpair")

# The pauses before another try; after the last one the error stands.
PAUSES_S = (1.0, 10.0)

# What a network, a network file system or a busy machine says on a bad day. A full or read-only
# disk and missing rights stay as they are until somebody acts, so they are not among them.
_TRANSIENT_ERRNOS = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.EAGAIN,
        errno.ETIMEDOUT,
        errno.ENOTCONN,  # a FUSE mount whose server is gone
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ECONNABORTED,
    }
)


def is_transient(error: BaseException) -> bool:
    """Whether the same work may well succeed on another try.

    True for lost connections, timeouts, OSErrors of the network and of its file systems, and for
    lost Dask workers; also where such an error is the `__cause__` of another one, or its cause's.
    """
    return any(_is_transient_itself(link) for link in _chain(error))


def _is_transient_itself(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    # A second of import that only a failure costs.
    from distributed import KilledWorker
    from distributed.client import FutureCancelledError
    from distributed.comm.core import CommClosedError
    from distributed.core import RPCClosed

    # Futures are cancelled by the loss of the scheduler; nobody cancels them by hand.
    return isinstance(error, KilledWorker | CommClosedError | RPCClosed | FutureCancelledError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def persistently(make: Callable[[], T]) -> T:
    """`make()`, tried again after a pause where its error is transient."""
    n_tries = 0
    while True:
        try:
            return make()
        except OSError as error:  # lost connections and timeouts are among these
            pause_or_raise(error, n_tries)
            n_tries += 1


def pause_or_raise(error: BaseException, n_tries: int) -> None:
    """Sleep before the next try, or raise the error where none would help or all are used up."""
    if n_tries == len(PAUSES_S) or not is_transient(error):
        raise error
    log.warning("%s: %s; tried again in %.0f s", type(error).__name__, error, PAUSES_S[n_tries])
    time.sleep(PAUSES_S[n_tries])
