"""Outlines of labelled masks as the instrument gives them: simplified, on pixel corners."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pairing.simulate.section import I64, Rings

MAX_VERTICES = 25  # of a closed ring, its first vertex repeated


def mask_polygons(labels: npt.NDArray[np.int32]) -> list[npt.NDArray[np.float64]]:
    """One closed ring (k, 2) in pixels (x, y) for each of labels 1, 2, …, n; k ≤ MAX_VERTICES.

    A mask in several pieces gives its largest. Raises ValueError where a label has no pixel.
    """
    rings = []
    for label, window in enumerate(ndimage.find_objects(labels), start=1):
        if window is None:
            raise ValueError(f"label {label} has no pixel")
        offset = np.array([window[1].start, window[0].start])
        rings.append(mask_outline(labels[window] == label) + offset)
    return rings


def mask_outline(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """The closed ring (k, 2) in pixels (x, y) about the largest piece of a mask (Y, X)."""
    # The corners of its pixels: their outer border is the outline on pixel corners.
    corners = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.uint8)
    for dy in (0, 1):
        for dx in (0, 1):
            corners[dy : dy + mask.shape[0], dx : dx + mask.shape[1]] |= mask
    pieces, _ = cv2.findContours(corners, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outline = max(pieces, key=cv2.contourArea)[:, 0].astype(np.float64)
    if len(outline) >= MAX_VERTICES:
        even = np.linspace(0, len(outline), MAX_VERTICES - 1, endpoint=False)
        outline = outline[even.astype(int)]
    return np.concatenate([outline, outline[:1]])


def rings_um(outlines: list[npt.NDArray[np.float64]], pixel_um: float) -> Rings:
    """Rings in pixels, one after another, in µm."""
    start = np.concatenate([[0], np.cumsum([len(ring) for ring in outlines])]).astype(np.int64)
    vertices = np.concatenate(outlines) if outlines else np.zeros((0, 2))
    return Rings(vertices * pixel_um, start)


def taken(rings: Rings, rows: I64) -> Rings:
    """Those rings of the rows, in their order."""
    size = np.diff(rings.start)[rows]
    start = np.concatenate([[0], np.cumsum(size)])
    within = np.arange(start[-1]) - np.repeat(start[:-1], size)
    return Rings(rings.vertices_um[np.repeat(rings.start[rows], size) + within], start)


def thinned(rings: Rings, max_vertices: int) -> Rings:
    """The same rings with evenly chosen vertices, `max_vertices` at most, each closed.

    A ring without vertices, of a mask without pixels, stays one.
    """
    size = np.diff(rings.start)
    n_corners = np.maximum(size - 1, 0)
    kept = np.minimum(n_corners, max_vertices - 1)
    size = np.where(size > 0, kept + 1, 0)
    start = np.concatenate([[0], np.cumsum(size)])
    ring = np.repeat(np.arange(len(kept)), size)
    # The last one comes round to the first.
    number = (np.arange(start[-1]) - start[ring]) % kept[ring]
    picked = rings.start[ring] + number * n_corners[ring] // kept[ring]
    return Rings(rings.vertices_um[picked], start)
