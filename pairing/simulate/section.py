"""All that the instrument knows of a section: what the simulated tissue hands to the bundle.

Large things are handed over block by block or sliceable, so that memory is bounded by blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy import sparse

from pairing.simulate.panel import Feature

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

PIXEL_UM = 0.2125


class Plane(Protocol):
    """A picture or label image that is read as it is sliced: a numpy array or a zarr array."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    def __getitem__(self, key: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Rings:
    """n closed rings: vertices (k, 2) in µm, ring i is vertices[start[i] : start[i + 1]]."""

    vertices_um: F64
    start: I64  # (n + 1,)


@dataclass(frozen=True, slots=True)
class Masses:
    """Centroid (NaN where there is none) and area of n masks, in µm and µm²."""

    x_um: F64
    y_um: F64
    area_um2: F64


@dataclass(frozen=True, slots=True)
class Transcripts:
    """k transcripts in file order; positions and distances already in steps of 1/64 µm."""

    cell: I64  # row of the instrument's cell, -1 unassigned
    feature: I64  # row of the matrix
    codeword: I64
    x_um: F64
    y_um: F64
    z_um: F64
    qv: F64
    in_nucleus: npt.NDArray[np.bool_]
    nucleus_distance_um: F64


@dataclass(frozen=True, slots=True)
class Section:
    """n cells and m nuclei as the instrument segmented them.

    Cells are in file order and their raster label is their row + 1; nuclei are numbered from 1
    without gaps, and a cell may own none, one or several.
    """

    name: str
    prefix: npt.NDArray[np.uint32]  # (n,) ascending: the cell ids
    nucleus_labels: Plane  # (H, W) in the morphology frame
    cell_labels: Plane
    cell_of_nucleus: I64  # (m,) row of the cell
    cells: Masses  # of the cell masks
    nuclei: Masses  # of the nucleus masks, one row a nucleus
    cell_rings: Rings
    nucleus_rings: Rings
    features: tuple[Feature, ...]
    matrix: sparse.csr_matrix  # (n, n_features) of qv ≥ 20 in cells
    # Calling it starts the transcripts anew: one item a field of view, numbered as they come.
    transcripts: Callable[[], Iterator[Transcripts]]
    n_fov_columns: int
    channels: Mapping[str, Plane]  # (H, W) uint16 by stain, DAPI first
