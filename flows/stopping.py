"""Ctrl-C and SIGTERM: the first ends the work in order, the second, or a long wait, at once.

What is made is published whole or not at all, so that ending at once harms nothing.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import NoReturn

from flows.failures import STOPPED, words_of

# SIGHUP is what a closed terminal sends.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stopping_on_signals(within_s: float) -> Iterator[None]:
    """Inside, the first signal to stop raises KeyboardInterrupt; the next one ends the process.

    So does the time `within_s` since the first: libraries may hold on, or swallow the interrupt.
    Signals that the process was started to ignore (nohup, a shell's background) stay ignored.
    """
    before = {s: signal.getsignal(s) for s in _SIGNALS if signal.getsignal(s) != signal.SIG_IGN}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    watch = threading.Thread(target=_watch, args=(reading, within_s), daemon=True)
    watch.start()
    for s in before:
        signal.signal(s, _interrupt)
    # Python writes the number of each signal there at once, whatever the main thread is busy with.
    wakeup_before = signal.set_wakeup_fd(writing)
    unraisable_before = sys.unraisablehook
    sys.unraisablehook = partial(_swallowed, unraisable_before)
    try:
        yield
    finally:
        sys.unraisablehook = unraisable_before
        signal.set_wakeup_fd(wakeup_before)
        for s, handler in before.items():
            signal.signal(s, handler)
        os.close(writing)
        watch.join()
        os.close(reading)


def end_at_once() -> NoReturn:
    """Ends this process and its workers, with words and exit code 3, whatever they are at.

    Nothing that Python runs at its end is waited for: of a cluster that takes 10 s and pages of
    complaints.
    """
    for child in multiprocessing.active_children():
        child.kill()
    # Not by print, which may be what was interrupted.
    os.write(2, f"cellpair: {words_of(KeyboardInterrupt())}\n".encode())
    os._exit(STOPPED)


def done_with(code: int) -> None:
    """From now on a signal to stop ends this process at once, with the code of what it has done.

    Libraries take their second to end, or hold on; the work is done, and no signal undoes it.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(code)

    for s in _SIGNALS:
        if signal.getsignal(s) != signal.SIG_IGN:
            signal.signal(s, end)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    for s in _SIGNALS:  # the watch ends the process at the next
        signal.signal(s, lambda signum, frame: None)
    # What Dask has to say of workers that are stopped at their work.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    raise KeyboardInterrupt


def _swallowed(
    otherwise: Callable[[sys.UnraisableHookArgs], object], unraisable: sys.UnraisableHookArgs
) -> None:
    """Ends the process where the interrupt fell into a finalizer: Python would go on without it."""
    if unraisable.exc_type is KeyboardInterrupt:
        end_at_once()
    otherwise(unraisable)


def _watch(reading: int, within_s: float) -> None:
    """Ends the process at the second signal, or `within_s` after the first, until it is closed."""
    left_s = None
    while select.select([reading], [], [], left_s)[0]:
        numbers = os.read(reading, 64)
        if not numbers:
            return
        for number in numbers:
            if number in _SIGNALS:
                if left_s is not None:
                    end_at_once()
                left_s = within_s
                os.write(2, b"cellpair: stopping; Ctrl-C again ends at once\n")
    end_at_once()
