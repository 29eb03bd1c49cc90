"""A figure that simulated and real data are both measured by, and its line in the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
QUANTILES = (5, 50, 95)
# Below this many values a figure is one number a source, not a distribution.
MIN_VALUES = 20


@dataclass(frozen=True, slots=True)
class Figure:
    """Values of one figure by simulated donor and by real source."""

    name: str
    simulated: dict[str, F64]
    real: dict[str, F64] = field(default_factory=dict)
    log: bool = False  # spans decades

    @property
    def is_distribution(self) -> bool:
        return all(len(values) >= MIN_VALUES for values in self.simulated.values())


def summary(values: F64) -> str:
    """`median [5 % to 95 %]`, the whole range where there are few values."""
    if len(values) < MIN_VALUES:
        low, middle, high = values.min(), np.median(values), values.max()
    else:
        low, middle, high = np.percentile(values, QUANTILES)
    return f"{middle:.3g}" if low == high else f"{middle:.3g} [{low:.3g} to {high:.3g}]"


def table(figures: Sequence[Figure]) -> str:
    """Markdown: a row for each figure and real source."""
    lines = [
        "| figure | simulated | real | source | n | simulated / real |",
        "|---|---|---|---|---|---|",
    ]
    for figure in figures:
        ours = np.concatenate(list(figure.simulated.values()))
        for source, theirs in figure.real.items():
            middle = np.median(theirs)
            ratio = f"{np.median(ours) / middle:.2f}" if middle else "–"
            lines.append(
                f"| {figure.name} | {summary(ours)} | {summary(theirs)} | {source} | {len(theirs)} "
                f"| {ratio} |"
            )
        if not figure.real:
            lines.append(f"| {figure.name} | {summary(ours)} | – | – | – | – |")
    return "\n".join(lines)
