"""Slides and cells that are not what they should be: a clear verdict, never a wrong transform."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tifffile

from benchmarks.registration import series
from benchmarks.registration.aligned import Aligned, aligned
from benchmarks.registration.limits import Limits
from benchmarks.registration.pairs import Pair, Rgb, hard, simulated
from benchmarks.registration.wrong import redrawn
from shards.errors import BadInput

# Optical densities of red, green and blue. DAB: Ruifrok & Johnston, as of haematoxylin. Masson's
# trichrome: fibres in aniline blue, which haematoxylin looks like.
HAEMATOXYLIN, DAB = (0.650, 0.704, 0.286), (0.268, 0.570, 0.776)
IRON_HAEMATOXYLIN, ANILINE_BLUE = (0.60, 0.62, 0.50), (0.85, 0.50, 0.15)
STAINS = {
    "haematoxylin and DAB": (HAEMATOXYLIN, DAB),
    "trichrome": (IRON_HAEMATOXYLIN, ANILINE_BLUE),
    "no haematoxylin": ((0.07, 0.99, 0.11), (0.07, 0.99, 0.11)),
}
MPP_ERRORS = (0.75, 0.8, 1.2, 1.25)
MAX_MPP_ERROR = 0.01


@dataclass(frozen=True, slots=True)
class Refused:
    """Bad input that was told as such."""

    told: str


def run(out: Path, seed: int, limits: Limits) -> None:
    """A line for each fault, and two for each wrong pixel size."""
    pair = series.small(out, seed).pair()
    limits.head("bad input: passed with a wrong transform")
    for name, vectors in STAINS.items():
        stained = simulated(
            out, len(pair.um), seed, hard(seed, warp_um=20.0), stain_vectors=vectors
        )
        harmless(limits, f"another stain: {name}", stained.pair())
    harmless(limits, "fluorescence as H&E", redrawn(out, pair, "fluorescence", fluorescence))
    harmless(limits, "a slide of one colour", redrawn(out, pair, "flat", np.zeros_like))
    harmless(limits, "upside down", upside_down(out, pair))
    harmless(limits, "upside down, 16 bit", sixteen_bit(out, upside_down(out, pair)))
    harmless(limits, "199 nuclei", pair.take(np.arange(199)))
    harmless(limits, "no nuclei", pair.take(np.arange(0)))
    for factor in MPP_ERRORS:
        wrong_mpp(limits, pair, factor)


def harmless(limits: Limits, what: str, pair: Pair) -> None:
    found = tried(pair)
    bad = [] if isinstance(found, Refused) or not found.is_wrong else [f"{found.median_um:.1f} µm"]
    limits.none(what, bad, 1)
    limits.told(what, outcome(found))


def wrong_mpp(limits: Limits, pair: Pair, factor: float) -> None:
    """A pixel size that is off must fail and name the true one, with which the pair passes."""
    what = f"mpp × {factor:g}"
    found = aligned(pair, mpp=pair.mpp * factor)
    limits.told(what, outcome(found))
    limits.none(f"{what}: doesn't fail", [] if found.verdict == "fail" else [found.verdict], 1)
    message = re.search(r"set mpp = ([\d.]+)", "; ".join(found.reasons))
    named = float(message[1]) if message else np.nan
    off = abs(named / pair.mpp - 1)
    limits.line(f"{what}: error of the mpp to set", off, "≤", MAX_MPP_ERROR)
    again = aligned(pair, mpp=named if message else None)
    good = again.passes and not again.is_wrong
    limits.none(f"{what}: doesn't pass with the mpp found", [] if good else [outcome(again)], 1)


def tried(pair: Pair) -> Aligned | Refused:
    try:
        return aligned(pair)
    except BadInput as refusal:
        return Refused(str(refusal))


def outcome(found: Aligned | Refused) -> str:
    if isinstance(found, Refused):
        return f"refused: {found.told}"
    placed = f", {found.median_um:.2f} µm off" if len(found.error_um) else ""
    return f"{found.verdict}{placed}: {'; '.join(found.reasons)}"


def fluorescence(rgb: Rgb) -> Rgb:
    """Blue nuclei on black: what a viewer exports of a DAPI image."""
    density = -np.log10((rgb[..., 0].astype(np.float32) + 1) / 256)
    picture = np.zeros_like(rgb)
    picture[..., 2] = np.clip(density / np.quantile(density[::8, ::8], 0.99) * 220, 0, 255)
    return picture + glass_noise(rgb)


def glass_noise(rgb: Rgb) -> Rgb:
    rng = np.random.default_rng(1)
    return rng.integers(1, 6, rgb.shape, dtype=np.uint8)


def upside_down(out: Path, pair: Pair) -> Pair:
    """The picture mirrored from top to bottom; the truth goes with it."""
    flipped = redrawn(out, pair, "upside-down", lambda rgb: np.ascontiguousarray(rgb[::-1]))
    with pair.open() as slide:
        height = slide.size_px[1]
    return replace(flipped, px=np.stack([pair.px[:, 0], height - pair.px[:, 1]], axis=1))


def sixteen_bit(out: Path, pair: Pair) -> Pair:
    path = out / f"{pair.slide.name.removesuffix('.ome.tif')}-16.ome.tif"
    if not path.exists():
        rgb = tifffile.imread(pair.slide, key=0).astype(np.uint16) * 257
        size = {"PhysicalSizeX": pair.mpp, "PhysicalSizeY": pair.mpp}
        tifffile.imwrite(
            path, rgb, photometric="rgb", tile=(512, 512), metadata={"axes": "YXS", **size}
        )
    return replace(pair, slide=path)
