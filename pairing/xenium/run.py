"""Open a Xenium run: a bundle folder, a zip of one, or a SpatialData store.

The layout is told by what is there (files, groups, columns); version strings are for messages
alone, since official data carry ones that say nothing.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from scipy import sparse

from pairing.slide import Slide
from pairing.xenium.bundle import BundleRun
from pairing.xenium.files import MANIFEST, FolderFiles, ZipFiles, is_spatialdata
from pairing.xenium.rasters import LabelRaster
from pairing.xenium.spatialdata import StoreRun
from pairing.xenium.transcripts import TranscriptBatch, TranscriptTable
from shards.errors import BadInput
from shards.schema import Gene


class XeniumRun(Protocol):
    """A run, whatever it is stored as. Positions are in µm in the Xenium frame.

    Layouts differ in files, columns and types, and all of them give the same tables: identifiers
    are text (numbers in decimal), optional columns are filled in from what else the run has.
    Every method raises BadInput where files of the run are missing, damaged, of a layout that is
    not read, or contradict each other.
    """

    path: Path
    has_transcripts: bool

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of how this run was read; for reports."""

    @property
    def layout(self) -> str:
        """What the run is stored as, in words."""

    @property
    def pixel_size_um(self) -> float:
        """µm per pixel of the full-resolution morphology image and of the label rasters."""

    @property
    def species(self) -> str | None:
        """`human` or `mouse`; None where the run doesn't say."""

    @property
    def n_cells(self) -> int:
        """Number of the instrument's cells."""

    @property
    def provenance(self) -> dict[str, str]:
        """Software and panel by name; nothing that points to a patient, a day or an instrument."""

    def genes(self) -> tuple[Gene, ...]:
        """The measured genes, in the order of the matrix rows."""

    def read_cells(self) -> pd.DataFrame:
        """cell_id, x_um, y_um, cell_area_um2, nucleus_area_um2, n_nuclei; instrument's order.

        `nucleus_area_um2` is NaN where the cell has no nucleus.
        """

    def read_nuclei(self) -> pd.DataFrame:
        """label_id, cell_index, x_um, y_um, area_um2, polygon; one row a nucleus.

        `cell_index` is the row of `read_cells` (-1: no cell's); several nuclei may share it.
        Centroid and area are the mask's where the run has one, else the polygon's.
        """

    def read_cell_polygons(self) -> list[shapely.Polygon | None]:
        """Outline of every cell in µm, in the order of `read_cells`; None where it has none."""

    @property
    def transcripts(self) -> TranscriptTable:
        """The table of the transcripts, to be read span by span on other workers too.

        Its files are there for as long as the run is open.
        """

    def iter_transcripts(self, batch_rows: int = 1_000_000) -> Iterator[TranscriptBatch]:
        """All transcripts in the instrument's order, with its own assignment to cells."""

    def read_matrix(self, cells: slice = ...) -> sparse.csr_matrix | None:
        """(cells, genes) int64 counts as the instrument made them; None where there is none.

        Of all cells, or of consecutive ones, for which the usual layout is not read whole.
        """

    def read_control_counts(self) -> pd.DataFrame | None:
        """Counts of every cell by kind of control (a feature type a column); None if unknown."""

    def read_labels(self, kind: Literal["cell", "nucleus"]) -> LabelRaster | None:
        """(H, W) label raster on the morphology pixels, read as it is sliced; None without."""

    def label_cell_index(self, kind: Literal["cell", "nucleus"]) -> npt.NDArray[np.int64]:
        """For each label value the row of its cell; -1 for the background and for no cell's."""

    def open_morphology(self) -> AbstractContextManager[Slide]:
        """The DAPI channel as a slide of `pixel_size_um`, with its pyramid, 0 outside."""


_ZIP_MAGIC = b"PK\x03\x04"


@contextmanager
def open_xenium(path: Path) -> Iterator[XeniumRun]:
    """Open a run for reading; files of a zip are unpacked aside as they are needed.

    Raises BadInput where `path` is none of the three.
    """
    path = Path(path)
    with ExitStack() as stack:
        if (path / MANIFEST).is_file():
            yield BundleRun(path, FolderFiles(path), stack)
        elif path.is_file() and zipfile.is_zipfile(path):
            yield BundleRun(path, ZipFiles(path, stack), stack)
        elif path.is_dir() and is_spatialdata(path):
            yield StoreRun(path)
        else:
            raise _not_a_run(path)


def _not_a_run(path: Path) -> BadInput:
    inside = sorted(path.glob(f"*/{MANIFEST}")) if path.is_dir() else []
    if inside:
        remedy = f"give the bundle's own folder: {inside[0].parent}"
    else:
        remedy = "give the output folder of a run, its zip, or a SpatialData store of it"
    kind = "a folder without either" if path.is_dir() else "a file that is no zip archive"
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == _ZIP_MAGIC:
                kind = "a zip archive without its end, as of a copy that was broken off"
                remedy = "wait until the archive is copied, or copy it again"
    return BadInput(
        path,
        expected=f"a Xenium bundle (a folder or zip with {MANIFEST}) or a SpatialData store "
        "(a zarr folder with tables and points)",
        found=kind if path.exists() else "nothing",
        remedy=remedy,
    )
