"""The page of a segmentation: how many nuclei, where, how large, and where something failed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from flows.report import charts
from flows.report.embed import chart_uri, jpeg_uri
from flows.report.render import write_page
from pairing.slide import Damage, Slide
from segmentation.segment import Segmented

PAGE_FILE = "index.html"
_PICTURE_PX = 1000
_MAX_ACROSS = 60
_NICE_UM = (50.0, 100.0, 200.0, 250.0, 500.0, 1000.0, 2000.0)
_LARGEST_UM2 = 200.0


@dataclass(frozen=True, slots=True)
class NucleiPage:
    """All that the template prints; charts are data URIs."""

    slide: str
    mpp: float
    device: str
    n_nuclei: int
    n_windows: int
    n_blocks: int
    n_empty_blocks: int
    tissue_mm2: float
    median_area_um2: float | None
    median_score: float | None
    n_by_flag: dict[str, int]
    damage: tuple[Damage, ...]
    picture: str
    edge_um: float
    charts: dict[str, str]


def write_nuclei_page(page: Path, nuclei: Path, slide: Slide, done: Segmented) -> None:
    """Write the page about the table `nuclei` of a slide; the same nuclei give the same bytes."""
    columns = ["x_px", "y_px", "area_um2", "haematoxylin", "score", "flags"]
    table = pq.read_table(nuclei, columns=columns)
    xy_um = np.column_stack([table[name].to_numpy() for name in ("x_px", "y_px")]) * slide.mpp
    area_um2, score = table["area_um2"].to_numpy(), table["score"].to_numpy()
    edge_um, figures = _maps(xy_um, table, done, slide)
    if len(table):
        figures["area"] = chart_uri(
            charts.histogram(area_um2, "area, µm²", limits=(0.0, _LARGEST_UM2), of="nuclei")
        )
        figures["score"] = chart_uri(
            charts.histogram(score, "score", limits=(0.5, 1.0), of="nuclei")
        )
    flags = table["flags"].combine_chunks().flatten().to_pylist()
    stride_um = done.grid.stride_px * done.grid.mpp
    write_page(
        page,
        "nuclei.html",
        page=NucleiPage(
            slide=slide.path.name,
            mpp=done.grid.mpp,
            device=done.device,
            n_nuclei=len(table),
            n_windows=done.n_windows,
            n_blocks=len(done.blocks),
            n_empty_blocks=_n_empty_blocks(xy_um / done.grid.mpp, done),
            tissue_mm2=done.n_windows * stride_um**2 / 1e6,
            median_area_um2=float(np.median(area_um2)) if len(table) else None,
            median_score=float(np.median(score)) if len(table) else None,
            n_by_flag={name: flags.count(name) for name in ("damaged_tile", "edge")},
            damage=done.damage,
            picture=_picture(slide),
            edge_um=edge_um,
            charts=figures,
        ),
    )


def _n_empty_blocks(xy: npt.NDArray[np.float64], done: Segmented) -> int:
    """Blocks that show tissue and own no nucleus; `xy` in the network's pixels."""
    n_empty = 0
    for block in done.blocks:
        x0, y0, x1, y1 = block.core
        inside = (xy[:, 0] >= x0) & (xy[:, 0] < x1) & (xy[:, 1] >= y0) & (xy[:, 1] < y1)
        n_empty += not inside.any()
    return n_empty


def _maps(
    xy_um: npt.NDArray[np.float64], table: pa.Table, done: Segmented, slide: Slide
) -> tuple[float, dict[str, str]]:
    """Nuclei per mm² and their mean haematoxylin by square; squares without a nucleus are empty."""
    size_um = np.array(slide.size_px) * slide.mpp
    wanted_um = float(size_um.max()) / _MAX_ACROSS
    edge_um = next((e for e in _NICE_UM if e >= wanted_um), wanted_um)
    across, down = (int(n) for n in np.ceil(size_um / edge_um))
    square = (xy_um[:, 1] // edge_um).astype(np.int64) * across + (xy_um[:, 0] // edge_um).astype(
        np.int64
    )
    n = np.bincount(square, minlength=across * down).astype(np.float64)
    amount = np.bincount(square, weights=table["haematoxylin"].to_numpy(), minlength=across * down)
    n[n == 0] = np.nan
    figures = {}
    if len(xy_um):
        density, mean = (v.reshape(down, across) for v in (n / (edge_um / 1000) ** 2, amount / n))
        for name, values, label in (
            ("density", density, "nuclei per mm²"),
            ("haematoxylin", mean, "mean haematoxylin"),
        ):
            limits = (0.0, float(np.nanmax(np.abs(values))))
            figures[name] = chart_uri(charts.square_map(values, (0.0, 0.0), edge_um, label, limits))
    return edge_um, figures


def _picture(slide: Slide) -> str:
    width, height = slide.size_px
    mpp = max(width, height) * slide.mpp / _PICTURE_PX
    size = [max(1, round(n * slide.mpp / mpp)) for n in (width, height)]
    rgb = slide.read_at((0, 0, size[0], size[1]), mpp)
    return jpeg_uri(rgb)
