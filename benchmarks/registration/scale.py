"""Time and memory of the registration from 0.1 to 1 cm² of tissue, slides at 0.2738 µm per pixel.

Tissue of the simulator repeats itself every 2.4 mm. Here one such square is painted and copied to
an outline, pixels and all, so that a slide of 1 cm² takes minutes instead of hours; the
instrument's frame is turned, mirrored and stretched instead of the slide's.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.registration.aligned import aligned
from benchmarks.registration.limits import Limits
from benchmarks.registration.pairs import Pair, Rgb, write_slide
from pairing.geometry import Affine
from pairing.simulate.donor import draw_stain
from pairing.simulate.fields import Outline
from pairing.simulate.pieces import draw_section
from pairing.simulate.render import Mounted, paint_he
from pairing.simulate.slide_map import SlideMap
from pairing.simulate.slide_map import Warp as Stretch
from pairing.simulate.tissue import PERIOD_UM, Tissue

F64 = npt.NDArray[np.float64]

AREAS_CM2 = (0.1, 0.3, 1.0)
MIN_CELLS = 200_000
MAX_S, MAX_GIB = 180.0, 4.0
MAX_UM = (0.5, 2.0)
SEED, WARP_UM = 1, 20.0
# The square in whole pixels of 0.2738 µm.
PERIOD_PX = 8766
MPP = PERIOD_UM / PERIOD_PX
# Of a section that holds the square whole.
_N_CELLS = 110_000
_MARGIN_UM = 300.0
_LOST = 0.07  # of the nuclei that the slide shows, the instrument misses
_RIM_UM = 5.0
_BLOCK_PX = 2048
_SQUARE, _NUCLEI = "scale-square.npy", "scale-square.parquet"


@dataclass(frozen=True, slots=True)
class Repeated:
    """The slide without holding it: the square again and again inside an outline, glass around.

    Read a band of rows at a time, as the writer of slides does.
    """

    square: Rgb
    outline: Outline
    middle_um: float

    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, int, int]:
        side = round(2 * self.middle_um / MPP)
        return side, side, 3

    def inside(self, x_um: npt.NDArray[Any], y_um: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        return np.asarray(self.outline.level(x_um - self.middle_um, y_um - self.middle_um) > 0)

    def __getitem__(self, rows: Any) -> Rgb:
        y = np.arange(*rows.indices(self.shape[0]))
        x = np.arange(self.shape[1])
        band: Rgb = self.square[(y % PERIOD_PX)[:, None], (x % PERIOD_PX)[None]]
        # The edge of the tissue in steps of 8 px.
        coarse = self.inside((x[None, ::8] + 4) * MPP, (y[::8, None] + 4) * MPP)
        tissue = coarse.repeat(8, axis=0)[: len(y)].repeat(8, axis=1)[:, : len(x)]
        band[~tissue] = 243
        return band


def run(out: Path, limits: Limits) -> None:
    """A process for each size, so that each tells its own peak."""
    rows = []
    print("\n| cm² | nuclei | Gpx | s | CPU s | GiB | median µm | p95 µm | verdict |")
    print(f"|{'---|' * 9}", flush=True)
    for area in AREAS_CM2:
        alone(_make, out, area)
        found = alone(_measured, out, area)
        rows.append(found)
        print(
            f"| {area:g} | {found['n']:,} | {found['gpx']:.2f} | {found['s']:.0f} "
            f"| {found['cpu_s']:.0f} | {found['gib']:.2f} | {found['median']:.2f} "
            f"| {found['p95']:.2f} | {found['verdict']} |",
            flush=True,
        )
    last, first = rows[-1], rows[0]
    limits.head(f"scale, {AREAS_CM2[-1]:g} cm², load {os.getloadavg()[0]:.1f}")
    limits.line("nuclei", last["n"], "≥", MIN_CELLS)
    limits.line("seconds", last["s"], "≤", MAX_S)
    limits.told("CPU seconds", f"{last['cpu_s']:.0f}")
    limits.line("peak GiB", last["gib"], "≤", MAX_GIB)
    limits.line("median µm", last["median"], "≤", MAX_UM[0])
    limits.line("p95 µm", last["p95"], "≤", MAX_UM[1])
    growth = AREAS_CM2[-1] / AREAS_CM2[0]
    limits.told(f"time × at area × {growth:g}", f"{last['s'] / first['s']:.1f}")
    limits.told(f"memory × at area × {growth:g}", f"{last['gib'] / first['gib']:.1f}")


def alone(work: Any, *args: object) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


def _measured(out: Path, area_cm2: float) -> dict[str, Any]:
    pair = large_pair(out, area_cm2)
    before_s = time.process_time()
    found = aligned(pair)
    cpu_s = time.process_time() - before_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pair.open() as slide:
        gpx = slide.size_px[0] * slide.size_px[1] / 1e9
    return {
        "n": len(pair.um),
        "gpx": gpx,
        "s": found.seconds,
        "cpu_s": cpu_s,
        # Linux counts kibibytes, macOS bytes.
        "gib": peak / 2**30 if sys.platform == "darwin" else peak / 2**20,
        "median": found.median_um,
        "p95": found.p95_um,
        "verdict": found.verdict,
    }


def _make(out: Path, area_cm2: float) -> None:
    """The square, once, and the slide of this size, once."""
    if not (out / _NUCLEI).exists():
        section, x_um, y_um = _section()
        np.save(out / _SQUARE, _painted(section, x_um, y_um), allow_pickle=False)
        nuclei = section.nuclei
        at = nuclei.centres_um - (x_um, y_um)
        own = nuclei.in_he & ((at >= 0) & (at < PERIOD_UM)).all(axis=1)
        frame = {"x_um": at[own, 0], "y_um": at[own, 1], "area_um2": nuclei.area_um2[own]}
        pd.DataFrame(frame).to_parquet(out / _NUCLEI)
    path = _path(out, area_cm2)
    if not path.exists():
        write_slide(
            path, Repeated(np.load(out / _SQUARE, allow_pickle=False), *_outline(area_cm2)), MPP
        )


def _path(out: Path, area_cm2: float) -> Path:
    return out / f"scale-{area_cm2:g}.ome.tif"


def large_pair(out: Path, area_cm2: float) -> Pair:
    """The nuclei of the copies inside the outline, in a frame of the instrument's own."""
    outline, middle_um = _outline(area_cm2)
    square = pd.read_parquet(out / _NUCLEI)
    n = int(np.ceil(2 * middle_um / PERIOD_UM))
    corner = np.stack(np.meshgrid(np.arange(n), np.arange(n)), axis=-1).reshape(-1, 1, 2)
    he_um = (corner * PERIOD_UM + square[["x_um", "y_um"]].to_numpy()).reshape(-1, 2)
    rng = np.random.default_rng([SEED, 11])
    x, y = (he_um - middle_um).T
    kept = (outline.level(x, y) > _RIM_UM) & (rng.random(len(he_um)) >= _LOST)
    he_um = he_um[kept]
    size_um = (2 * middle_um, 2 * middle_um)
    stretched = Stretch.draw(rng, size_um, WARP_UM).stretch(he_um)
    turned = Affine.similarity(1.0, float(rng.uniform(0, 2 * np.pi)), (0.0, 0.0), mirror=True)
    um = turned(stretched)
    return Pair(
        name=f"scale-{area_cm2:g}",
        slide=_path(out, area_cm2),
        mpp=MPP,
        um=um - um.min(axis=0) + 50,
        px=he_um / MPP,
        area_um2=np.tile(square["area_um2"].to_numpy(), n * n)[kept],
        missing=np.zeros(len(um), bool),
    )


def _painted(section: Tissue, x_um: float, y_um: float) -> Rgb:
    """The square of the section, which goes on on its other side."""
    um_from_px = Affine.similarity(MPP, 0.0, (x_um, y_um))
    mounted = [Mounted.of(section, SlideMap.flat(um_from_px))]
    stain = draw_stain(np.random.default_rng([SEED, 2]))
    square = np.empty((PERIOD_PX, PERIOD_PX, 3), np.uint8)
    for y in range(0, PERIOD_PX, _BLOCK_PX):
        for x in range(0, PERIOD_PX, _BLOCK_PX):
            box = (x, y, min(x + _BLOCK_PX, PERIOD_PX), min(y + _BLOCK_PX, PERIOD_PX))
            square[box[1] : box[3], box[0] : box[2]] = paint_he(mounted, stain, box, (SEED, 13))[0]
    return square


def _section() -> tuple[Tissue, float, float]:
    """A large section, and the corner of the square in it that has no glass."""
    section = draw_section(np.random.default_rng([SEED, 12]), _N_CELLS)
    tissue_map = section.pieces[0].tissue_map
    assert tissue_map.outline is not None
    axis = np.arange(0, max(section.width_um, section.height_um), 50.0)
    x0, y0 = tissue_map.origin_um
    best = (-np.inf, 0.0, 0.0)
    for x in axis:
        for y in axis:
            edge = np.linspace(0, PERIOD_UM, 13)
            level = tissue_map.outline.level(x + edge[None] - x0, y + edge[:, None] - y0)
            best = max(best, (float(level.min()), float(x), float(y)))
    if best[0] <= 0:
        raise ValueError(f"no square of {PERIOD_UM:g} µm in the section: draw more cells")
    return section, best[1], best[2]


def _outline(area_cm2: float) -> tuple[Outline, float]:
    """An outline of this area, and the middle of the slide around it."""
    outline = Outline.of_section(np.random.default_rng([SEED, 14]))
    unit = np.arange(-2.2, 2.2, 0.02)
    inside = outline.level(unit[None], unit[:, None]) > 0
    radius_um = float(np.sqrt(area_cm2 * 1e8 / (inside.sum() * 0.02**2)))
    reach = float(np.abs(unit[inside.any(axis=0) | inside.any(axis=1)]).max())
    return outline.scaled(radius_um), reach * radius_um + _MARGIN_UM
