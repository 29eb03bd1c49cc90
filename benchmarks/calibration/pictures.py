"""Histograms of every distribution, and tissue at one scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure as Canvas

from benchmarks.calibration.figures import F64, Figure
from benchmarks.calibration.slides import MPP, Rgb

N_COLUMNS = 4
CROP_UM = 200.0


def draw_histograms(path: Path, figures: Sequence[Figure], with_real: bool) -> None:
    """A PNG: each simulated donor as a thin line, each real source as a thick one."""
    shown = [f for f in figures if f.is_distribution]
    n_rows = -(-len(shown) // N_COLUMNS)
    canvas = Canvas(figsize=(4 * N_COLUMNS, 3 * n_rows), layout="constrained")
    for axes, figure in zip(
        canvas.subplots(n_rows, N_COLUMNS, squeeze=False).ravel(), shown, strict=False
    ):
        everything = list(figure.simulated.values())
        real = {k: v for k, v in figure.real.items() if with_real and len(v) > 1}
        everything += list(real.values())
        low, high = np.percentile(np.concatenate(everything), (0.5, 99.5))
        if figure.log:
            low = max(low, 1.0)
            edges = np.geomspace(low, high, 60)
            axes.set_xscale("log")
        else:
            edges = np.linspace(low, high, 60)
        for values in figure.simulated.values():
            axes.stairs(_density(values, edges), edges, color="tab:blue", linewidth=0.8)
        for k, (name, values) in enumerate(real.items()):
            axes.stairs(
                _density(values, edges), edges, color=f"C{k + 1}", linewidth=1.8,
                label=f"{name} (n = {len(values)})",
            )  # fmt: skip
        axes.set_title(figure.name, fontsize=9)
        axes.set_yticks([])
        if real:
            axes.legend(fontsize=6)
    for axes in canvas.axes[len(shown) :]:
        axes.set_axis_off()
    canvas.savefig(path, dpi=80)


def _density(values: F64, edges: F64) -> F64:
    return np.histogram(values, edges)[0] / max(len(values), 1)


def draw_crops(path: Path, slides: dict[str, Rgb]) -> None:
    """A PNG: the windows with most tissue of slides at MPP, at one scale."""
    side = round(CROP_UM / MPP)
    canvas = Canvas(figsize=(4 * len(slides), 4), layout="constrained")
    rows = canvas.subplots(1, len(slides), squeeze=False).ravel()
    for axes, (name, rgb) in zip(rows, slides.items(), strict=True):
        corners = [
            (y, x)
            for y in range(0, rgb.shape[0] - side + 1, side // 2)
            for x in range(0, rgb.shape[1] - side + 1, side // 2)
        ]
        y, x = min(corners, key=lambda c: float(rgb[c[0] : c[0] + side, c[1] : c[1] + side].mean()))
        axes.imshow(rgb[y : y + side, x : x + side])
        axes.set_title(f"{name}, {CROP_UM:g} µm", fontsize=9)
        axes.set_axis_off()
    canvas.savefig(path, dpi=70)
