"""Flags of patches on blemishes that are known: precision and recall, beside limits and peers.

python -m benchmarks.quality [part …] [--out DIR] [--data DIR] [--seeds A:B]

Peers' thresholds are set on CALIBRATION seeds to flag 1 % of clean patches; ours are the defaults
of `[filters]`, which were chosen on the same seeds (`calibrate` prints what they were chosen by).
Where histolab can be imported its pen filters run beside ours.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.quality_slides import (
    INKS,
    MPP,
    SIZE_PX,
    Sheet,
    defocused,
    folded_twice,
    inked,
    real_sheet,
    simulated_sheet,
    tile_sheets,
    under_fold,
    unmarked,
)
from benchmarks.registration.__main__ import seeds_of
from benchmarks.registration.limits import Limits
from pairing.flags import Thresholds, with_flags
from pairing.quality import measure

F64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Peer = Callable[[Sheet], F64]

PARTS = ("blur", "pen", "fold", "torn", "clean", "cost")
CALIBRATION, HELD_OUT = range(1001, 1005), range(1, 5)
DEFOCUS_UM = (0.5, 1.0, 1.5, 2.0, 4.0)
# From here on nothing finer than a nucleus is left.
BLURRED_UM = 2.0
# A patch is under ink or in a fold with this share of it, and free of it with none.
SPOILED = 0.25
FOLDS_UM = (20.0, 40.0)
TEARS_UM = (15.0, 30.0)
PEER_FALSE = 0.01
TOLD_INKS = ("blue", "cyan", "green", "black")
MAX_FALSE, MIN_RECALL, MIN_RECALL_FOLD, MIN_PRECISION, MAX_US = 0.02, 0.9, 0.7, 0.9, 15.0
# Sections a kind of tear: each is registered.
N_TORN = 2


def flags_of(sheet: Sheet, usual: Sheet | None = None) -> dict[str, Mask]:
    """Our flags by the default thresholds; with the cells of `usual` setting what is usual."""
    import pandas as pd

    def frame(of: Sheet) -> pd.DataFrame:
        scores = of.scores()
        return pd.DataFrame({name: getattr(scores, name) for name in scores.__slots__})

    own, places = frame(sheet), places_um(sheet)
    if usual is not None:
        own = pd.concat([own, frame(usual)], ignore_index=True)
        places = np.concatenate([places, places_um(usual) + 1e6])
    flagged = with_flags(own, places, Thresholds())[: len(sheet.corners_px)]
    return {name: flagged[name].to_numpy(bool) for name in ("blurred", "pen", "fold", "torn")}


def places_um(sheet: Sheet) -> F64:
    if sheet.points is not None:
        return np.asarray(sheet.points[["x_um", "y_um"]], np.float64)
    return np.asarray(sheet.corners_px * MPP, np.float64)


def laplacian(sheet: Sheet) -> F64:
    """The usual measure of focus, of a patch as it is: less is more blurred."""
    greys = (cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY) for patch in sheet.patches())
    return -np.array([cv2.Laplacian(grey, cv2.CV_64F).var() for grey in greys])


def saturation_less_value(sheet: Sheet) -> F64:
    """What folds are looked for by (Bautista and Yagi, 2009): dark and saturated pixels."""
    found = []
    for patch in sheet.patches():
        hsv = cv2.cvtColor(patch, cv2.COLOR_RGB2HSV).astype(np.float64) / 255
        found.append(np.quantile(hsv[..., 1] - hsv[..., 2], 0.9))
    return np.array(found)


def histolab_pens(sheet: Sheet) -> F64:
    """Share of a patch that its filters for blue, green and red pens take out."""
    from histolab.filters import image_filters_functional as filters

    shares = []
    for patch in sheet.patches():
        picture = Image.fromarray(np.maximum(patch, 1))
        kept = [
            np.asarray(f(picture)).any(axis=2)
            for f in (filters.blue_pen_filter, filters.green_pen_filter, filters.red_pen_filter)
        ]
        shares.append(1 - np.logical_and.reduce(kept).mean())
    return np.array(shares)


def limit_of(peer: Peer, clean: Sequence[Sheet]) -> float:
    """Above it the peer flags 1 % of the clean patches."""
    return float(np.quantile(np.concatenate([peer(s) for s in clean]), 1 - PEER_FALSE))


def told(limits: Limits, what: str, flagged: Sequence[Mask]) -> float:
    share = float(np.concatenate(flagged).mean())
    limits.told(what, f"{share:.3f} of {sum(map(len, flagged)):,}")
    return share


def blur(
    limits: Limits,
    sheets: Sequence[Sheet],
    clean: Sequence[Sheet],
    rest: Sequence[Sheet],
    tiles: Sequence[Sheet],
) -> None:
    limits.head("blurred, by sigma of the defocus, simulated / real")
    rng = np.random.default_rng(1)
    least = limit_of(laplacian, clean)
    for name, some in (("simulated", sheets), ("real", rest), ("real tiles", tiles)):
        peer = float(np.mean(np.concatenate([laplacian(s) for s in some]) > least))
        what = f"as they are, {name} (variance of the Laplacian: {peer:.3f})"
        told(limits, what, [flags_of(s)["blurred"] for s in some])
    hits = []
    for sigma in DEFOCUS_UM:
        for name, some in (("simulated", sheets), ("real", rest)):
            soft = [defocused(s, sigma, rng) for s in some]
            flagged = [flags_of(s)["blurred"] for s in soft]
            peer = float(np.mean(np.concatenate([laplacian(s) for s in soft]) > least))
            what = f"{sigma:g} µm, {name} (variance of the Laplacian: {peer:.3f})"
            share = told(limits, what, flagged)
            if sigma >= BLURRED_UM:
                hits.append(share)
    limits.line(f"least recall from {BLURRED_UM:g} µm on", min(hits), "≥", MIN_RECALL)


def pen(
    limits: Limits, sheets: Sequence[Sheet], rest: Sequence[Sheet], tiles: Sequence[Sheet]
) -> None:
    limits.head("pen: recall of patches under ink by a quarter or more; false flags of the free")
    rng = np.random.default_rng(2)
    with_peer = importlib.util.find_spec("histolab") is not None
    n_true = n_flagged = n_right = 0
    recalls = []
    for ink in INKS:
        painted = [inked(s, ink, rng) for s in (*sheets, *rest)]
        flagged = np.concatenate([flags_of(s)["pen"] for s in painted])
        share = np.concatenate([s.share for s in painted if s.share is not None])
        under, free = share >= SPOILED, share == 0
        words = f"{ink}: of {under.sum():,} under it; false of {free.sum():,}"
        if with_peer:
            one = painted[0]
            assert one.share is not None
            peer = histolab_pens(one) > Thresholds().pen_above
            words += (
                f" (histolab on one: {peer[one.share >= SPOILED].mean():.3f}; "
                f"{peer[one.share == 0].mean():.3f})"
            )
        limits.told(words, f"{flagged[under].mean():.3f}; {flagged[free].mean():.4f}")
        if ink in TOLD_INKS:
            recalls.append(float(flagged[under].mean()))
            n_true += int(under.sum())
            n_flagged += int(flagged[under | free].sum())
            n_right += int(flagged[under].sum())
    if with_peer:
        clean = np.concatenate([histolab_pens(s) for s in tiles]) > Thresholds().pen_above
        limits.told(f"histolab: false of {len(clean):,} of real tiles", f"{clean.mean():.3f}")
    limits.line(f"recall of {', '.join(TOLD_INKS)}", n_right / n_true, "≥", MIN_RECALL)
    limits.line("precision", n_right / n_flagged, "≥", MIN_PRECISION)


def fold(limits: Limits, out: Path, seeds: range, clean: Sequence[Sheet], real: Sheet) -> None:
    limits.head("fold: recall; false flags away from it")
    least = limit_of(saturation_less_value, clean)
    rng = np.random.default_rng(3)
    some = [
        under_fold(simulated_sheet(out, seed, fold_um=FOLDS_UM[seed % len(FOLDS_UM)]))
        for seed in seeds
    ]
    recall, precision = _fold_line(limits, "three layers, simulated", some, least)
    _fold_line(limits, "two layers, 15 to 60 µm wide, real", [folded_twice(real, rng)], least)
    limits.line("recall, three layers", recall, "≥", MIN_RECALL_FOLD)
    limits.line("precision, three layers", precision, "≥", MIN_PRECISION)


def _fold_line(
    limits: Limits, what: str, some: Sequence[Sheet], least: float
) -> tuple[float, float]:
    """Recall and precision, told beside the peer's."""
    flagged = np.concatenate([flags_of(s)["fold"] for s in some])
    peer = np.concatenate([saturation_less_value(s) > least for s in some])
    share = np.concatenate([s.share for s in some if s.share is not None])
    spoiled, free = share >= SPOILED, share == 0
    right = int(flagged[spoiled].sum())
    precision = right / max(1, int(flagged[spoiled | free].sum()))
    limits.told(
        f"{what}: of {spoiled.sum():,}; of {free.sum():,}; precision (saturation less value: "
        f"{peer[spoiled].mean():.3f}; {peer[free].mean():.3f})",
        f"{right / spoiled.sum():.3f}; {flagged[free].mean():.3f}; {precision:.3f}",
    )
    return right / int(spoiled.sum()), precision


def torn(limits: Limits, out: Path, seeds: range) -> None:
    """As the registration places the cells: a smooth field puts some of them into the gap."""
    limits.head("torn: recall; false flags further away than a patch")
    kinds = {f"tear of {um:g} µm": {"tear_um": um, "warp_um": 10.0} for um in TEARS_UM}
    kinds["piece of 150 µm missing"] = {"missing_um": 150.0, "warp_um": 10.0}
    for what, slide in kinds.items():
        some = [simulated_sheet(out, seed, registered=True, **slide) for seed in seeds[:N_TORN]]
        flagged = np.concatenate([flags_of(s)["torn"] for s in some])
        beside, lost, near, unsure = [], [], [], []
        for sheet in some:
            assert sheet.points is not None
            marked = sheet.points[["torn", "missing"]].to_numpy().any(axis=1)
            own = sheet.points[["x_um", "y_um"]].to_numpy()
            away = np.linalg.norm(own[:, None] - own[None, marked], axis=2).min(axis=1)
            beside.append(sheet.points["torn"].to_numpy())
            lost.append(sheet.points["missing"].to_numpy())
            near.append(away < SIZE_PX * MPP)
            unsure.append(sheet.points["error_um"].to_numpy() > 5.0)
        b, m, n, u = (np.concatenate(v) for v in (beside, lost, near, unsure))
        words = f"{what}: of {b.sum():,} beside"
        found = f"{flagged[b].mean():.3f}, with registration_error {(flagged | u)[b].mean():.3f}"
        if m.any():
            words, found = f"{words}; of {m.sum():,} in it", f"{found}; {flagged[m].mean():.3f}"
        limits.told(f"{words}; of {(~n).sum():,} away", f"{found}; {flagged[~n].mean():.4f}")


def false_flags(
    limits: Limits, sheets: Sequence[Sheet], real: Sheet, tiles: Sequence[Sheet]
) -> None:
    limits.head("false flags on pictures as they are")
    for flag in ("blurred", "pen", "fold", "torn"):
        share = told(limits, f"{flag}, simulated", [flags_of(s)[flag] for s in sheets])
        limits.line(f"{flag}, simulated", share, "≤", MAX_FALSE)
        if flag != "torn":  # it is of cells, and of places on a grid some lie on glass
            where = unmarked(real) if flag == "pen" else real
            limits.line(f"{flag}, {real.name}", told_share(where, flag), "≤", MAX_FALSE)
        if flag in ("blurred", "pen"):
            found = {s.name: told_share(s, flag) for s in tiles}
            worst = ", ".join(f"{k} {v:.2f}" for k, v in found.items() if v > MAX_FALSE)
            limits.told(f"{flag}, {len(tiles)} real tiles: more than 2 % of", worst or "none")


def told_share(sheet: Sheet, flag: str) -> float:
    return float(flags_of(sheet)[flag].mean())


def cost(limits: Limits, sheet: Sheet) -> None:
    limits.head("cost, 4,000 cells a mm²")
    rng = np.random.default_rng(4)
    for side in (512, 1024):
        picture = np.ascontiguousarray(sheet.rgb[:side, :side])
        height, width = picture.shape[:2]
        n = round(height * width * MPP**2 * 1e-6 * 4000)
        corners = rng.integers(0, (width - SIZE_PX + 1, height - SIZE_PX + 1), (n, 2))
        spent = []
        for _ in range(30):
            started_s = time.process_time()
            measure(picture, MPP, corners, SIZE_PX)
            spent.append(time.process_time() - started_s)
        us = float(np.median(spent)) / n * 1e6
        limits.line(f"µs of a processor a patch, {n} patches of {side} px", us, "≤", MAX_US)
    patch = np.ascontiguousarray(sheet.rgb[:SIZE_PX, :SIZE_PX])
    started_s = time.process_time()
    for _ in range(300):
        measure(patch, MPP, [(0, 0)], SIZE_PX)
    limits.told("µs of a patch by itself", f"{(time.process_time() - started_s) / 300 * 1e6:.0f}")


def calibrate(out: Path, real: Sheet, tiles: Sequence[Sheet]) -> None:
    """Quantiles of the scores on the calibration seeds, clean and spoiled."""
    rng = np.random.default_rng(0)

    def line(what: str, values: F64) -> None:
        quantiles = np.nanquantile(values, [0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1])
        print(f"{what:40}", *(f"{v:6.3f}" for v in quantiles), flush=True)

    clean = [simulated_sheet(out, seed) for seed in CALIBRATION]
    sets = {"simulated": clean, real.name: [real], "tiles": tiles}
    for name, sheets in sets.items():
        line(f"sharpness {name}", np.concatenate([s.scores().sharpness for s in sheets]))
        for sigma in DEFOCUS_UM:
            scores = [defocused(s, sigma, rng).scores().sharpness for s in sheets]
            line(f"sharpness {name} {sigma:g} µm", np.concatenate(scores))
        line(f"pen_share {name}", np.concatenate([s.scores().pen_share for s in sheets]))
    for name in ("simulated", real.name):
        dark = [s.scores().dark_od for s in sets[name]]
        line(f"dark_ratio {name}", np.concatenate([d / np.median(d) for d in dark]))
    for width in FOLDS_UM:
        for spoiled in (False, True):
            found = []
            for seed in CALIBRATION:
                sheet = under_fold(simulated_sheet(out, seed, fold_um=width))
                own = sheet.scores().dark_od
                found.append((own / np.median(own))[sheet.share == spoiled])
            line(f"dark_ratio {width:g} µm {'in' if spoiled else 'away'}", np.concatenate(found))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS, "calibrate"], help="default: all")
    parser.add_argument("--out", type=Path, default=Path("build/quality"), help="painted slides")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="real pictures")
    parser.add_argument("--seeds", type=seeds_of, default=HELD_OUT)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(1)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    real = real_sheet(given.data / "slides" / "CMU-1-Small-Region.svs")
    tiles = tile_sheets(given.data / "nuclei")
    parts = given.parts or PARTS
    if "calibrate" in parts:
        calibrate(given.out, real, tiles)
    limits = Limits()
    calibration = [simulated_sheet(given.out, seed) for seed in CALIBRATION]
    sheets = [simulated_sheet(given.out, seed) for seed in given.seeds]
    if "blur" in parts:
        blur(limits, sheets[:2], calibration, [real], tiles)
    if "pen" in parts:
        pen(limits, sheets[:2], [unmarked(real)], tiles)
        marked = flags_of(real)["pen"]
        limits.told(f"flagged along the margins of {real.name}, which are dyed", f"{marked.sum()}")
    if "fold" in parts:
        fold(limits, given.out, given.seeds, calibration, real)
    if "torn" in parts:
        torn(limits, given.out, given.seeds)
    if "clean" in parts:
        false_flags(limits, sheets, real, tiles)
    if "cost" in parts:
        cost(limits, real)
    return 0 if limits.met else 1


if __name__ == "__main__":
    sys.exit(main())
