"""Match rates beside what the registration's error predicts, for right and wrong alignments.

python -m benchmarks.match_rate [--seeds A:B] [--out DIR]

Simulated sections of 3,000 cells on slides stretched by 20 µm; the matrix is refined, the nuclei
are the compact network's. Alignments are made wrong after that, and keep the errors that they were
estimated to have. 1 where a right one is told, or one that is 6 µm off or on a wrong slide is not.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from benchmarks.registration.__main__ import seeds_of
from pairing.geometry import Affine, Points, Transform
from pairing.match import match_nuclei
from pairing.match_rate import MIN_AVAILABLE, MatchRate, PlacedNuclei, match_rates
from pairing.registration.given import read_alignment
from pairing.registration.record import read_registration, write_registration
from pairing.registration.stage import register_run
from pairing.simulate import SimulationParams, simulate
from pairing.simulate.params import SlideParams
from pairing.slide import open_slide
from pairing.warp import Warp
from pairing.xenium import open_xenium
from segmentation.config import NUCLEI_FILE, SegmentationConfig
from segmentation.segment import segment

F64 = npt.NDArray[np.float64]

# FAR_BELOW was set on seeds 1001 to 1003.
SEEDS = range(1, 7)
N_CELLS, WARP_UM = 3_000, 20.0
SHIFTS_UM = (2.0, 3.0, 4.0, 6.0, 8.0, 15.0)
PART_SHIFT_UM = 8.0
MUST_BE_TOLD = ("6 µm off", "8 µm off", "15 µm off", "a wrong slide")
_TOWARDS_RAD = 0.3


@dataclass(frozen=True, slots=True)
class Section:
    """A run and its slide: nuclei of both, the transform and the errors of the nuclei."""

    nuclei: pd.DataFrame
    he: pa.Table
    he_px_from_xenium_um: Transform
    given: Affine
    mpp: float
    error_um: F64

    @classmethod
    def of(cls, out: Path, seed: int) -> Section:
        folder = out / f"section-{seed}"
        if not folder.exists():
            slide = SlideParams(warp_um=WARP_UM)
            simulate(folder, SimulationParams(n_cells=N_CELLS, seed=seed, slide=slide))
        slide_path, alignment = folder / "he.ome.tif", folder / "he_imagealignment.csv"
        registered = folder / "registered"
        with open_xenium(folder / "outs") as run:
            nuclei = run.read_nuclei()
            _, given, _ = read_alignment(alignment, run.pixel_size_um)
            found = register_run(run, partial(open_slide, slide_path), alignment, refine=True)
        registered.mkdir(exist_ok=True)
        write_registration(registered, found.registration, found.he_px_from_xenium_um, found.cells)
        if not (folder / NUCLEI_FILE).exists():
            kept = folder / "kept"
            kept.mkdir(exist_ok=True)
            segment(folder / NUCLEI_FILE, kept, slide_path, SegmentationConfig(), device="cpu")
        registration, warp = read_registration(registered)
        errors = found.cells["error_um"].to_numpy()
        return cls(
            nuclei=nuclei[nuclei["cell_index"] >= 0],
            he=pq.read_table(folder / NUCLEI_FILE),
            he_px_from_xenium_um=warp,
            given=given,
            mpp=registration.slide_mpp,
            error_um=errors[nuclei["cell_index"][nuclei["cell_index"] >= 0]],
        )

    def rate(self) -> MatchRate:
        """As the cells stage makes it."""
        matched = match_nuclei(
            self.nuclei["polygon"].tolist(), self.he, self.he_px_from_xenium_um, self.mpp
        )
        found = match_rates(
            PlacedNuclei.of_instrument(self.nuclei, self.he_px_from_xenium_um, self.mpp),
            PlacedNuclei.of_he(self.he, self.mpp),
            matched["he_nucleus_id"].notna().to_numpy(),
            self.error_um,
            np.ones(len(self.nuclei), bool),
        )
        assert found is not None
        return found[0]

    def moved(self, by_um: float) -> Section:
        """The same with all cells put aside."""
        assert isinstance(self.he_px_from_xenium_um, Warp)
        warp, towards = self.he_px_from_xenium_um, [np.cos(_TOWARDS_RAD), np.sin(_TOWARDS_RAD)]
        affine = warp.affine.array
        affine[:2, 2] += by_um / self.mpp * np.array(towards)
        return replace(self, he_px_from_xenium_um=replace(warp, affine=Affine.of(affine)))

    def half_moved(self, by_um: float) -> Section:
        """The same with the cells on the right of the section put aside."""
        whole, middle_um = self.he_px_from_xenium_um, float(self.nuclei["x_um"].median())

        def partly(points: npt.ArrayLike) -> Points:
            src = np.asarray(points, np.float64)
            moved: Points = whole(src) + (src[:, :1] > middle_um) * (by_um / self.mpp, 0.0)
            return moved

        return replace(self, he_px_from_xenium_um=partly)

    def with_share(self, share: float) -> Section:
        """The same with a share of the H&E nuclei found."""
        kept = np.random.default_rng(0).random(self.he.num_rows) < share
        return replace(self, he=self.he.filter(pa.array(kept)))

    def with_strangers(self, share: float) -> Section:
        """The same with a share of the H&E nuclei put elsewhere, within the size of a window."""
        rng = np.random.default_rng(0)
        n = self.he.num_rows
        shift_px = rng.uniform(-40, 40, (n, 2)) / self.mpp * (rng.random((n, 1)) < share)
        polygons = shapely.from_wkb(self.he["polygon_px"].to_pylist())
        corners, of_polygon = shapely.get_coordinates(polygons, return_index=True)
        moved = shapely.set_coordinates(polygons, corners + shift_px[of_polygon])
        columns = self.he.to_pandas().assign(polygon_px=shapely.to_wkb(moved))
        columns[["x_px", "y_px"]] += shift_px
        return replace(self, he=pa.Table.from_pandas(columns, preserve_index=False))


def cases(section: Section, other: Section) -> Iterator[tuple[str, Section]]:
    """What may be right or wrong with a run, by name."""
    yield "right", section
    for by_um in SHIFTS_UM:
        yield f"{by_um:g} µm off", section.moved(by_um)
    yield "half of the section 8 µm off", section.half_moved(PART_SHIFT_UM)
    nothing = np.full(len(section.error_um), np.nan)
    affine = replace(section, he_px_from_xenium_um=Warp(section.given), error_um=nothing)
    yield "the matrix as given, on a slide stretched by 20 µm", affine
    half = section.with_share(0.5)
    yield "half of the H&E nuclei found", half
    yield "half of them found, 6 µm off", half.moved(6.0)
    yield "half of them found, 15 µm off", half.moved(15.0)
    strange = section.with_strangers(1 / 3)
    yield "a third of the H&E nuclei elsewhere", strange
    yield "a third of them elsewhere, 6 µm off", strange.moved(6.0)
    yield "a wrong slide", replace(section, he=other.he)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/match_rate"))
    parser.add_argument("--seeds", type=seeds_of, default=SEEDS, help="default: 1:7")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; seeds {list(given.seeds)}")
    sections = [Section.of(given.out, seed) for seed in given.seeds]
    others = [*sections[1:], sections[0]]
    rates: dict[str, list[MatchRate]] = {}
    for section, other in zip(sections, others, strict=True):
        for name, case in cases(section, other):
            rates.setdefault(name, []).append(case.rate())
    print(
        "| alignment | found | predicted | chance | of the way | far below | in far squares | few |"
    )
    print(f"|{'---|' * 8}")
    for what, some in rates.items():
        names = ("found", "predicted", "by_chance", "in_far_squares")
        *shares, far = [[getattr(r, name) for r in some] for name in names]
        way = [(r.found - r.by_chance) / (r.predicted - r.by_chance) for r in some]
        spans = " | ".join(span(values) for values in (*shares, way))
        told = f"{sum(r.is_far_below for r in some)} of {len(some)}"
        few = f"{sum(r.available < MIN_AVAILABLE for r in some)} of {len(some)}"
        print(f"| {what} | {spans} | {told} | {span(far)} | {few} |")
    wrong = [r for what in MUST_BE_TOLD for r in rates[what]]
    met = not any(r.faults for r in rates["right"]) and all(r.is_far_below for r in wrong)
    print("\nmet" if met else "\nNOT MET")
    return 0 if met else 1


def span(values: list[float]) -> str:
    return f"{min(values):.2f}–{max(values):.2f}"


if __name__ == "__main__":
    sys.exit(main())
