"""The errors that are worth another try: an allow-list, so that bad input fails at once."""

from __future__ import annotations

import errno
from collections.abc import Iterator

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
