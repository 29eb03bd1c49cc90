"""Pairs that are not of one section, or are spoilt, must not pass; right ones must."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import tifffile

from benchmarks.registration import series
from benchmarks.registration.aligned import Aligned, aligned
from benchmarks.registration.baselines import best_affine
from benchmarks.registration.limits import Limits, counted
from benchmarks.registration.pairs import Pair, Rgb, write_slide
from pairing.geometry import Affine

N_SECTIONS, N_LARGER = 15, 5
BLOCKS_UM = (64.0, 256.0)
LEFT_SHARE = 0.05
MAX_RIGHT_FAILED = 2
# Beyond this the start lies in another basin than the truth.
TURNS_DEG = (30.0, 90.0, 180.0, 270.0)
_NOISE = 2.0


def run(out: Path, seeds: Sequence[int], limits: Limits) -> None:
    """Every line of the verdict; wrong pairs are made of the first 15 of the sections."""
    right = [series.small(out, seed).pair() for seed in seeds]
    sections = right[:N_SECTIONS]
    serial = [series.small(out, seed, serial=True).pair() for seed in seeds[:N_SECTIONS]]
    limits.head("the verdict")
    rights(limits, [aligned(pair) for pair in right])
    larger = [series.medium(out, seed).pair() for seed in seeds[:N_LARGER]]
    for what, some in (("5 % of the tissue left", larger), ("the same of few cells", sections)):
        little = [aligned(remaining(out, pair)) for pair in some]
        none_passes(limits, what, little)
        failed = [named(a) for a in little if a.verdict == "fail"]
        limits.none(f"{what}: failed instead of doubtful", failed, len(little))
    none_passes(limits, "a blank slide", [aligned(blank(out, sections[0]))])
    none_passes(limits, "serial sections", map(aligned, serial))
    for name, basin in wrong_basins().items():
        starts = [basin(pair) @ best_affine(pair) for pair in sections]
        found = (aligned(p, a) for p, a in zip(sections, starts, strict=True))
        none_wrong(limits, f"a given alignment, {name}", found)
    for block_um in BLOCKS_UM:
        mixed = (shuffled(out, pair, block_um) for pair in sections)
        none_passes(limits, f"shuffled blocks of {block_um:g} µm", map(aligned, mixed))
    none_passes(limits, "other sections", map(aligned, crossed(sections)))


def none_passes(limits: Limits, what: str, found: Iterator[Aligned] | Sequence[Aligned]) -> None:
    """That no verdict is a pass."""
    every = list(found)
    limits.none(f"{what}: passed", [named(a) for a in every if a.passes], len(every))
    limits.told(f"{what}: verdicts", counted(a.verdict for a in every))
    limits.told(f"{what}: highest evidence", f"{max(map(evidence, every)):.3f}")


def none_wrong(limits: Limits, what: str, found: Iterator[Aligned]) -> None:
    """That what passes is right: the start may be overcome."""
    every = list(found)
    bad = [named(a) for a in every if a.is_wrong]
    limits.none(f"{what}: passed with a wrong transform", bad, len(every))
    limits.told(f"{what}: verdicts", counted(a.verdict for a in every))


def rights(limits: Limits, right: Sequence[Aligned]) -> None:
    failed = [a for a in right if a.verdict not in ("pass", "doubtful")]
    most = round(MAX_RIGHT_FAILED * len(right) / 100)
    limits.line(f"right pairs failed, of {len(right)}", len(failed), "≤", most)
    limits.told("right pairs that failed", ", ".join(map(named, failed)) or "none")
    limits.none("right pairs: passed wrong", [named(a) for a in right if a.is_wrong], len(right))
    limits.told("right pairs: verdicts", counted(a.verdict for a in right))
    lowest = min((evidence(a) for a in right if a not in failed), default=np.nan)
    limits.told("right pairs: lowest evidence that didn't fail", f"{lowest:.3f}")


def named(found: Aligned) -> str:
    return f"{found.pair.name} (E {evidence(found):.2f}, {found.median_um:.1f} µm)"


def evidence(found: Aligned) -> float:
    known = found.alignment.evidence
    return 0.0 if known is None else known.evidence


def crossed(sections: Sequence[Pair]) -> Iterator[Pair]:
    """The nuclei of each section with the slide of each other; their truth is none."""
    for one in sections:
        for other in sections:
            if one is not other:
                yield replace(one, name=f"{one.name} on {other.name}", slide=other.slide)


def wrong_basins() -> dict[str, Callable[[Pair], Affine]]:
    """What to put after the true affine, by name: about the middle of the section on the slide."""

    def about_the_middle(pair: Pair, turn: Affine) -> Affine:
        x, y = pair.px.mean(axis=0).tolist()
        there = Affine.similarity(1.0, 0.0, (x, y))
        return there @ turn @ there.inverse

    def turned(deg: float, mirror: bool) -> Callable[[Pair], Affine]:
        turn = Affine.similarity(1.0, np.deg2rad(deg), (0.0, 0.0), mirror=mirror)
        return lambda pair: about_the_middle(pair, turn)

    basins = {f"turned by {deg:g}°": turned(deg, False) for deg in TURNS_DEG}
    return basins | {"mirrored": turned(0.0, True), "mirrored, turned by 90°": turned(90.0, True)}


def shuffled(out: Path, pair: Pair, block_um: float) -> Pair:
    """Square blocks of the slide permuted at random."""

    def mix(rgb: Rgb) -> Rgb:
        side = round(block_um / pair.mpp)
        rows, columns = rgb.shape[0] // side, rgb.shape[1] // side
        whole = rgb[: rows * side, : columns * side]
        blocks = whole.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
        mixed = np.random.default_rng(0).permutation(blocks.reshape(-1, side, side, 3))
        mixed = mixed.reshape(rows, columns, side, side, 3).swapaxes(1, 2)
        return np.ascontiguousarray(mixed.reshape(whole.shape))

    return redrawn(out, pair, f"shuffled-{block_um:g}", mix)


def blank(out: Path, pair: Pair) -> Pair:
    """Glass and the noise of a camera."""
    return redrawn(out, pair, "blank", lambda rgb: glass_like(rgb))


def remaining(out: Path, pair: Pair) -> Pair:
    """Of the tissue on the slide only that around one nucleus is left, 5 % of the cells."""
    rng = np.random.default_rng(len(pair.um))
    middle = pair.px[int(rng.integers(len(pair.px)))]
    away = np.hypot(*(pair.px - middle).T)
    radius = float(np.quantile(away, LEFT_SHARE))

    def cut(rgb: Rgb) -> Rgb:
        left = np.zeros(rgb.shape[:2], np.uint8)
        cv2.circle(left, np.rint(middle).astype(int).tolist(), round(radius), 1, -1)
        return np.where(left[..., None] > 0, rgb, glass_like(rgb))

    return replace(redrawn(out, pair, "remaining", cut), missing=away > radius)


def glass_like(rgb: Rgb) -> Rgb:
    """A slide of this size with nothing on it, of the colour of its brightest pixels."""
    white = np.percentile(rgb[::16, ::16].reshape(-1, 3), 90, axis=0)
    noise = np.random.default_rng(1).standard_normal(rgb.shape, dtype=np.float32)
    return np.asarray(np.clip(white + _NOISE * noise, 0, 255), np.uint8)


def redrawn(out: Path, pair: Pair, how: str, change: Callable[[Rgb], Rgb]) -> Pair:
    """The pair with a changed picture, made once."""
    path = out / f"{pair.name}-{how}.ome.tif"
    if not path.exists():
        write_slide(path, change(tifffile.imread(pair.slide, key=0)), pair.mpp)
    return replace(pair, name=f"{pair.name}, {how}", slide=path)
