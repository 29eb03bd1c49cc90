"""Where the log goes: a file a run and one for the rest, each line with its run and stage."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

log = logging.getLogger("cellpair")

LOGS_FOLDER = "logs"
REST_FILE = "curate.log"

_run: ContextVar[str] = ContextVar("run", default="")
_stage: ContextVar[str] = ContextVar("stage", default="")


@contextmanager
def working_on(run: str, stage: str = "") -> Iterator[None]:
    """Lines logged inside, by whatever code, are of this run and stage."""
    run_token, stage_token = _run.set(run), _stage.set(stage)
    try:
        yield
    finally:
        _stage.reset(stage_token)
        _run.reset(run_token)


def at_work() -> str:
    """Run and stage of the moment, as `run stage`, or an empty text."""
    return " ".join(filter(None, (_run.get(), _stage.get())))


@contextmanager
def logged_to(out: Path) -> Iterator[None]:
    """Append what is logged to `out/logs/<run>.log`, and what is of no run to `curate.log`."""
    handler = _Files(out / LOGS_FOLDER)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


_MAX_OPEN = 32


class _File(logging.FileHandler):
    """A log that a full disk ends with one line on stderr: the work itself says more."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        print(f"cellpair: {self.baseFilename}: no longer written: {error}", file=sys.stderr)
        self.setLevel(logging.CRITICAL + 1)


class _Files(logging.Handler):
    """One file a run, opened at its first line; of many runs the newest are open."""

    def __init__(self, folder: Path) -> None:
        super().__init__(logging.INFO)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._files: dict[str, logging.FileHandler] = {}
        formatter = logging.Formatter(
            "%(asctime)sZ %(levelname)s [%(at_work)s] %(message)s", "%Y-%m-%dT%H:%M:%S"
        )
        formatter.converter = time.gmtime
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        run = _run.get()
        record.at_work = at_work() or "curate"
        if run not in self._files:
            path = self._folder / (f"{run}.log" if run else REST_FILE)
            file = _File(path, encoding="utf-8", errors="backslashreplace")
            file.setFormatter(self.formatter)
            self._files[run] = file
            if len(self._files) > _MAX_OPEN:  # runs come by the hundred, open files do not
                self._files.pop(next(iter(self._files))).close()
        if record.levelno >= self._files[run].level:
            self._files[run].emit(record)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        super().close()
