"""Random crops of labelled tiles, as another laboratory might have stained and scanned them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

# Haematoxylin, eosin and a third direction orthogonal to both, as unit optical densities
# (Ruifrok and Johnston 2001): only a frame in which stains are perturbed.
_HE = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
_STAINS = np.vstack([_HE, np.cross(_HE[0], _HE[1])])
_STAINS /= np.linalg.norm(_STAINS, axis=1, keepdims=True)

Pixels = npt.NDArray[Any]  # floating, (Y, X, channels)


@dataclass(frozen=True, slots=True)
class Example:
    """`density` (Y, X, 3) and `target` (Y, X, 3): inside a nucleus or not, flow y, flow x."""

    density: Pixels
    target: Pixels
    weight: float  # relative chance to be drawn


def restained(density: Pixels, rng: np.random.Generator) -> Pixels:
    """The same tissue in another stain, scanner and focus: what the left-out groups differ in."""
    if rng.random() < 0.5:
        density = density - np.percentile(density, 2, axis=(0, 1))
    stains = _STAINS + rng.normal(0, [[0.15], [0.2], [0.1]], (3, 3))
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    amounts = np.exp(rng.uniform([-0.5, -0.8, -0.8], [0.5, 0.8, 0.2]))
    density = density @ (np.linalg.inv(_STAINS) * amounts @ stains).astype(np.float32)
    if rng.random() < 0.2:
        grey = rng.random() * density.mean(axis=2, keepdims=True)
        density = density * rng.random() + grey
    density = np.maximum(density, 0) ** np.float32(rng.uniform(0.8, 1.25))
    if rng.random() < 0.5:
        density = density + rng.uniform(0, 0.2, 3).astype(np.float32)
    focus = rng.random()
    if focus < 0.4:
        density = cv2.GaussianBlur(density, (0, 0), rng.uniform(0.3, 1.2))
    elif focus < 0.6:
        soft = cv2.GaussianBlur(density, (0, 0), 1.0)
        density = density + rng.uniform(0.3, 1.0) * (density - soft)
    if rng.random() < 0.5:
        noise = rng.standard_normal(density.shape, np.float32)
        density = density + rng.uniform(0, 0.04) * noise
    return np.clip(density, 0, np.log10(255)).astype(np.float32)


def random_crop(
    example: Example, size_px: int, rng: np.random.Generator
) -> tuple[Pixels, Pixels, Pixels]:
    """A turned, scaled, mirrored and restained crop: density, target, and where the tile is.

    Outside the tile the density is 0, as in Cellpose's padding, and nothing is learned.
    """
    height, width = example.density.shape[:2]
    angle, scale = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(-0.3, 0.3))
    mirror = rng.choice([-1.0, 1.0])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turn = turn @ np.diag([mirror, 1.0])
    linear = scale * turn
    # The crop's centre lies anywhere in the tile that leaves it mostly inside.
    margin = np.minimum(0.35 * size_px / scale, 0.5 * np.array([width, height]))
    centre = rng.uniform(margin, np.array([width, height]) - margin)
    crop_from_tile = np.column_stack([linear, size_px / 2 - linear @ centre])
    size = (size_px, size_px)
    density = cv2.warpAffine(restained(example.density, rng), crop_from_tile, size)
    target = cv2.warpAffine(example.target, crop_from_tile, size)
    inside = cv2.warpAffine(np.ones((height, width), np.float32), crop_from_tile, size)
    flow_xy = target[..., [2, 1]] @ turn.T.astype(np.float32)
    target = np.concatenate([target[..., :1] > 0.5, flow_xy[..., ::-1]], axis=2)
    return density, target.astype(np.float32), (inside > 0.99).astype(np.float32)
