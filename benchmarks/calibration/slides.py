"""Figures of H&E slides: colour, nuclei by their labels, nuclei as one network finds them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import tifffile
from scipy.ndimage import center_of_mass
from scipy.spatial import cKDTree

from segmentation.network import NucleusNetwork
from segmentation.tiles import LabelledTile, Labels

Rgb = npt.NDArray[np.uint8]
F64 = npt.NDArray[np.float64]
MPP = 0.5
CHANNELS = ("red", "green", "blue")
TISSUE_OD = 0.08  # mean of the channels
# Of the labelled tiles these show haematoxylin and eosin of a section; the others are smears or
# another stain.
HE_TILES = ("4193474b", "57bd029b", "87ea7289", "8f27ebc7")
WINDOW_PX = 512
N_PIXELS = 100_000  # of a figure and slide: as many as a histogram needs
N_WINDOWS = 8


def read_slide(path: Path, mpp: float) -> Rgb:
    """Level 0 of a slide of the given pixel size, resampled to MPP."""
    rgb = tifffile.imread(path, key=0)
    size = (round(rgb.shape[1] * mpp / MPP), round(rgb.shape[0] * mpp / MPP))
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def optical_density(rgb: Rgb, white: npt.ArrayLike) -> F64:
    """(…, 3) optical density of RGB against the light of the glass."""
    return -np.log10(np.maximum(rgb, 1) / np.asarray(white, np.float64))


def glass_of(rgb: Rgb) -> F64:
    """The light of the empty glass of a slide that shows some: the 99.5th percentile."""
    return np.asarray(np.percentile(rgb.reshape(-1, 3), 99.5, axis=0))


def measure_colour(density: F64) -> dict[str, F64]:
    """Optical density of the tissue pixels by channel."""
    flat = density.reshape(-1, 3)
    flat = flat[flat.mean(axis=1) > TISSUE_OD]
    return _by_channel("optical density of tissue", flat)


def _by_channel(what: str, density: F64) -> dict[str, F64]:
    thinned = density[:: max(1, len(density) // N_PIXELS)]
    return {f"{what}, {name}": thinned[:, c] for c, name in enumerate(CHANNELS)}


def measure_truth(folder: Path) -> dict[str, F64]:
    """Nuclei of a simulated slide."""
    nuclei = pd.read_parquet(folder / "truth" / "he_nuclei.parquet")
    points = nuclei[["x_um", "y_um"]].to_numpy()
    return _of_nuclei("labels", nuclei["area_um2"].to_numpy(), [points])


def measure_tiles(tiles: list[LabelledTile]) -> dict[str, F64]:
    """Nuclei of labelled tiles at their mpp by convention, those on the border left out."""
    areas, points = [], []
    for tile in tiles:
        area, centres = _whole_nuclei(tile.labels, tile.mpp)
        areas.append(area)
        points.append(centres)
    return _of_nuclei("labels", np.concatenate(areas), points)


def measure_found(rgb: Rgb, network: NucleusNetwork) -> dict[str, F64]:
    """Nuclei that the network finds in the windows with most tissue of a slide at MPP."""
    density = optical_density(rgb, glass_of(rgb))
    tissue = density.mean(axis=2) > TISSUE_OD
    corners = [
        (y, x)
        for y in range(0, rgb.shape[0] - WINDOW_PX + 1, WINDOW_PX)
        for x in range(0, rgb.shape[1] - WINDOW_PX + 1, WINDOW_PX)
    ]
    corners.sort(key=lambda c: -tissue[c[0] : c[0] + WINDOW_PX, c[1] : c[1] + WINDOW_PX].mean())
    areas, points, inside, between = [], [], [], []
    for y, x in corners[:N_WINDOWS]:
        window = slice(y, y + WINDOW_PX), slice(x, x + WINDOW_PX)
        found, _ = network.find(rgb[window])
        inside.append(density[window][found > 0])
        between.append(density[window][(found == 0) & tissue[window]])
        area, centres = _whole_nuclei(found, MPP)
        areas.append(area)
        points.append(centres)
    n_per_mm2 = sum(map(len, points)) / (sum(map(len, inside + between)) * MPP**2) * 1e6
    return {
        **_of_nuclei("found", np.concatenate(areas), points),
        "nuclei found per mm² of tissue": np.array([n_per_mm2]),
        **_by_channel("optical density of nuclei found", np.concatenate(inside)),
        **_by_channel("optical density between them", np.concatenate(between)),
    }


def _whole_nuclei(labels: Labels, mpp: float) -> tuple[F64, F64]:
    """(n,) areas in µm² and (n, 2) centres in µm of the nuclei that no border cuts."""
    area_px = np.bincount(labels.ravel())
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    area_px[edge] = 0
    rows = np.flatnonzero(area_px[1:]) + 1
    centres = np.array(center_of_mass(labels > 0, labels, rows)).reshape(-1, 2)
    return np.asarray(area_px[rows] * mpp**2, np.float64), centres * mpp


def _of_nuclei(how: str, area_um2: F64, points: list[F64]) -> dict[str, F64]:
    near = [cKDTree(p).query(p, k=2)[0][:, 1] for p in points if len(p) > 1]
    return {
        f"nucleus area on H&E, {how}, µm²": area_um2,
        f"nucleus area on H&E, {how}, sigma of ln": np.atleast_1d(np.log(area_um2).std()),
        f"nearest nucleus on H&E, {how}, µm": np.concatenate(near),
    }
