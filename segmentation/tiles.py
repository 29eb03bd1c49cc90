"""Real labelled tiles: read, given a pixel size by convention, resampled to a network's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from shards.errors import BadInput

# The tiles come without a pixel size. By convention of the data's README each gets the one at
# which its median labelled nucleus is this wide, in training and in scoring alike.
MEDIAN_NUCLEUS_UM = 8.0

Rgb = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class LabelledTile:
    """One picture and its instance labels: `rgb` (Y, X, 3), `labels` (Y, X), 0 is background."""

    tile_id: str
    rgb: Rgb
    labels: Labels
    mpp: float

    @property
    def n_nuclei(self) -> int:
        return len(np.unique(self.labels[self.labels > 0]))


def mpp_by_convention(labels: Labels) -> float:
    """Microns per pixel at which the median equivalent diameter of the nuclei is 8 µm."""
    area_px = np.bincount(labels.ravel())[1:]
    diameter_px = 2 * np.sqrt(area_px[area_px > 0] / np.pi)
    return float(MEDIAN_NUCLEUS_UM / np.median(diameter_px))


def read_tiles(folder: Path) -> list[LabelledTile]:
    """All tiles `<id>_he.png` with `<id>_labels.png` of a folder, in the order of their ids.

    Raises BadInput where the folder holds none or a tile has no labels.
    """
    tiles = []
    for he_path in sorted(folder.glob("*_he.png")):
        tile_id = he_path.name.removesuffix("_he.png")
        labels_path = folder / f"{tile_id}_labels.png"
        if not labels_path.is_file():
            raise BadInput(
                he_path,
                expected=f"its labels in {labels_path.name}",
                found="no such file",
                remedy="copy the folder again",
            )
        with Image.open(he_path) as he, Image.open(labels_path) as label_image:
            rgb = np.asarray(he.convert("RGB"))
            labels = np.asarray(label_image).astype(np.int32)
        tiles.append(LabelledTile(tile_id, rgb, labels, mpp_by_convention(labels)))
    if not tiles:
        raise BadInput(
            folder,
            expected="tiles named <id>_he.png and <id>_labels.png",
            found="none",
            remedy="name the folder that holds the labelled tiles",
        )
    return tiles


def content_sha256(tiles: list[LabelledTile]) -> str:
    """SHA-256 over ids, pixels and labels: what the tiles are, wherever they lie."""
    total = hashlib.sha256()
    for tile in tiles:
        total.update(f"{tile.tile_id} {tile.rgb.shape}".encode())
        total.update(tile.rgb.tobytes())
        total.update(tile.labels.tobytes())
    return total.hexdigest()


def resampled(tile: LabelledTile, mpp: float) -> LabelledTile:
    """The tile at another pixel size: pixels by area (down) or cubic (up), labels by nearest."""
    scale = tile.mpp / mpp
    size = (round(tile.rgb.shape[1] * scale), round(tile.rgb.shape[0] * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    rgb = cv2.resize(tile.rgb, size, interpolation=how).astype(np.uint8)
    labels = cv2.resize(tile.labels.astype(np.float32), size, interpolation=cv2.INTER_NEAREST_EXACT)
    return LabelledTile(tile.tile_id, rgb, labels.astype(np.int32), mpp)
