"""The charts of the pages: figures without any global state."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_SIZE_IN = (4.3, 2.5)
_COLOURS = ("#2f6f9f", "#c2703d", "#5a8f5a", "#8a6bb0")
_INK, _FAINT = "#3a4149", "#c9ced4"
_N_BINS = 40
# The last bin takes what lies beyond, or one cell of 9,000 counts would squeeze all others.
_TAIL_PERCENTILE = 99.5

Values = npt.NDArray[np.float64]


def histogram(
    values: Values,
    xlabel: str,
    *,
    limits: tuple[float, float] | None = None,
    mark: tuple[float, str] | None = None,
) -> Figure:
    """Cells by value; without `limits` from 0 to where the last half percent is one bin.

    `mark` is a value to draw a line at, and its name.
    """
    figure, axes = _axes(xlabel, "cells")
    low, high = limits or (0.0, float(max(np.percentile(values, _TAIL_PERCENTILE), 1.0)))
    if limits is None and np.all(values == np.round(values)):
        # Whole numbers get bins of a whole width, or every other bin of few values is empty.
        width = max(1, round((high - low) / _N_BINS))
        edges = np.arange(low, high + width + 1, width) - 0.5
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        edges = np.linspace(low, high, _N_BINS + 1)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.hist(np.clip(values, edges[0], edges[-1]), bins=edges.tolist(), color=_COLOURS[0])
    if mark is not None:
        axes.axvline(mark[0], color=_COLOURS[1], linewidth=1.2)
        axes.annotate(
            mark[1],
            (mark[0], 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -9),
            textcoords="offset points",
            fontsize=7,
            color=_COLOURS[1],
        )
    axes.set_xlim(edges[0], edges[-1])
    return figure


def ranked(values: Values, xlabel: str, ylabel: str) -> Figure:
    """Positive values from the largest down, on a logarithmic axis."""
    figure, axes = _axes(xlabel, ylabel)
    positive = np.sort(values[values > 0])[::-1]
    axes.plot(np.arange(1, len(positive) + 1), positive, color=_COLOURS[0], linewidth=1.4)
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def curves(
    series: Mapping[str, tuple[Values, Values]], xlabel: str, ylabel: str, *, log: bool = False
) -> Figure:
    """Named lines, each of (x, y)."""
    figure, axes = _axes(xlabel, ylabel)
    for (name, (x, y)), colour in zip(series.items(), _COLOURS, strict=False):
        few = len(x) < 25
        axes.plot(
            x, y, color=colour, linewidth=1.3, label=name, marker="." if few else "", markersize=4
        )
    if len(series) > 1:
        axes.legend(fontsize=7, frameon=False)
    if log:
        axes.set_yscale("log")
    return figure


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE_IN, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel, fontsize=8, color=_INK)
    axes.set_ylabel(ylabel, fontsize=8, color=_INK)
    axes.tick_params(which="both", labelsize=7, colors=_INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.grid(axis="y", color=_FAINT, linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    return figure, axes
