"""Pairs with known truth: a slide on disk, and the nuclei that the instrument saw on its section.

Simulated pairs are painted as `cellpair simulate` does, without the DAPI and the transcripts that
the registration doesn't read. What was made stays on disk and is used again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import tifffile
from scipy.interpolate import LinearNDInterpolator

from pairing.geometry import Points
from pairing.simulate.bundle import cell_id_strings
from pairing.simulate.donor import Stain, draw_stain
from pairing.simulate.mapping import mapper
from pairing.simulate.mount import mount, scan
from pairing.simulate.params import SlideParams
from pairing.simulate.pictures import write_he
from pairing.simulate.pieces import draw_next_section, draw_section
from pairing.simulate.render import Mounted
from pairing.simulate.section import Plane
from pairing.simulate.truth import SIMULATOR_VERSION
from pairing.slide import Slide, open_slide
from shards.schema import Record

F64 = npt.NDArray[np.float64]
Rgb = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

# Coarser than a scanner's 0.2738: a quarter of the time to paint, and the registration works at
# about 0.5 µm per pixel of any slide.
MPP = 0.5
SLIDE, POINTS, RECIPE = "he.ome.tif", "points.parquet", "recipe.json"
# The slide is at least this many times as large as the box around the section.
SLIDE_SHARE = 4.0
OTHER_PIECE_SHARE = 1 / 3
# Cells that no picture shows, as many of a section's as a pair may want.
STRANGER_SHARE = 0.15
STRANGER_APART_UM = (6.0, 14.0)
JITTER_UM = 0.7
BLUR_UM = (0.4, 1.1)
ONE_IMAGE_SHARE = (0.10, 0.30)


@dataclass(frozen=True, slots=True)
class Pair:
    """A slide and n nuclei: (n, 2) in the instrument's frame and where that is on the slide.

    `missing`: on a part that the slide lacks, so that `px` shows nothing of them. `picture`: nuclei
    as the instrument's camera might show them, grey at `mpp`, where there is one.
    """

    name: str
    slide: Path
    mpp: float
    um: Points
    px: Points
    area_um2: F64
    missing: Mask
    picture: Path | None = None

    @property
    def cell_ids(self) -> list[str]:
        """Ids as the instrument's software gives them, ascending."""
        drawn = np.random.default_rng(len(self.um)).integers(0, 2**32, 2 * len(self.um) + 16)
        prefix = np.unique(drawn)[: len(self.um)].astype(np.uint32)
        ids: list[str] = cell_id_strings(prefix, "xoa-3.0").tolist()
        return ids

    @contextmanager
    def open(self, mpp: float | None = None) -> Iterator[Slide]:
        with open_slide(self.slide, mpp=mpp) as slide:
            yield slide

    def take(self, rows: npt.NDArray[np.integer] | Mask) -> Pair:
        return replace(
            self,
            um=self.um[rows],
            px=self.px[rows],
            area_um2=self.area_um2[rows],
            missing=self.missing[rows],
        )

    def error_um(self, px: Points) -> F64:
        """(n,) distances on the slide from the truth."""
        return np.asarray(np.hypot(*(px - self.px).T) * self.mpp, np.float64)


class Recipe(Record):
    """What a simulated pair is made from, and the version of the simulator that made it.

    `stain_vectors`: optical densities of other dyes in place of haematoxylin and eosin.
    """

    simulator: int = SIMULATOR_VERSION
    n_cells: int
    seed: int
    slide: SlideParams
    stain_vectors: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None

    @property
    def stain(self) -> Stain:
        drawn = draw_stain(np.random.default_rng([self.seed, 2]))
        if self.stain_vectors is None:
            return drawn
        vectors = np.array(self.stain_vectors)
        return replace(drawn, vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

    @property
    def name(self) -> str:
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()
        return f"{self.n_cells}-{self.seed}-{digest[:8]}"


def hard(seed: int, **more: float) -> SlideParams:
    """Any turn, mirrored or not, with one to three pieces of other tissue, all by the seed."""
    rng = np.random.default_rng([seed, 6])
    mirror, others = bool(rng.random() < 0.5), int(rng.integers(1, 4))
    return SlideParams.model_validate(
        {"mpp": MPP, "mirror": mirror, "other_pieces": others, **more}
    )


@dataclass(frozen=True, slots=True)
class Simulated:
    """A painted slide and its points in `folder`: nuclei and strangers of one section."""

    name: str
    folder: Path
    mpp: float
    points: pd.DataFrame

    def pair(self, warp_share: float = 1.0) -> Pair:
        """The nuclei that the instrument saw on it.

        The slide is stretched; with a `warp_share` below 1 the instrument's frame is stretched
        along, so that only this share of the largest displacement lies between the two.
        """
        return self._pair(self.points[~self.points["stranger"]], warp_share)

    def out_of_focus(self, seed: int, warp_share: float = 1.0) -> Pair:
        """The same in other focal planes: other nuclei, blurred centroids and a blurred slide.

        10 to 30 % of the nuclei, by the seed, are in one image only, half of them in each, on top
        of those 5 to 10 % in each that the simulator leaves out.
        """
        rng = np.random.default_rng([seed, 7])
        share = rng.uniform(*ONE_IMAGE_SHARE)
        blur_um = rng.uniform(*BLUR_UM)
        stranger = self.points["stranger"].to_numpy()
        nuclei, strangers = np.flatnonzero(~stranger), np.flatnonzero(stranger)
        n = round(share / 2 * len(nuclei))
        chosen = [rng.permutation(nuclei)[n:], rng.permutation(strangers)[:n]]
        pair = self._pair(self.points.iloc[np.sort(np.concatenate(chosen))], warp_share)
        path = self.folder / f"blurred-{seed}.ome.tif"
        if not path.exists():
            rgb = tifffile.imread(self.folder / SLIDE, key=0)
            blurred = cv2.GaussianBlur(rgb, (0, 0), blur_um / self.mpp)
            write_slide(path, np.asarray(blurred, np.uint8), self.mpp)
        um = pair.um + JITTER_UM * rng.standard_normal(pair.um.shape)
        # The truth is that of the place, not of the nucleus: linear between nuclei 15 µm apart.
        px = LinearNDInterpolator(pair.um, pair.px)(um)
        moved = np.isfinite(px).all(axis=1)[:, None]
        return replace(
            pair, slide=path, um=np.where(moved, um, pair.um), px=np.where(moved, px, pair.px)
        )

    def _pair(self, rows: pd.DataFrame, warp_share: float) -> Pair:
        flat = rows[["x_um", "y_um"]].to_numpy()
        stretched = rows[["stretched_x_um", "stretched_y_um"]].to_numpy()
        return Pair(
            name=self.name,
            slide=self.folder / SLIDE,
            mpp=self.mpp,
            um=stretched + warp_share * (flat - stretched),
            px=rows[["x_px", "y_px"]].to_numpy(),
            area_um2=rows["area_um2"].to_numpy(),
            missing=rows["missing"].to_numpy(),
        )


def simulated(
    out: Path, n_cells: int, seed: int, slide: SlideParams, workers: int = 1, **more: object
) -> Simulated:
    """The pair of a recipe, painted into a folder of `out` unless it is there already."""
    recipe = Recipe.model_validate({"n_cells": n_cells, "seed": seed, "slide": slide, **more})
    folder = out / recipe.name
    if not folder.exists():
        aside = folder.with_name(f".{recipe.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _paint(aside, recipe, workers)
        aside.rename(folder)
    return Simulated(recipe.name, folder, slide.mpp, pd.read_parquet(folder / POINTS))


def _paint(folder: Path, recipe: Recipe, workers: int) -> None:
    seeds = np.random.SeedSequence(recipe.seed).spawn(6)
    place, deeper, others, lay, strangers, sizes = (np.random.default_rng(s) for s in seeds)
    slide = recipe.slide
    tissue = draw_section(place, recipe.n_cells)
    shown = draw_next_section(deeper, tissue) if slide.serial_section else tissue
    n_other = max(60, round(recipe.n_cells * OTHER_PIECE_SHARE))
    pieces = [draw_section(others, n_other) for _ in range(slide.other_pieces)]
    mounted, size_px = mount(lay, shown, pieces, slide)
    if slide.other_pieces:
        size_px = _larger(sizes, mounted[0], size_px)
    nuclei = tissue.nuclei
    seen = np.flatnonzero(nuclei.in_dapi)
    um = nuclei.centres_um[seen]
    other_um = _strangers(strangers, um)
    points = np.concatenate([um, other_um])
    slide_map = mounted[0].slide_map
    stretched = points if slide_map.warp is None else slide_map.warp.stretch(points)
    px = slide_map.px_from_um(points)
    area = np.concatenate([nuclei.area_um2[seen], np.full(len(other_um), np.nan)])
    frame = {
        "x_um": points[:, 0],
        "y_um": points[:, 1],
        "stretched_x_um": stretched[:, 0],
        "stretched_y_um": stretched[:, 1],
        "x_px": px[:, 0],
        "y_px": px[:, 1],
        "area_um2": np.where(np.isnan(area), np.median(nuclei.area_um2[seen]), area),
        "stranger": np.arange(len(points)) >= len(um),
        **slide_map.flags(points),
    }
    pd.DataFrame(frame).to_parquet(folder / POINTS)
    (folder / RECIPE).write_text(recipe.model_dump_json(indent=1) + "\n")
    scratch = folder / "scratch"
    scratch.mkdir()
    picture = scan(scratch, mounted, size_px, recipe.stain, recipe.seed, mapper(workers))
    write_slide(folder / SLIDE, picture.rgb, slide.mpp, recipe.stain.quality)
    shutil.rmtree(scratch)


def _larger(
    rng: np.random.Generator, section: Mounted, size_px: tuple[int, int]
) -> tuple[int, int]:
    """More glass below, until the slide is SLIDE_SHARE times as large as the section."""
    own = np.ptp(section.centres_px, axis=0)
    share = SLIDE_SHARE * rng.uniform(1.0, 1.1)
    return size_px[0], max(size_px[1], round(share * own[0] * own[1] / size_px[0]))


def _strangers(rng: np.random.Generator, um: Points) -> Points:
    """Places on the tissue, each beside a nucleus."""
    beside = um[rng.permutation(len(um))[: round(STRANGER_SHARE * len(um))]]
    angle = rng.uniform(0, 2 * np.pi, len(beside))
    apart = rng.uniform(*STRANGER_APART_UM, len(beside))
    moved: Points = beside + apart[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return moved


def write_slide(path: Path, rgb: Plane, mpp: float, quality: int = 85) -> None:
    """A JPEG pyramid that is there whole or not at all."""
    aside = path.with_name(f".{path.name}")
    write_he(aside, rgb, mpp, "jpeg", quality)
    aside.rename(path)
