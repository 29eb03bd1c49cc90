"""What passes between the pipeline and who calls it: built artifacts, the caller, the map."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

from flows.config import RunConfig
from flows.transient import persistently

Stage = Literal["registration", "nuclei", "cells", "patches", "shards"]


class Call(Protocol):
    """Runs one stage of one run: directly, or as a task of some framework."""

    def __call__(self, name: str, make: Callable[[], Built]) -> Built: ...


class Blocks(Protocol):
    """Maps a pure function over blocks; `on_gpu` for those that run a network."""

    def __call__(self, fn: Any, items: Any) -> Any: ...

    def on_gpu(self, fn: Any, items: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Built:
    """One artifact of one run, made now or found, in `seconds`."""

    run: str
    stage: Stage
    folder: Path
    fingerprint: str
    reused: bool
    summary: dict[str, Any]
    seconds: float


@dataclass(frozen=True, slots=True)
class CuratedRun:
    """All artifacts of one run, by stage; what is read of them, and of its files, is read inside
    `at_hand`.

    `withdrawn` are the donors that are left out of a run with several.
    """

    config: RunConfig
    built: dict[Stage, Built]
    withdrawn: tuple[str, ...] = ()
    at_hand: Callable[[], AbstractContextManager[None]] = nullcontext


@cache
def cellpair_version() -> str:
    """Of this installation; read once, since every artifact that is looked for tells it."""
    return version("cellpair")


def direct(name: str, make: Callable[[], Built]) -> Built:
    """The caller without a framework; after an error that may pass the stage is tried again."""
    return persistently(make)
