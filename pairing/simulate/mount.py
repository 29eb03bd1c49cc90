"""Sections on a slide: where each lies, and the picture that the scanner takes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec

from pairing.geometry import Affine
from pairing.simulate.donor import Stain
from pairing.simulate.mapping import MapBlocks
from pairing.simulate.params import SlideParams
from pairing.simulate.render import Mounted, paint_he
from pairing.simulate.slide_map import SlideMap
from pairing.simulate.tissue import Tissue

F64 = npt.NDArray[np.float64]

BLOCK_PX = 2048
_CHUNK_PX = 512
_MARGIN_UM = (45.0, 85.0, 60.0, 40.0)  # glass beyond the cells: left, right, top, bottom
_BETWEEN_PIECES_UM = 250.0


@dataclass(frozen=True, slots=True)
class SlidePicture:
    """The scanned slide in scratch: RGB (Y, X, 3) and 1 + row of the nucleus at each pixel."""

    rgb: zarr.Array[Any]
    nucleus: zarr.Array[Any]


def mount(
    rng: np.random.Generator, section: Tissue, others: list[Tissue], params: SlideParams
) -> tuple[list[Mounted], tuple[int, int]]:
    """The section and other pieces side by side on one slide, and its (width, height) in px.

    The section comes first in the list, wherever it lies.
    """
    drawn_deg = float(rng.uniform(0, 360))
    turn_deg = drawn_deg if params.rotation_deg is None else params.rotation_deg
    maps = [_turned(rng, section, params, turn_deg)]
    plain = SlideParams(mpp=params.mpp, mirror=params.mirror)
    maps += [_turned(rng, piece, plain, float(rng.uniform(0, 360))) for piece in others]
    tissues = [section, *others]
    left, right, top, bottom = (margin / params.mpp for margin in _MARGIN_UM)
    mounted: list[Mounted] = [Mounted.of(t, m) for t, m in zip(tissues, maps, strict=True)]
    x, y, height = left, top, 0.0
    for k in rng.permutation(len(mounted)).tolist():
        low, high = mounted[k].centres_px.min(axis=0), mounted[k].centres_px.max(axis=0)
        corner = Affine.similarity(1.0, 0.0, (float(low[0] - x), float(low[1] - y)))
        moved = replace(maps[k], um_from_px=maps[k].um_from_px @ corner)
        mounted[k] = Mounted.of(tissues[k], moved)
        x += float(high[0] - low[0]) + _BETWEEN_PIECES_UM / params.mpp
        height = max(height, float(high[1] - low[1]))
    width = x - _BETWEEN_PIECES_UM / params.mpp + right
    return mounted, (round(width), round(top + height + bottom))


def _turned(
    rng: np.random.Generator, tissue: Tissue, params: SlideParams, turn_deg: float
) -> SlideMap:
    um_from_px = Affine.similarity(
        params.mpp, float(np.deg2rad(turn_deg)), (0.0, 0.0), mirror=params.mirror
    )
    size_um = (tissue.width_um, tissue.height_um)
    return SlideMap.draw(rng, params, um_from_px, tissue.nuclei.centres_um, size_um)


def scan(
    scratch: Path,
    mounted: list[Mounted],
    size_px: tuple[int, int],
    stain: Stain,
    seed: int,
    map_blocks: MapBlocks,
) -> SlidePicture:
    """Paint the slide block by block into `scratch`."""
    width, height = size_px
    codec = BloscCodec(cname="lz4", clevel=1, shuffle="shuffle")
    rgb: zarr.Array[Any] = zarr.create_array(
        scratch / "rgb.zarr", shape=(height, width, 3), chunks=(_CHUNK_PX, _CHUNK_PX, 3),
        dtype="uint8", compressors=codec,
    )  # fmt: skip
    nucleus: zarr.Array[Any] = zarr.create_array(
        scratch / "he-nucleus.zarr", shape=(height, width), chunks=(_CHUNK_PX, _CHUNK_PX),
        dtype="uint32", compressors=codec,
    )  # fmt: skip

    def paint(corner: tuple[int, int]) -> None:
        y0, x0 = corner
        y1, x1 = min(y0 + BLOCK_PX, height), min(x0 + BLOCK_PX, width)
        picture, labels = paint_he(mounted, stain, (x0, y0, x1, y1), (seed, 13))
        rgb[y0:y1, x0:x1] = picture
        nucleus[y0:y1, x0:x1] = labels.astype(np.uint32)

    corners = [(y, x) for y in range(0, height, BLOCK_PX) for x in range(0, width, BLOCK_PX)]
    for _ in map_blocks(paint, corners):
        pass
    return SlidePicture(rgb, nucleus)


def given_alignment(section: Mounted, morphology_um: float) -> Affine:
    """What a person would align by hand: the similarity that fits the cells best.

    Morphology px from slide px. Exact where the section was only turned, mirrored and scaled.
    """
    if section.slide_map.is_affine:
        um_from_px = section.slide_map.um_from_px
    else:
        um_from_px = _similarity(section.centres_px, section.tissue.nuclei.centres_um)
    return Affine.scale(1 / morphology_um) @ um_from_px


def _similarity(src: F64, dst: F64) -> Affine:
    """Least squares over turns, mirror images, scales and shifts: Umeyama, PAMI 1991;13:376."""
    src_mean, dst_mean = src.mean(axis=0), dst.mean(axis=0)
    a, b = src - src_mean, dst - dst_mean
    u, _, vt = np.linalg.svd(b.T @ a)
    # Mirror images are allowed, so no sign is forced.
    turn = u @ vt
    scale = float((b * (a @ turn.T)).sum() / (a * a).sum())
    shift = dst_mean - scale * turn @ src_mean
    return Affine.of(np.vstack([np.column_stack([scale * turn, shift]), [0, 0, 1]]))
