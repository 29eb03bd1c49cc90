"""Cells and patches to shards: select, order by hash, join, write."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
from pydantic import Field

from pairing.annotations import donors_of_cells, labels_of_cells
from pairing.cells import NEIGHBORS_FILE, PANEL_FILE, open_counts, read_cells
from pairing.flags import FLAGS, QUALITY_COLUMNS, Flag, Thresholds, with_flags
from pairing.geometry import Points, Transform
from pairing.pack_plan import Rows, as_numbers, in_hashed_order, plan_shards, tar_bytes
from pairing.pack_samples import (
    MapTasks,
    RunTables,
    ShardTask,
    ShardTasks,
    read_shard_info,
    write_task,
)
from pairing.patches import INDEX_FILE
from shards.artifact import Made, link_or_copy, make_left, write_atomically
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
    ShardInfo,
    Totals,
)
from shards.write import MANIFEST_FILE, check_cell_ids, shard_name

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
    # A shard is closed by whichever comes first; bytes are of the tar.
    max_samples: int = Field(default=10_000, gt=0)
    max_bytes: int = Field(default=512_000_000, gt=0)


def write_shard_set(
    out: Path,
    kept: Path,
    config: PackConfig,
    spec: PatchSpec,
    cells_folder: Path,
    patches_folder: Path,
    image_px_from_xenium_um: Transform,
    image_mpp: float,
    map_tasks: MapTasks,
    *,
    error_um: pd.Series[float] | None = None,
    segmented: bool = False,
    donors: Path | None = None,
    labels: Path | None = None,
    withdrawn: Collection[str] = (),
    withdrawn_cell_ids: Sequence[str] = (),
) -> Made:
    """Write the shards and the manifest of one run into `out`; returns the figures of the stage.

    Every cell of the run is either in a shard or counted under the reason why not; a cell that
    fails several tests counts under the first. Neighbours are turned into the orientation of the
    patch, in µm. `error_um` is the registration's of each cell by cell_id, NaN where it was not
    assessed; None where nothing was registered. `segmented` says whether nuclei were looked for on
    an H&E. `donors` (where `config.donor` is None) and
    `labels` are files as `pairing.annotations` reads them. They may name `withdrawn` donors and
    their cells, which the cells artifact lacks: such cells are not among those seen. Raises
    BadInput where no cell is left.

    Which cells a shard holds is known before any is written. `map_tasks(write, tasks)` runs `write`
    over them anywhere, in any order; both can be pickled. Shards are published one by one in
    `kept`; those that lie there already are not written again.
    """
    cells = read_cells(cells_folder)
    panel = read_record(cells_folder / PANEL_FILE, Panel)
    neighbors = np.load(cells_folder / NEIGHBORS_FILE, mmap_mode="r", allow_pickle=False)
    patches = pq.read_table(patches_folder / INDEX_FILE).to_pandas().set_index("row")

    image_px = image_px_from_xenium_um(cells[["x_um", "y_um"]].to_numpy())
    cells, n_cells_of_donor = _annotated(
        cells, config, image_px, donors, labels, withdrawn, withdrawn_cell_ids
    )
    errors = np.nan if error_um is None else cells["cell_id"].map(error_um)
    cells = cells.assign(registration_error_um=errors)
    donor_names, donor = as_numbers(cells["donor"].to_numpy())
    cells_um = cells.loc[patches.index, ["x_um", "y_um"]].to_numpy()
    patches = with_flags(patches, cells_um, config.filters, donor[patches.index])
    kept_rows, totals = select(
        cells, patches, config.filters, registered=error_um is not None, segmented=segmented
    )
    if not len(kept_rows):
        raise BadInput(
            f"run {config.run}",
            expected="at least one cell that passes the filters",
            found=f"{totals.seen} cells, dropped: {totals.dropped}",
            remedy="look at the run's alignment and counts, or loosen [filters]",
        )
    cell_id = cells["cell_id"].to_numpy()
    check_cell_ids(config.run, cell_id[kept_rows], set())
    order = in_hashed_order(kept_rows, donor, cell_id, config.run)
    jpeg_bytes = patches["size"].reindex(order).to_numpy()
    sizes = tar_bytes(order, jpeg_bytes, open_counts(cells_folder)[0], neighbors, donor)
    cuts = plan_shards(
        donor[order], sizes, max_samples=config.max_samples, max_bytes=config.max_bytes
    )
    tables = RunTables(
        same={
            "run": config.run,
            "tissue": config.tissue,
            "species": panel.species,
            "panel": panel.panel_id,
            "mpp": spec.mpp,
            "fov_um": spec.fov_um,
        },
        cells=cells,
        donor=donor,
        patches=patches,
        neighbors=neighbors,
        image_um=image_px * image_mpp,
    )
    shards = [
        (shard_name(config.run, donor_names[cut.donor], cut.number), order[cut.start : cut.stop])
        for cut in cuts
    ]
    write = partial(write_task, kept, cells_folder, patches_folder)
    infos = _written(out, kept, shards, tables, map_tasks, write)
    manifest = Manifest(
        run=config.run,
        source_id=config.source_id,
        tissue=config.tissue,
        species=panel.species,
        panel_id=panel.panel_id,
        patch=spec,
        totals=totals,
        shards=infos,
    )
    write_atomically(out / MANIFEST_FILE, manifest.model_dump_json(indent=1).encode())
    summary = {
        **totals.model_dump(),
        "n_cells_of_donor": n_cells_of_donor,
        "n_flagged": {flag: int(patches[flag].sum()) for flag in FLAGS},
    }
    tars = {f"{info.name}.tar": info.tar_sha256 for info in infos}
    return Made(summary, tars | {f"{info.name}.parquet": info.table_sha256 for info in infos})


def _written(
    out: Path,
    kept: Path,
    shards: Sequence[tuple[str, Rows]],
    tables: RunTables,
    map_tasks: MapTasks,
    write: Callable[[ShardTask], str],
) -> tuple[ShardInfo, ...]:
    """The shards in `out`, by name and rows: those that `kept` lacks are written there first."""
    left = [(name, rows) for name, rows in shards if read_shard_info(kept, name) is None]
    make_left(map_tasks, write, ShardTasks(left, tables), len(shards))
    infos = []
    for name, _ in shards:
        info = read_shard_info(kept, name)
        assert info is not None, name
        infos.append(info)
        for suffix in (".tar", ".parquet"):
            link_or_copy(kept / f"{name}{suffix}", out / f"{name}{suffix}")
    return tuple(infos)


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
