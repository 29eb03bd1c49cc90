"""Pairs derived from a real H&E: its nuclei by another detector, the slide turned and stretched.

Both images come from the same pixels, which is the best case of a section.
"""
# mypy: disable-error-code=no-untyped-call
# scikit-image has no types.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import tifffile
from skimage.color import rgb2hed
from skimage.measure import regionprops_table

from benchmarks.registration.pairs import Pair, Rgb, write_slide
from pairing.geometry import Affine, Points
from pairing.simulate.params import SlideParams
from pairing.simulate.slide_map import SlideMap
from segmentation.network import NucleusNetwork

F64 = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int32]

SLIDE, MPP = Path("slides") / "CMU-1-Small-Region.svs", 0.499
GLASS = (243, 243, 243)
DROPPED, STRANGERS = 0.15, 0.10
STRANGER_APART_UM = (6.0, 14.0)
# The part of the slide whose cells the instrument measured: x0, y0, x1, y1 in shares of it.
CROPS = {
    "whole": (0.0, 0.0, 1.0, 1.0),
    "left": (0.0, 0.0, 0.6, 1.0),
    "lower": (0.0, 0.4, 1.0, 1.0),
    "middle": (0.2, 0.2, 0.9, 0.8),
}
_TILE_PX, _HALO_PX = 1024, 64


@dataclass(frozen=True, slots=True)
class Picture:
    """A real slide in memory, with the µm per pixel that it is taken to have."""

    name: str
    rgb: Rgb
    mpp: float

    @classmethod
    def read(cls, path: Path, mpp: float) -> Picture:
        return cls(path.stem, np.asarray(tifffile.imread(path, key=0), np.uint8), mpp)

    def nuclei(self, network: NucleusNetwork) -> pd.DataFrame:
        """x_um, y_um and area_um2 of its nuclei, by a network at its own pixel size."""
        times = self.mpp / network.mpp
        resized = cv2.resize(self.rgb, None, fx=times, fy=times, interpolation=cv2.INTER_CUBIC)
        height, width = self.rgb.shape[:2]
        found = _found_nuclei(np.asarray(resized, np.uint8), lambda rgb: network.find(rgb)[0])
        x = found["x_px"] * width / resized.shape[1]
        y = found["y_px"] * height / resized.shape[0]
        area = found["area_px"] * (self.mpp / times) ** 2
        return pd.DataFrame({"x_um": x * self.mpp, "y_um": y * self.mpp, "area_um2": area})


def _found_nuclei(rgb: Rgb, find: Callable[[Rgb], Labels]) -> pd.DataFrame:
    """x_px, y_px and area_px of the nuclei that `find` labels, in tiles that overlap."""
    parts = []
    height, width = rgb.shape[:2]
    for y in range(0, height, _TILE_PX):
        for x in range(0, width, _TILE_PX):
            x0, y0 = max(x - _HALO_PX, 0), max(y - _HALO_PX, 0)
            tile = rgb[y0 : y + _TILE_PX + _HALO_PX, x0 : x + _TILE_PX + _HALO_PX]
            table = pd.DataFrame(regionprops_table(find(tile), properties=("centroid", "area")))
            at_x, at_y = table["centroid-1"] + x0 + 0.5, table["centroid-0"] + y0 + 0.5
            own = (at_x >= x) & (at_x < x + _TILE_PX) & (at_y >= y) & (at_y < y + _TILE_PX)
            frame = {"x_px": at_x, "y_px": at_y, "area_px": table["area"]}
            parts.append(pd.DataFrame(frame)[own])
    return pd.concat(parts, ignore_index=True)


def derived(
    out: Path,
    picture: Picture,
    nuclei: pd.DataFrame,
    warp_um: float,
    seed: int,
    crop: Sequence[float] = CROPS["whole"],
) -> Pair:
    """The picture on a slide of its own, turned, mirrored by the seed and stretched by `warp_um`.

    The instrument has the `nuclei`, (x_um, y_um, area_um2) on the picture, that lie in the `crop`:
    15 % are dropped and 10 % strangers beside nuclei added.
    """
    rng = np.random.default_rng([seed, 10])
    rgb, mpp = picture.rgb, picture.mpp
    height_um, width_um = (n * mpp for n in rgb.shape[:2])
    low, high = np.reshape(crop, (2, 2)) * (width_um, height_um)
    points = nuclei[["x_um", "y_um"]].to_numpy()
    inside = np.flatnonzero(((points >= low) & (points < high)).all(axis=1))
    kept = np.sort(rng.permutation(inside)[round(DROPPED * len(inside)) :])
    beside = rng.choice(kept, round(STRANGERS * len(kept)), replace=False)
    angle, apart = (
        rng.uniform(0, 2 * np.pi, len(beside)),
        rng.uniform(*STRANGER_APART_UM, len(beside)),
    )
    other = points[beside] + apart[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    um = np.concatenate([points[kept], other])
    area = nuclei["area_um2"].to_numpy()
    params = SlideParams(mpp=mpp, warp_um=warp_um, mirror=bool(rng.random() < 0.5))
    slide_map, size_px = _on_a_slide(rng, params, (width_um, height_um), points)
    name = f"{picture.name}-{seed}-{warp_um:g}"
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    path, dye = folder / "he.ome.tif", folder / "haematoxylin.png"
    if not path.exists():
        cv2.imwrite(str(dye), _haematoxylin(rgb))
        write_slide(path, _resampled(rgb, mpp, slide_map, size_px), mpp, 90)
    return Pair(
        name=name,
        slide=path,
        mpp=mpp,
        um=um,
        px=slide_map.px_from_um(um),
        area_um2=np.concatenate([area[kept], area[beside]]),
        missing=np.zeros(len(um), bool),
        picture=dye,
    )


def _on_a_slide(
    rng: np.random.Generator, params: SlideParams, size_um: tuple[float, float], points: Points
) -> tuple[SlideMap, tuple[int, int]]:
    """A map that puts the picture on a slide with a little glass around, and the slide's size."""
    turn = float(rng.uniform(0, 2 * np.pi))
    um_from_px = Affine.similarity(params.mpp, turn, (0.0, 0.0), mirror=params.mirror)
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]]) * size_um
    px = um_from_px.inverse(corners)
    margin = (params.warp_um + 60) / params.mpp
    shift = np.floor(px.min(axis=0) - margin)
    moved = um_from_px @ Affine.similarity(1.0, 0.0, (float(shift[0]), float(shift[1])))
    width, height = np.ceil(px.max(axis=0) + margin - shift).astype(int).tolist()
    return SlideMap.draw(rng, params, moved, points, size_um), (width, height)


def _resampled(rgb: Rgb, mpp: float, slide_map: SlideMap, size_px: tuple[int, int]) -> Rgb:
    width, height = size_px
    out = np.empty((height, width, 3), np.uint8)
    for y in range(0, height, _TILE_PX):
        rows = min(_TILE_PX, height - y)
        (view,) = slide_map.views(0, y, width, rows)
        # cv2 counts from the middle of the first pixel.
        x_px, y_px = view.x_um / np.float32(mpp) - 0.5, view.y_um / np.float32(mpp) - 0.5
        out[y : y + rows] = cv2.remap(
            rgb, x_px, y_px, cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT, borderValue=GLASS
        )
    return out


def _haematoxylin(rgb: Rgb) -> npt.NDArray[np.uint8]:
    """What a method that wants a picture of nuclei gets: the dye, bright."""
    dye = cv2.GaussianBlur(rgb2hed(rgb)[..., 0].astype(np.float32), (0, 0), 1.0)
    low, high = np.percentile(dye, (1, 99.8))
    return np.asarray(np.clip((dye - low) / (high - low), 0, 1) * 255, np.uint8)
