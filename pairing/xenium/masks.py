"""Label masks and their owners: `cells.zarr.zip`, the only place of the segmentation itself."""

from __future__ import annotations

import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr

from pairing.xenium.files import parsed
from pairing.xenium.polygons import PolygonTable, polygons_of
from pairing.xenium.rasters import LabelRaster, StoredRaster, label_moments, label_owners
from pairing.xenium.tables import cell_id_text
from shards.errors import BadInput

Kind = Literal["cell", "nucleus"]
# masks/0 and polygon_sets/0 are nuclei, /1 cells.
_NUMBER_OF: dict[Kind, int] = {"nucleus": 0, "cell": 1}
_NO_CELL = 0xFFFFFFFF
# Masks without a table of owners belong to the table of cells where half of them lie as far from
# the table's positions at most; cells are farther apart from each other.
_SAME_PLACE_UM = 2.0


class Masks:
    """The masks of a bundle, and which cell each label is of.

    `cells` has cell_id, x_um and y_um in the instrument's order. Raises BadInput where the store
    is damaged, or of other cells.
    """

    def __init__(
        self, path: Path, stack: ExitStack, cells: pd.DataFrame, pixel_size_um: float
    ) -> None:
        self._path = path
        self._cells = cells
        self._pixel_size_um = pixel_size_um
        with parsed(path), zipfile.ZipFile(path):
            pass  # zarr hides what is wrong with a zip behind an error of its own
        store = zarr.storage.ZipStore(path, mode="r", read_only=True)
        stack.callback(store.close)
        with parsed(path):
            group: Any = zarr.open_group(store, mode="r", zarr_format=2)
            self._group = group
            ids: npt.NDArray[np.uint32] = self._group["cell_id"][:]
            shapes = {kind: self.labels(kind).shape for kind in _NUMBER_OF}
        # Numbers before XOA 1.3, then a prefix and a suffix.
        text = ids.astype(str).astype(object) if ids.ndim == 1 else cell_id_text(ids)
        if not np.array_equal(text, cells["cell_id"].to_numpy(object)):
            self._raise_other_run(
                "the cells of the cells table in the same order", f"{len(ids)} cells that differ"
            )
        if len(set(shapes.values())) > 1:
            self._raise_other_run("nuclei and cells on one grid", f"masks of {shapes}")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.labels("cell").shape

    def labels(self, kind: Kind) -> LabelRaster:
        """(H, W) on the morphology pixels, read as it is sliced."""
        return StoredRaster(self._path, self._group[f"masks/{_NUMBER_OF[kind]}"])

    def row_of_label(self, kind: Kind) -> npt.NDArray[np.int64]:
        """For each label the row of its cell, -1 for the background and for no cell's.

        Said by the polygons since XOA 2.0, whose number is the label less 1. In 1.3 the labels of
        cells are said by `seg_mask_value`; before, they are numbered as the cells are. Labels of
        nuclei are said by nothing before 2.0: a nucleus is of the cell that covers most of it.
        """
        owners = f"polygon_sets/{_NUMBER_OF[kind]}/cell_index"
        if owners in self._group:
            with parsed(self._path):
                row = self._group[owners][:].astype(np.int64)
            row[(row == _NO_CELL) | (row == -1)] = -1
            if len(row) and not (row.min() >= -1 and row.max() < len(self._cells)):
                self._raise_other_run(
                    f"owners among the {len(self._cells)} cells",
                    f"cell_index from {row.min()} to {row.max()}",
                )
            return np.concatenate([np.array([-1]), row])
        row_of_cell_label = self._row_of_cell_label()
        if kind == "cell":
            return row_of_cell_label
        owner = label_owners(self.labels("nucleus"), self.labels("cell"))
        if owner.max() >= len(row_of_cell_label):
            self._raise_other_run(f"labels up to {len(row_of_cell_label) - 1}", f"{owner.max()}")
        return row_of_cell_label[owner]

    def _row_of_cell_label(self) -> npt.NDArray[np.int64]:
        n = len(self._cells)
        if "seg_mask_value" in self._group:
            with parsed(self._path):
                label = self._group["seg_mask_value"][:].astype(np.int64)
            if len(label) != n or label.min() < 1 or len(np.unique(label)) != n:
                self._raise_other_run(
                    f"a label of its own for each of {n} cells",
                    f"a seg_mask_value of {len(label)} labels, {len(np.unique(label))} distinct",
                )
            row = np.full(int(label.max()) + 1, -1)
            row[label] = np.arange(n)
            return row
        # Nothing says it: believed where the masks lie where the cells of these numbers do.
        centroid = label_moments(self.labels("cell")).centroid_px[1:] * self._pixel_size_um
        known = self._cells[["x_um", "y_um"]].to_numpy()[: len(centroid)]
        distance_um = np.linalg.norm(centroid[: len(known)] - known, axis=1)
        if len(centroid) > n or not np.nanmedian(distance_um) <= _SAME_PLACE_UM:
            self._raise_other_run(
                "cell masks numbered from 1 in the order of the cells",
                f"{len(centroid)} labels of {n} cells, half of them more than {_SAME_PLACE_UM} µm "
                "from their cell",
            )
        return np.arange(-1, n)

    @property
    def has_outlines(self) -> bool:
        """Whether the store has polygons with labels, as since XOA 2.0."""
        return "polygon_sets" in self._group

    def outlines(self, kind: Kind) -> PolygonTable | None:
        """The polygons of the store with their labels; None before XOA 2.0."""
        if not self.has_outlines:
            return None
        group = f"polygon_sets/{_NUMBER_OF[kind]}"
        with parsed(self._path):
            count = self._group[f"{group}/num_vertices"][:].astype(np.int64)
            padded = self._group[f"{group}/vertices"][:]
            points = padded.reshape(len(count), -1, 2).astype(np.float64)
        vertices = points[np.arange(points.shape[1]) < count[:, None]]
        row = self.row_of_label(kind)[1:]
        # The last one for -1, a polygon that is no cell's.
        cell_id = np.array([*self._cells["cell_id"], None], object)[row]
        drawn = np.flatnonzero(count)
        first = np.cumsum(count) - count
        return polygons_of(drawn + 1, cell_id[drawn], vertices, first[drawn])

    def _raise_other_run(self, expected: str, found: str) -> None:
        raise BadInput(
            self._path,
            expected=expected,
            found=found,
            remedy="take all files of the bundle from one run of the analysis software",
        )
