"""The nuclei of a slide as figures and charts: how many, where, how large, where there are none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from flows.report import charts
from flows.report.embed import chart_uri
from segmentation.config import SegmentationFacts

_MAX_ACROSS = 60
_NICE_UM = (50.0, 100.0, 200.0, 250.0, 500.0, 1000.0, 2000.0)
_AREAS_UM2 = (0.0, 200.0)


@dataclass(frozen=True, slots=True)
class NucleiParts:
    """All that `ui.nuclei_parts` prints; charts are data URIs, none without a nucleus."""

    facts: SegmentationFacts
    median_area_um2: float | None
    median_score: float | None
    n_by_flag: dict[str, int]
    edge_um: float
    charts: dict[str, str]


def nuclei_parts(
    nuclei: Path, facts: SegmentationFacts, size_px: tuple[int, int], slide_mpp: float
) -> NucleiParts:
    """Figures and charts of the table `nuclei` of a slide of `size_px`; same nuclei, same bytes."""
    columns = ["x_px", "y_px", "area_um2", "haematoxylin", "score", "flags"]
    table = pq.read_table(nuclei, columns=columns)
    x_um, y_um = (table[name].to_numpy() * slide_mpp for name in ("x_px", "y_px"))
    area_um2, score = table["area_um2"].to_numpy(), table["score"].to_numpy()
    size_um = np.array(size_px) * slide_mpp
    edge_um = _edge_um(float(size_um.max()))
    figures: dict[str, Figure] = {}
    if len(table):
        across, down = (int(n) for n in np.ceil(size_um / edge_um))
        square = (y_um // edge_um).astype(np.int64) * across + (x_um // edge_um).astype(np.int64)
        figures = {
            **_maps(square, table["haematoxylin"].to_numpy(), (down, across), edge_um),
            "area": charts.histogram(area_um2, "area, µm²", limits=_AREAS_UM2, of="nuclei"),
            "score": charts.histogram(score, "score", limits=(0.5, 1.0), of="nuclei"),
        }
    flags = table["flags"].combine_chunks().flatten().to_pylist()
    return NucleiParts(
        facts=facts,
        median_area_um2=float(np.median(area_um2)) if len(table) else None,
        median_score=float(np.median(score)) if len(table) else None,
        n_by_flag={name: flags.count(name) for name in ("damaged_tile", "edge")},
        edge_um=edge_um,
        charts={name: chart_uri(figure) for name, figure in figures.items()},
    )


def _edge_um(longest_um: float) -> float:
    wanted_um = longest_um / _MAX_ACROSS
    return next((edge for edge in _NICE_UM if edge >= wanted_um), wanted_um)


def _maps(
    square: npt.NDArray[np.int64],
    haematoxylin: npt.NDArray[np.float64],
    shape: tuple[int, int],
    edge_um: float,
) -> dict[str, Figure]:
    """Nuclei per mm² and their mean haematoxylin by square; squares without a nucleus are empty."""
    n = np.bincount(square, minlength=shape[0] * shape[1]).astype(np.float64)
    amount = np.bincount(square, weights=haematoxylin, minlength=len(n))
    n[n == 0] = np.nan
    maps = {}
    for name, values, label in (
        ("density", n / (edge_um / 1000) ** 2, "nuclei per mm²"),
        ("haematoxylin", amount / n, "mean haematoxylin"),
    ):
        limits = (0.0, float(np.nanmax(values)))
        maps[name] = charts.square_map(values.reshape(shape), (0.0, 0.0), edge_um, label, limits)
    return maps
