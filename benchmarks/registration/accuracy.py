"""How far from the truth every cell lands, and whether the estimate of that holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from benchmarks.registration import series
from benchmarks.registration.aligned import RIGHT_UM, Aligned, aligned
from benchmarks.registration.baselines import BASELINES, best_affine
from benchmarks.registration.derived import CROPS, Picture, derived
from benchmarks.registration.limits import Limits, counted
from benchmarks.registration.pairs import MPP, Pair
from pairing.geometry import Affine
from segmentation.network import NucleusNetwork, load_model

F64 = npt.NDArray[np.float64]

WARPS_UM = (0.0, 20.0, 40.0)
FOCUS_WARP_UM = 20.0
DERIVED_WARPS_UM = (0.0, 10.0, 20.0)
DERIVED_MAX_UM = (0.3, 1.5)
SIMULATED_MAX_UM = (0.5, 2.0)
FOCUS_MAX_UM = (1.0, 3.0)
N_TORN = 10
# The others need a minute a pair: of real slides they get the first crop at each warp.
N_BASELINE_SEEDS = 3
MIN_RIGHT_OR_FLAGGED = 0.97
MIN_PRECISION, MIN_RECALL, MAX_FALSE_FLAGS, MIN_RANK = 0.98, 0.80, 0.05, 0.5


def run(out: Path, seeds: Sequence[int], pictures: Sequence[Picture], limits: Limits) -> None:
    """Every table of accuracy; `pictures` are real slides to derive pairs from."""
    print(f"{len(seeds)} seeds, {series.N_CELLS} cells, slides at {MPP:g} µm/px")
    head()
    compared = set(seeds[:N_BASELINE_SEEDS])
    clean: dict[float, list[Aligned]] = {warp: [] for warp in WARPS_UM}
    blurred, torn = [], []
    for seed in seeds:
        painted = series.whole(out, seed)
        for warp in WARPS_UM:
            pair = painted.pair(warp / series.LARGEST_WARP_UM)
            clean[warp].append(row(f"warp {warp:g}", pair, seed in compared))
        pair = painted.out_of_focus(seed, FOCUS_WARP_UM / series.LARGEST_WARP_UM)
        blurred.append(row(f"warp {FOCUS_WARP_UM:g}, focus", pair, seed in compared))
    for seed in seeds[:N_TORN]:
        torn.append(row("tear, fold", series.torn(out, seed).pair(), False))
    network = load_model("compact", "cpu")
    real = {
        picture.name: [
            row(f"real, warp {warp:g}", pair, i % len(CROPS) == 0)
            for i, (warp, pair) in enumerate(derived_pairs(out, seeds[0], picture, network))
        ]
        for picture in pictures
    }
    limits.head("accuracy, µm over all cells on tissue")
    for warp, some in clean.items():
        within(limits, f"simulated, warp {warp:g}", some, SIMULATED_MAX_UM)
    within(
        limits,
        f"other focus, 10 to 30 % in one image, warp {FOCUS_WARP_UM:g}",
        blurred,
        FOCUS_MAX_UM,
    )
    for name, some in real.items():
        what = f"derived from {name}, warp ≤ {max(DERIVED_WARPS_UM):g}"
        within(limits, what, some, DERIVED_MAX_UM)
    right_or_flagged(limits, torn)
    smooth = [a for some in clean.values() for a in some]
    derived_ones = [a for some in real.values() for a in some]
    estimates(limits, [*smooth, *blurred, *torn, *derived_ones], smooth)
    ranks(
        limits,
        {
            "smooth": [a for warp, some in clean.items() if warp for a in some],
            "other focus": blurred,
            "tear, fold": torn,
            # The first of each picture have no warp.
            "real": [a for some in real.values() for a in some[len(CROPS) :]],
        },
    )


def derived_pairs(
    out: Path, seed: int, picture: Picture, network: NucleusNetwork
) -> Iterator[tuple[float, Pair]]:
    """Each crop of a real slide at each warp, another turn for each."""
    nuclei = picture.nuclei(network)
    for warp in DERIVED_WARPS_UM:
        for crop in CROPS.values():
            yield warp, derived(out, picture, nuclei, warp, seed, crop)
            seed += 1


def head() -> None:
    others = [*BASELINES, "best affine"]
    print(f"| pair | what | cells | verdict | s | ours | {' | '.join(others)} |")
    print(f"|{'---|' * (6 + len(others))}", flush=True)


def row(what: str, pair: Pair, compare: bool) -> Aligned:
    """Prints median / p95 / max of one pair, of ours and where asked of the others."""
    ours = aligned(pair)
    texts = [spread(ours.error_um)]
    there = pair.take(~pair.missing)
    others: list[Callable[[Pair], Affine | None]] = [*BASELINES.values(), best_affine]
    for method in others:
        texts.append(baseline(method, there) if compare else "")
    print(
        f"| {pair.name} | {what} | {len(pair.um):,} | {ours.verdict} | {ours.seconds:.1f} "
        f"| {' | '.join(texts)} |",
        flush=True,
    )
    return ours


def baseline(method: Callable[[Pair], Affine | None], pair: Pair) -> str:
    affine = method(pair)
    return "none" if affine is None else spread(pair.error_um(affine(pair.um)))


def spread(error_um: F64) -> str:
    median, p95, most = np.quantile(error_um, [0.5, 0.95, 1])
    return f"{median:.2f} / {p95:.2f} / {most:.1f}"


def within(limits: Limits, what: str, some: Sequence[Aligned], most: tuple[float, float]) -> None:
    """Median and p95 over the cells of all pairs, and those of the worst pair."""
    pooled = np.concatenate([a.error_um for a in some])
    for name, share, limit in (("median", 0.5, most[0]), ("p95", 0.95, most[1])):
        each = [float(np.quantile(a.error_um, share)) for a in some]
        limits.line(
            f"{what}: {name}, {len(some)} pairs", float(np.quantile(pooled, share)), "≤", limit
        )
        limits.line(f"{what}: {name}, worst pair", max(each), "≤", limit)
    limits.told(f"{what}: verdicts", counted(a.verdict for a in some))


def right_or_flagged(limits: Limits, torn: Sequence[Aligned]) -> None:
    good = [(a.error_um <= RIGHT_UM) | (a.estimate_um > RIGHT_UM) for a in torn]
    right = np.concatenate([a.error_um <= RIGHT_UM for a in torn])
    what = "tear and fold: cells right or flagged"
    limits.line(
        f"{what}, {len(torn)} pairs", float(np.concatenate(good).mean()), "≥", MIN_RIGHT_OR_FLAGGED
    )
    limits.line(
        f"{what}, worst pair", min(float(g.mean()) for g in good), "≥", MIN_RIGHT_OR_FLAGGED
    )
    limits.told("tear and fold: cells right", f"{right.mean():.3f}")
    limits.told("tear and fold: verdicts", counted(a.verdict for a in torn))


def estimates(limits: Limits, every: Sequence[Aligned], clean: Sequence[Aligned]) -> None:
    """Cells called better than 2 µm against those that are, over all pairs of this part."""
    error = np.concatenate([a.error_um for a in every])
    called = np.concatenate([a.estimate_um for a in every]) <= RIGHT_UM
    right = error <= RIGHT_UM
    limits.line("called better than 2 µm and are", float(right[called].mean()), "≥", MIN_PRECISION)
    limits.line("better than 2 µm and called so", float(called[right].mean()), "≥", MIN_RECALL)
    limits.told("most that a cell called better is off, µm", f"{error[called].max():.1f}")
    flags = np.concatenate([a.estimate_um[a.error_um <= RIGHT_UM] > RIGHT_UM for a in clean])
    limits.line("false flags on clean pairs", float(flags.mean()), "≤", MAX_FALSE_FLAGS)


def ranks(limits: Limits, warped: Mapping[str, Sequence[Aligned]]) -> None:
    """Whether the estimate ranks the cells as their true errors do, by kind of pair."""
    every = [a for some in warped.values() for a in some]
    limits.line("rank correlation under warps, cells of all pairs", rank_of(every), "≥", MIN_RANK)
    each = [rank_of([a]) for a in every]
    limits.line(
        "rank correlation under warps, median of pairs", float(np.median(each)), "≥", MIN_RANK
    )
    for kind, some in warped.items():
        alone = [rank_of([a]) for a in some]
        limits.told(
            f"rank correlation, {kind}: all cells; pairs",
            f"{rank_of(some):.2f}; {min(alone):.2f} to {max(alone):.2f}",
        )
        exact = [rank_of([of_the_spread(a)]) for a in some]
        limits.told(
            f"rank correlation, {kind}: pairs, if errors were drawn as the estimates say",
            f"{min(exact):.2f} to {max(exact):.2f}",
        )


def rank_of(some: Sequence[Aligned]) -> float:
    error, estimate = (np.concatenate(side) for side in zip(*map(both, some), strict=True))
    return float(spearmanr(error, estimate).statistic)


def of_the_spread(found: Aligned) -> Aligned:
    """The same with errors drawn at random, of each cell as large as its estimate says."""
    drawn = np.random.default_rng(0).standard_normal((2, len(found.estimate_um)))
    return replace(found, error_um=found.estimate_um * np.hypot(*drawn) / np.sqrt(2))


def both(found: Aligned) -> tuple[F64, F64]:
    return found.error_um, found.estimate_um
