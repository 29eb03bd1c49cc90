"""Ctrl-C and SIGTERM: the first ends the work in order, the second at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from flows.failures import STOPPED

# SIGHUP is what a closed terminal sends.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TOLD = b"cellpair: stopping; Ctrl-C again ends at once\n"


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Inside, the first signal to stop raises KeyboardInterrupt, the second ends the process.

    Signals that the process was started to ignore (nohup, a shell's background) stay ignored.
    """
    before = {s: signal.getsignal(s) for s in _SIGNALS if signal.getsignal(s) != signal.SIG_IGN}

    def stop(signum: int, frame: FrameType | None) -> None:
        for s in before:
            signal.signal(s, end_at_once)
        # print may be what was interrupted, and is not to be entered twice.
        os.write(2, _TOLD)
        raise KeyboardInterrupt

    for s in before:
        signal.signal(s, stop)
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def end_at_once(signum: int, frame: FrameType | None) -> None:
    """Ends this process; children that watch it end with it, and what they made so far is kept."""
    os._exit(STOPPED)
