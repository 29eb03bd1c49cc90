"""How work over a slide is handed out: what a map must do, and the one that does all in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from shards.artifact import Items

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class Tasks(Generic[A]):
    """Items that are all there, and what they are called where progress is told."""

    items: Sequence[A]
    what: str

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[A]:
        return iter(self.items)


class Maps(Protocol):
    """Runs functions over items anywhere, in any order; `on_gpu` where a GPU is, if one is."""

    def __call__(self, fn: Callable[[A], B], items: Items[A], /) -> Iterable[B]: ...

    def on_gpu(self, fn: Callable[[A], B], items: Items[A], /) -> Iterable[B]: ...


class InTurn:
    """One item after the other, in this process."""

    def __call__(self, fn: Callable[[A], B], items: Items[A], /) -> Iterable[B]:
        return map(fn, items)

    on_gpu = __call__
