"""Figures beside their limits, and whether all are met."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Sign = Literal["≤", "≥"]


@dataclass(slots=True)
class Limits:
    """Prints a line for each figure; `met` until one is beyond its limit."""

    met: bool = True

    def head(self, title: str) -> None:
        print(f"\n| {title} | measured | limit | |\n|---|---|---|---|", flush=True)

    def line(self, what: str, value: float, sign: Sign, limit: float) -> None:
        # What is not a number meets nothing.
        kept = value <= limit if sign == "≤" else value >= limit
        self.met &= bool(kept)
        print(f"| {what} | {_text(value)} | {sign} {limit} | {'ok' if kept else 'NOT MET'} |")

    def none(self, what: str, bad: list[str], of: int) -> None:
        """That nothing of `of` is bad; what is bad is named."""
        self.met &= not bad
        verdict = "ok" if not bad else f"NOT MET: {', '.join(bad)}"
        print(f"| {what} | {len(bad)} of {of} | 0 | {verdict} |", flush=True)

    def told(self, what: str, value: str) -> None:
        """A figure without a limit."""
        print(f"| {what} | {value} | – | |", flush=True)


def _text(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def counted(names: Iterable[str]) -> str:
    """`17 pass, 3 doubtful`."""
    values, counts = np.unique(list(names), return_counts=True)
    return ", ".join(f"{n} {value}" for value, n in zip(values, counts, strict=True))
