"""Unlabelled pictures, labelled by a network that another one is to learn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pairing.slide import PICTURE_SUFFIXES, TIFF_SUFFIXES, Slide, open_slide
from segmentation.blocks import tissue_mask
from segmentation.tiles import LabelledTile, Labels, Rgb
from shards.errors import BadInput


@dataclass(frozen=True, slots=True)
class Teaching:
    """A network to learn from: its weights, and unlabelled pictures of `mpp` µm a pixel."""

    teacher: str
    pictures: Path
    mpp: float


def taught_tiles(
    teaching: Teaching, teacher_mpp: float, find: Callable[[Rgb], Labels], mpp: float
) -> list[LabelledTile]:
    """All PNG, JPEG and TIFF pictures of a folder at `mpp`, with the masks that a teacher finds.

    `find` gets each picture at the teacher's own pixel size; its labels are brought to `mpp` by
    the nearest. Raises BadInput where the folder holds no picture, one is unreadable or shows
    nothing but glass, or the teacher finds no nucleus in any.
    """
    paths = [
        path
        for path in sorted(teaching.pictures.glob("*"))
        if path.suffix.lower() in PICTURE_SUFFIXES | TIFF_SUFFIXES
    ]
    if not paths:
        raise BadInput(
            teaching.pictures,
            expected="a folder of PNG, JPEG or TIFF pictures of tissue",
            found="none" if teaching.pictures.is_dir() else "no such folder",
            remedy="name the folder that holds the unlabelled tiles",
        )
    tiles = []
    for path in paths:
        with open_slide(path, mpp=teaching.mpp) as slide:
            slide.require_rgb()
            if not tissue_mask(slide).any():
                raise BadInput(
                    path,
                    expected="a picture of tissue",
                    found="nothing but glass",
                    remedy="remove it from the folder",
                )
            labels = find(_whole(slide, teacher_mpp))
            rgb = _whole(slide, mpp)
        size = (rgb.shape[1], rgb.shape[0])
        there = cv2.resize(labels.astype(np.float32), size, interpolation=cv2.INTER_NEAREST_EXACT)
        tiles.append(LabelledTile(path.name, rgb, there.astype(np.int32), mpp))
    if not any(tile.labels.any() for tile in tiles):
        raise BadInput(
            teaching.pictures,
            expected="pictures in which the teacher finds nuclei",
            found=f"no nucleus in {len(tiles)} pictures at {teaching.mpp:g} µm a pixel",
            remedy="check --mpp and the teacher's weights",
        )
    return tiles


def _whole(slide: Slide, mpp: float) -> Rgb:
    width, height = (round(n_px * slide.mpp / mpp) for n_px in slide.size_px)
    return np.ascontiguousarray(slide.read_at((0, 0, width, height), mpp), np.uint8)
