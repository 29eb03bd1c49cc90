"""The charts of the pages: figures without any global state."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_SIZE_IN = (4.3, 2.5)
_COLOURS = ("#2f6f9f", "#c2703d", "#5a8f5a", "#8a6bb0")
_INK, _FAINT = "#3a4149", "#c9ced4"
_MAP = "viridis"
_N_BINS = 40
# The last bin takes what lies beyond, or one cell of 9,000 counts would squeeze all others.
_TAIL_PERCENTILE = 99.5
_BEYOND, _UNKNOWN = "#d6322c", "#9aa3ab"

Values = npt.NDArray[np.float64]


def histogram(
    values: Values,
    xlabel: str,
    *,
    limits: tuple[float, float] | None = None,
    mark: tuple[float, str] | None = None,
    of: str = "cells",
) -> Figure:
    """Cells, or what `of` names, by value; the last bin takes half a percent without `limits`.

    `mark` is a value to draw a line at, and its name.
    """
    figure, axes = _axes(xlabel, of)
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
            xytext=(0, 2),  # above the bars, which the words would hide among
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


def bars(values: Values, xlabel: str, ylabel: str) -> Figure:
    """One bar a value, numbered from 1."""
    figure, axes = _axes(xlabel, ylabel)
    axes.bar(np.arange(1, len(values) + 1), values, color=_COLOURS[0], width=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0.4, len(values) + 0.6)
    return figure


def square_map(
    values: Values,
    corner_um: tuple[float, float],
    edge_um: float,
    label: str,
    limits: tuple[float, float],
) -> Figure:
    """(rows, columns) values of squares, the first at `corner_um` (x, y), as the slide lies.

    Squares without a value (NaN) stay empty.
    """
    figure, _ = _map(values, corner_um, edge_um, label, limits)
    return figure


def arrow_map(
    vectors_um: Values, corner_um: tuple[float, float], edge_um: float, label: str
) -> Figure:
    """(rows, columns, 2) vectors (x, y) of squares as arrows, on squares of their length's colour.

    Arrows are magnified, so that the longest is as long as a square.
    """
    length_um = np.linalg.norm(vectors_um, axis=2)
    known = np.isfinite(length_um)
    longest_um = float(length_um[known].max())
    figure, axes = _map(length_um, corner_um, edge_um, label, (0.0, max(1.0, longest_um)))
    row, column = np.nonzero(known)
    axes.quiver(
        (corner_um[0] + (column + 0.5) * edge_um) / 1000,
        (corner_um[1] + (row + 0.5) * edge_um) / 1000,
        *vectors_um[known].T,
        pivot="middle",
        angles="xy",  # y points down, and so do the arrows
        scale_units="x",
        scale=max(longest_um, 1e-6) / (edge_um / 1000),
        width=0.008,
        headwidth=4,
        color="white",
        edgecolor=_INK,
        linewidth=0.4,
    )
    return figure


def cell_map(points_um: Values, values: Values, label: str, limit: float, beyond: str) -> Figure:
    """(n, 2) positions of cells, as the slide lies, coloured by their values from 0 to `limit`.

    Those above are marked, and named `beyond` in the key; those without a value (NaN) are grey.
    """
    width_um, height_um = np.maximum(np.ptp(points_um, axis=0), 1.0)
    height_in = float(np.clip(5.6 * height_um / width_um + 0.6, 2.6, 7.0))
    figure = Figure(figsize=(6.6, height_in), layout="constrained")
    axes = figure.add_subplot()
    # As wide as the distance between cells, within what is seen and what does not hide others.
    room_pt = 72 * min(5.6 / width_um, height_in / height_um)
    size_pt = float(np.clip(0.8 * room_pt * np.sqrt(width_um * height_um / len(values)), 1.0, 6.0))
    x_mm, y_mm = points_um.T / 1000
    known, above = np.isfinite(values), values > limit
    axes.scatter(x_mm[~known], y_mm[~known], s=size_pt**2, c=_UNKNOWN, linewidths=0)
    within = known & ~above
    drawn = axes.scatter(
        x_mm[within],
        y_mm[within],
        s=size_pt**2,
        c=values[within],
        cmap=_MAP,
        vmin=0.0,
        vmax=limit,
        linewidths=0,
    )
    if above.any():
        axes.scatter(x_mm[above], y_mm[above], s=size_pt**2, c=_BEYOND, linewidths=0, label=beyond)
        figure.legend(
            loc="outside upper left",
            fontsize=8,
            frameon=False,
            labelcolor=_INK,
            markerscale=7.0 / size_pt,
        )
    _dress_map(figure, axes, drawn, label)
    return figure


def _map(
    values: Values,
    corner_um: tuple[float, float],
    edge_um: float,
    label: str,
    limits: tuple[float, float],
) -> tuple[Figure, Axes]:
    rows, columns = values.shape
    # As tall as the section asks for, within what a page can hold beside other charts.
    height_in = float(np.clip(3.3 * rows / columns + 0.4, 1.8, 4.6))
    figure = Figure(figsize=(_SIZE_IN[0], height_in), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.pcolormesh(
        (corner_um[0] + np.arange(columns + 1) * edge_um) / 1000,
        (corner_um[1] + np.arange(rows + 1) * edge_um) / 1000,
        np.ma.masked_invalid(values),
        cmap=_MAP,
        vmin=limits[0],
        vmax=limits[1],
    )
    _dress_map(figure, axes, drawn, label)
    return figure, axes


def _dress_map(figure: Figure, axes: Axes, drawn: ScalarMappable, label: str) -> None:
    """Millimetres as the slide lies, with the scale of the colours."""
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.set_facecolor("#eceff2")
    axes.set_xlabel("mm on the slide", fontsize=8, color=_INK)
    axes.tick_params(labelsize=7, colors=_INK, length=3)
    axes.spines[:].set_color(_FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    bar = figure.colorbar(drawn, ax=axes, shrink=0.9, pad=0.02)
    bar.set_label(label, fontsize=8, color=_INK)
    bar.ax.tick_params(labelsize=7, colors=_INK, length=3)


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
