"""Which levels of a pyramid are the slide made smaller, and by how much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from pairing.geometry import Box
from pairing.slide_sources import Source

# A level is compared with the one before it on a grid of windows of this side.
_WINDOW_PX, _GRID = 48, 3
# Within their windows levels correlate with what they were made of: on a real section by 0.9 and
# more where pixels were averaged, by 0.8 and more where they were dropped, and by 0.2 and less
# with the same section mirrored, turned or moved.
_MIN_CORRELATION = 0.45
# Grey levels of 255 that spread less than this show noise, and have but a mean to compare.
_FLAT_GREY, _SAME_GREY = 4.0, 10.0

Grey = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Level:
    """A level of the pyramid: its size, and how many level-0 pixels one of its pixels spans."""

    size_px: tuple[int, int]
    downsample: float


def regular_levels(sizes: Sequence[tuple[int, int]]) -> tuple[list[int], list[Level], list[str]]:
    """Indices of the levels of a pyramid, those levels, and a note on each that is left out.

    Writers round odd sizes up or down at every step (5789 -> 2894 -> 1447 -> 723), so the ratio of
    sizes is only near the factor by which pixels were merged; taken as it is, it would shift the
    far edge by a pixel. A power of two that explains both sizes to a pixel is preferred, then the
    nearest integer, then the ratio itself where both axes agree on it. Where none does, or the
    level is no smaller than the one before it, it is no level of this slide.
    """
    width, height = sizes[0]
    kept, levels, notes = [0], [Level(sizes[0], 1.0)], []
    for i, (w, h) in enumerate(sizes[1:], start=1):
        ratio = width / w if width >= height else height / h
        candidates = (2.0 ** round(math.log2(ratio)), float(round(ratio)), ratio)
        fits = [r for r in candidates if r and abs(w - width / r) <= 1 and abs(h - height / r) <= 1]
        if not fits:
            notes.append(f"level {i} left out: {w} x {h} px are not {width} x {height} px by one "
                         "factor")  # fmt: skip
        elif fits[0] <= levels[-1].downsample:
            notes.append(f"level {i} left out: {w} x {h} px are no smaller than the level before")
        else:
            kept.append(i)
            levels.append(Level((w, h), fits[0]))
    return kept, levels, notes


def foreign_levels(sources: Sequence[Source]) -> dict[int, str]:
    """Of each level that shows something else than level 0, its index and a note.

    Each regular level is compared with the last good one before it, in windows that cover about
    the same place in both: by the correlation of their grey values, and by the values themselves
    where neither shows anything. Damaged and black windows of the finer level say nothing.
    """
    kept, levels, _ = regular_levels([s.size_px for s in sources])
    foreign: dict[int, str] = {}
    finer = 0  # position in `kept` of the last good level
    for position in range(1, len(kept)):
        index, level = kept[position], levels[position]
        step = level.downsample / levels[finer].downsample
        pairs = [
            pair
            for window in _windows(level.size_px)
            if (pair := _both(sources[index], sources[kept[finer]], window, step)) is not None
        ]
        if pairs and not _agree(pairs):
            w, h = level.size_px
            foreign[index] = f"level {index} left out: {w} x {h} px of another picture"
        else:
            finer = position
    return foreign


def _windows(size_px: tuple[int, int]) -> list[Box]:
    starts = [
        sorted({round(s) for s in np.linspace(0, max(n - _WINDOW_PX, 0), _GRID)}) for n in size_px
    ]
    return [
        (x, y, min(x + _WINDOW_PX, size_px[0]), min(y + _WINDOW_PX, size_px[1]))
        for y in starts[1]
        for x in starts[0]
    ]


def _both(coarse: Source, fine: Source, window: Box, step: float) -> tuple[Grey, Grey] | None:
    """Grey values of a window of the coarse level, and of the fine one made as small."""
    width, height = fine.size_px
    x0, y0 = (int(v * step) for v in window[:2])
    x1, y1 = min(round(window[2] * step), width), min(round(window[3] * step), height)
    if x1 <= x0 or y1 <= y0:
        return None
    damaged: list[Box] = []
    seen = fine.read_inside((x0, y0, x1, y1), damaged)
    if damaged or not seen.any():
        return None
    grey = Image.fromarray(seen.astype(np.float32).mean(axis=2))
    size = (window[2] - window[0], window[3] - window[1])
    smaller = np.asarray(grey.resize(size, Image.Resampling.BOX)).ravel()
    own = coarse.read_inside(window, damaged).astype(np.float32).mean(axis=2).ravel()
    if damaged:
        return None
    scale = np.float32(255 / np.iinfo(fine.dtype).max)
    return own * scale, smaller * scale


def _agree(pairs: list[tuple[Grey, Grey]]) -> bool:
    # Around the means of the windows: glass beside tissue looks alike on any two sections.
    own, made = (np.concatenate([g - g.mean() for g in side]) for side in zip(*pairs, strict=True))
    spread = float(own.std()), float(made.std())
    if min(spread) < _FLAT_GREY:
        apart = max(abs(float(a.mean() - b.mean())) for a, b in pairs)
        return max(spread) < 2 * _FLAT_GREY and apart < _SAME_GREY
    return bool(np.corrcoef(own, made)[0, 1] >= _MIN_CORRELATION)
