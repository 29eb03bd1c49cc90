"""Outlines of labelled masks as the instrument gives them: simplified, on pixel corners."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage

MAX_VERTICES = 25  # of a closed ring, its first vertex repeated


def mask_polygons(labels: npt.NDArray[np.int32]) -> list[npt.NDArray[np.float64]]:
    """One closed ring (k, 2) in pixels (x, y) for each of labels 1, 2, …, n; k ≤ MAX_VERTICES.

    A mask in several pieces gives its largest. Raises ValueError where a label has no pixel.
    """
    rings = []
    for label, window in enumerate(ndimage.find_objects(labels), start=1):
        if window is None:
            raise ValueError(f"label {label} has no pixel")
        mask = labels[window] == label
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
        offset = (window[1].start, window[0].start)
        rings.append(np.concatenate([outline, outline[:1]]) + offset)
    return rings
