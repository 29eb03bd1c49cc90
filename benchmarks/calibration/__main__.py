"""How close simulated runs are to real ones, and how hard.

    python -m benchmarks.calibration --data DATA --out OUT [--real NAME=FOLDER ...]

Simulates one section of each seed (or takes those that are in OUT), measures them beside the real
data of DATA (`slides/`, `nuclei/`, `xenium/mouse_ileum_tiny/`) and beside folders with a sample of
a real run, and prints two tables. Pictures go to OUT: `simulated.png` and `tissue.png` show
simulated data alone, `simulated-beside.png` and `tissue-beside.png` real data too. Exits
with 1 where a limit of hardness is not met.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from benchmarks.calibration import bundles, hardness, slides
from benchmarks.calibration.figures import F64, Figure, table
from benchmarks.calibration.pictures import draw_crops, draw_histograms
from benchmarks.nuclei_scores import Counts
from pairing.simulate import SimulationParams, simulate
from pairing.simulate.params import SlideParams
from segmentation.network import load_model
from segmentation.tiles import read_tiles

WARP_UM = 20.0
CMU_MPP = 0.499
MAX_OTSU_F1 = 0.75
MIN_SIFT_ERROR_UM = 2.0
LOG = ("gene counts per cell", "genes per cell")


def simulated_run(out: Path, n_cells: int, seed: int) -> Path:
    """One section of its own donor under a warp; those that are there are kept."""
    folder = out / f"{n_cells}-cells-seed-{seed}"
    if not folder.exists():
        slide = SlideParams(warp_um=WARP_UM)
        simulate(folder, SimulationParams(n_cells=n_cells, seed=seed, slide=slide))
    return folder


def measured(
    runs: dict[str, Path], data: Path, samples: dict[str, Path], out: Path
) -> list[Figure]:
    """Every figure of calibration; draws the crops on the way."""
    ours: dict[str, dict[str, F64]] = {}
    theirs: dict[str, dict[str, F64]] = {}
    network = load_model("compact", "cpu")
    pictures = {}
    for name, folder in runs.items():
        rgb = slides.read_slide(folder / "he.ome.tif", SlideParams().mpp)
        pictures[name] = rgb
        ours[name] = {
            **slides.measure_colour(slides.optical_density(rgb, slides.glass_of(rgb))),
            **slides.measure_truth(folder),
            **slides.measure_found(rgb, network),
            **bundles.measure_bundle(folder / "outs"),
        }
    cmu = slides.read_slide(data / "slides" / "CMU-1-Small-Region.svs", CMU_MPP)
    theirs["CMU-1 slide"] = {
        **slides.measure_colour(slides.optical_density(cmu, slides.glass_of(cmu))),
        **slides.measure_found(cmu, network),
    }
    draw_crops(out / "tissue.png", pictures)
    draw_crops(out / "tissue-beside.png", {"CMU-1": cmu, **pictures})
    tiles = read_tiles(data / "nuclei")
    theirs["labelled tiles"] = slides.measure_tiles(tiles)
    he = [t.rgb.reshape(-1, 3) for t in tiles if t.tile_id.startswith(slides.HE_TILES)]
    # No glass shows in them.
    density = slides.optical_density(np.concatenate(he), 255.0)
    theirs[f"{len(he)} H&E tiles"] = slides.measure_colour(density)
    for name, folder in {"mouse ileum": data / "xenium" / "mouse_ileum_tiny", **samples}.items():
        theirs[name] = bundles.measure_bundle(folder)
    names = list(dict.fromkeys(n for one in ours.values() for n in one))
    return [
        Figure(
            name,
            {donor: one[name] for donor, one in ours.items()},
            {source: one[name] for source, one in theirs.items() if name in one},
            name in LOG,
        )
        for name in names
    ]


def hard_enough(runs: dict[str, Path]) -> bool:
    """Prints the table of hardness beside its limits."""
    mpp = SlideParams().mpp
    print("| hardness | seed | measured | limit | |\n|---|---|---|---|---|")
    met = []

    def line(what: str, seed: str, value: float, sign: str, limit: float) -> None:
        met.append(value <= limit if sign == "≤" else value >= limit)
        verdict = "ok" if met[-1] else "NOT MET"
        print(f"| {what} | {seed} | {value:.3f} | {sign} {limit} | {verdict} |", flush=True)

    counts = {seed: hardness.otsu_counts(folder, mpp) for seed, folder in runs.items()}
    for seed, tally in counts.items():
        line("Otsu + watershed, F1 at IoU 0.5", seed, tally.f1, "≤", MAX_OTSU_F1)
    pooled = sum(counts.values(), Counts())
    line("Otsu + watershed, F1 at IoU 0.5", "all", pooled.f1, "≤", MAX_OTSU_F1)
    for seed, folder in runs.items():
        cells = hardness.Cells.read(folder, mpp)
        found = list(hardness.sift_alignments(folder, mpp))
        chosen = max(found, key=lambda a: a.n_inliers)
        best = min(found, key=lambda a: a.error_um)
        for which, one in (("most inliers", chosen), ("best in hindsight", best)):
            what = (
                f"SIFT + RANSAC affine, median µm, {which} "
                f"({one.how}: {one.n_inliers} of {one.n_matches})"
            )
            line(what, seed, one.error_um, "≥", MIN_SIFT_ERROR_UM)
        given = cells.given_error_um(folder / "he_imagealignment.csv", mpp)
        print(f"| the given matrix, median µm | {seed} | {given:.3f} | – | |")
        fitted = cells.best_affine_error_um()
        print(f"| affine fitted to the truth, median µm | {seed} | {fitted:.3f} | – | |")
    print("\nRetrieval (ridge on colour and size / oracle < 0.6): `python -m benchmarks.demo`.")
    return all(met)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of real data")
    parser.add_argument("--out", type=Path, required=True, help="simulated runs and pictures")
    parser.add_argument("--cells", type=int, default=4500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--real", nargs="*", default=[], metavar="NAME=FOLDER")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    runs = {str(seed): simulated_run(given.out, given.cells, seed) for seed in given.seeds}
    samples = {name: Path(folder) for name, folder in (r.split("=", 1) for r in given.real)}
    figures = measured(runs, given.data, samples, given.out)
    draw_histograms(given.out / "simulated.png", figures, with_real=False)
    draw_histograms(given.out / "simulated-beside.png", figures, with_real=True)
    print(table(figures), end="\n\n", flush=True)
    return 0 if hard_enough(runs) else 1


if __name__ == "__main__":
    sys.exit(main())
