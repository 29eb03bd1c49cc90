"""Cells and patches to shards: select, order by hash, join, write."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
from pydantic import Field
from scipy import sparse

from pairing.annotations import donors_of_cells, labels_of_cells
from pairing.cells import NEIGHBORS_FILE, PANEL_FILE, read_cells, read_counts
from pairing.flags import FLAGS, QUALITY_COLUMNS, Flag, Thresholds, with_flags
from pairing.geometry import Points, Transform
from pairing.patches import INDEX_FILE, PatchReader
from shards.artifact import write_atomically
from shards.dataset import read_record
from shards.errors import BadInput
from shards.schema import (
    NOT_ASSESSED,
    NOTE_OF_FLAG,
    NOTES_OF_NULLS,
    Manifest,
    Panel,
    PatchSpec,
    Record,
    RunId,
    Totals,
)
from shards.write import MANIFEST_FILE, Sample, narrow_counts, write_shards

STAGE_VERSION = 4


class Filters(Thresholds):
    """`[filters]`: what is left out of the shards; patches are cut for every cell.

    `min_match_iou` 0 keeps cells without an H&E nucleus too; above it they are left out, but in a
    run in which no nuclei were looked for on an H&E.
    """

    min_counts: int = Field(default=10, ge=0)
    max_registration_error_um: float = Field(default=5.0, gt=0)
    min_match_iou: float = Field(default=0.0, ge=0, le=1)
    drop_flags: tuple[Flag, ...] = ("damaged_tile",)


class PackConfig(Record):
    """All that decides the bytes of a run's shard set, but its parents."""

    run: RunId
    donor: str | None  # None where a file tells the donor of each cell
    source_id: str | None
    tissue: str | None
    filters: Filters
    max_samples: int = Field(default=10_000, gt=0)


def write_shard_set(
    out: Path,
    config: PackConfig,
    spec: PatchSpec,
    cells_folder: Path,
    patches_folder: Path,
    image_px_from_xenium_um: Transform,
    image_mpp: float,
    *,
    error_um: pd.Series[float] | None = None,
    segmented: bool = False,
    donors: Path | None = None,
    labels: Path | None = None,
    withdrawn: Collection[str] = (),
    withdrawn_cell_ids: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the shards and the manifest of one run into `out`; returns the figures of the stage.

    Every cell of the run is either in a shard or counted under the reason why not; a cell that
    fails several tests counts under the first. Neighbours are turned into the orientation of the
    patch, in µm. `error_um` is the registration's of each cell by cell_id, NaN where it was not
    assessed; None where nothing was registered. `segmented` says whether nuclei were looked for on
    an H&E. `donors` (where `config.donor` is None) and
    `labels` are files as `pairing.annotations` reads them. They may name `withdrawn` donors and
    their cells, which the cells artifact lacks: such cells are not among those seen. Raises
    BadInput where no cell is left.
    """
    cells = read_cells(cells_folder)
    panel = read_record(cells_folder / PANEL_FILE, Panel)
    counts = read_counts(cells_folder, len(panel.genes))
    neighbors = np.load(cells_folder / NEIGHBORS_FILE, mmap_mode="r", allow_pickle=False)
    patches = pq.read_table(patches_folder / INDEX_FILE).to_pandas().set_index("row")

    image_px = image_px_from_xenium_um(cells[["x_um", "y_um"]].to_numpy())
    cells, n_cells_of_donor = _annotated(
        cells, config, image_px, donors, labels, withdrawn, withdrawn_cell_ids
    )
    errors = np.nan if error_um is None else cells["cell_id"].map(error_um)
    cells = cells.assign(registration_error_um=errors)
    cells_um = cells.loc[patches.index, ["x_um", "y_um"]].to_numpy()
    patches = with_flags(patches, cells_um, config.filters)
    kept, totals = select(
        cells, patches, config.filters, registered=error_um is not None, segmented=segmented
    )
    if not len(kept):
        raise BadInput(
            f"run {config.run}",
            expected="at least one cell that passes the filters",
            found=f"{totals.seen} cells, dropped: {totals.dropped}",
            remedy="look at the run's alignment and counts, or loosen [filters]",
        )
    order = _in_hashed_order(kept, cells, config.run)
    image_um = image_px * image_mpp
    reader = PatchReader(patches_folder)
    try:
        samples = _samples(
            order, cells, counts, neighbors, patches, image_um, reader, config, spec, panel
        )
        infos = write_shards(out, samples, run=config.run, max_samples=config.max_samples)
    finally:
        reader.close()
    manifest = Manifest(
        run=config.run,
        source_id=config.source_id,
        tissue=config.tissue,
        species=panel.species,
        panel_id=panel.panel_id,
        patch=spec,
        totals=totals,
        shards=tuple(infos),
    )
    write_atomically(out / MANIFEST_FILE, manifest.model_dump_json(indent=1).encode())
    return {
        **totals.model_dump(),
        "n_cells_of_donor": n_cells_of_donor,
        "n_flagged": {flag: int(patches[flag].sum()) for flag in FLAGS},
    }


def _annotated(
    cells: pd.DataFrame,
    config: PackConfig,
    image_px: Points,
    donors: Path | None,
    labels: Path | None,
    withdrawn: Collection[str],
    withdrawn_cell_ids: Sequence[str],
) -> tuple[pd.DataFrame, dict[str, int]]:
    """The cells with `donor` and `label`, and the number of cells of each donor that is named."""
    n = len(cells)
    # The files are of all cells of the bundle; where those that are gone were is of no use.
    cell_ids = [*cells["cell_id"], *withdrawn_cell_ids]
    if donors is not None:
        nowhere = np.full((len(withdrawn_cell_ids), 2), np.nan)
        donor, names = donors_of_cells(donors, cell_ids, np.concatenate([image_px, nowhere]))
        donor = donor[:n]
    else:
        assert config.donor is not None
        donor = np.full(n, config.donor, dtype=object)
        names = (config.donor,)
    label = None if labels is None else labels_of_cells(labels, cell_ids)[:n]
    n_cells_of_donor = {name: int((donor == name).sum()) for name in names if name not in withdrawn}
    return cells.assign(donor=donor, label=label), n_cells_of_donor


def select(
    cells: pd.DataFrame,
    patches: pd.DataFrame,
    filters: Filters,
    *,
    registered: bool,
    segmented: bool,
) -> tuple[npt.NDArray[np.int64], Totals]:
    """Rows of the cells that go into shards, and the count of the others by reason.

    `patches` is the index of the patches artifact by row of `cells`, with flags. Reasons in the
    order in which they are tried: no_donor (where a cell lacks one), outside_slide,
    registration_error (where the image was `registered` to the run), low_counts, low_match (where
    `filters.min_match_iou` asks for a match and the H&E was `segmented`), one `flag_<name>` for
    each dropped flag. What was not assessed, NaN, drops nothing and is noted, as are the flags
    that kept cells bear.
    """
    flagged = patches[list(FLAGS)].reindex(cells.index, fill_value=False).astype(bool)
    no_donor = cells["donor"].isna().to_numpy()
    error_um = cells["registration_error_um"].to_numpy(np.float64)
    asks_match = filters.min_match_iou > 0
    tests = [
        *((("no_donor", no_donor),) if no_donor.any() else ()),
        ("outside_slide", ~cells.index.isin(patches.index)),
        *((("registration_error", error_um > filters.max_registration_error_um),) * registered),
        ("low_counts", (cells["n_counts"] < filters.min_counts).to_numpy()),
        *((("low_match", _low_match(cells, filters)),) if asks_match and segmented else ()),
        *((NOTE_OF_FLAG + flag, flagged[flag].to_numpy()) for flag in filters.drop_flags),
    ]
    left = np.ones(len(cells), dtype=bool)
    dropped = {}
    for reason, failing in tests:
        dropped[reason] = int((left & failing).sum())
        left &= ~failing
    of_kept = patches.reindex(np.flatnonzero(left))
    noted = {NOTE_OF_FLAG + flag: int((left & flagged[flag]).sum()) for flag in FLAGS}
    noted |= {NOTES_OF_NULLS[name]: int(of_kept[name].isna().sum()) for name in QUALITY_COLUMNS}
    if registered:
        noted[NOT_ASSESSED] = int((left & np.isnan(error_um)).sum())
    if asks_match and not segmented:
        noted["match_not_assessed"] = int(left.sum())
    totals = Totals(
        seen=len(cells),
        kept=int(left.sum()),
        dropped=dropped,
        noted=noted,
    )
    return np.flatnonzero(left), totals


def _low_match(cells: pd.DataFrame, filters: Filters) -> npt.NDArray[np.bool_]:
    """Cells without an H&E nucleus, and those that overlap too little with theirs."""
    return ~(cells["he_iou"].to_numpy(np.float64, na_value=np.nan) >= filters.min_match_iou)


def _in_hashed_order(rows: npt.NDArray[np.int64], cells: pd.DataFrame, run: str) -> list[int]:
    # A shard holds one donor. Within it, neighbours on the slide must not be neighbours: readers
    # shuffle only so far.
    donor, cell_id = cells["donor"].to_numpy(), cells["cell_id"].to_numpy()

    def place(row: int) -> tuple[str, bytes]:
        return donor[row], hashlib.sha256(f"{run}/{cell_id[row]}".encode()).digest()

    return sorted(rows.tolist(), key=place)


def _samples(
    order: list[int],
    cells: pd.DataFrame,
    counts: sparse.csr_matrix,
    neighbors: npt.NDArray[np.int32],
    patches: pd.DataFrame,
    image_um: npt.NDArray[np.float64],
    reader: PatchReader,
    config: PackConfig,
    spec: PatchSpec,
    panel: Panel,
) -> Iterator[Sample]:
    # Columns as arrays: a row of a data frame costs more than the sample that is made of it.
    cell = {name: cells[name].to_numpy() for name in cells.columns}
    patch = {name: column.to_numpy() for name, column in patches.reindex(cells.index).items()}
    for row in order:
        donor = cell["donor"][row]
        # Counts of another donor, who may be in another split, must not come along.
        near = [int(n) for n in neighbors[row] if n >= 0 and cell["donor"][n] in (donor, None)]
        offsets_um = image_um[near] - image_um[row]
        part, offset, size = (patch[name][row] for name in ("part", "offset", "size"))
        yield Sample(
            cell_id=cell["cell_id"][row],
            donor=donor,
            image_jpeg=reader.read(part, int(offset), int(size)),
            counts=narrow_counts(np.stack(_row_of(counts, row))),
            neighbors=narrow_counts(_neighbor_counts(counts, near)),
            row={
                "tissue": config.tissue,
                "species": panel.species,
                "label": cell["label"][row],
                "panel": panel.panel_id,
                "x_um": float(cell["x_um"][row]),
                "y_um": float(cell["y_um"][row]),
                "x_px": float(patch["x_px"][row]),
                "y_px": float(patch["y_px"][row]),
                "center": cell["center"][row],
                "mpp": spec.mpp,
                "fov_um": spec.fov_um,
                "n_counts": int(cell["n_counts"][row]),
                "nucleus": _nucleus(cell, row),
                "registration_error_um": _or_none(cell["registration_error_um"][row]),
                **{name: _or_none(patch[name][row]) for name in QUALITY_COLUMNS},
                "neighbors": [
                    {"cell_id": cell["cell_id"][n], "dx_um": dx, "dy_um": dy}
                    for n, (dx, dy) in zip(near, offsets_um.tolist(), strict=True)
                ],
                "flags": [flag for flag in FLAGS if patch[flag][row]],
            },
        )


def _row_of(
    counts: sparse.csr_matrix, row: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    span = slice(counts.indptr[row], counts.indptr[row + 1])
    return counts.indices[span].astype(np.int64), counts.data[span].astype(np.int64)


def _neighbor_counts(counts: sparse.csr_matrix, near: list[int]) -> npt.NDArray[np.int64]:
    parts = [np.zeros((3, 0), dtype=np.int64)]
    for ordinal, n in enumerate(near):
        genes, values = _row_of(counts, n)
        parts.append(np.stack([np.full_like(genes, ordinal), genes, values]))
    return np.concatenate(parts, axis=1)


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _nucleus(cell: dict[str, npt.NDArray[Any]], row: int) -> dict[str, Any] | None:
    if pd.isna(cell["he_nucleus_id"][row]):
        return None
    return {
        "id": int(cell["he_nucleus_id"][row]),
        "area_um2": float(cell["he_area_um2"][row]),
        "iou": float(cell["he_iou"][row]),
        "distance_um": float(cell["he_distance_um"][row]),
    }
