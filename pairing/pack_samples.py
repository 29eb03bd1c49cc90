"""Samples of a shard: their rows joined from the tables of a run, their members from its files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from pairing.cells import open_counts
from pairing.flags import FLAGS, QUALITY_COLUMNS
from pairing.geometry import Points
from pairing.pack_plan import Rows, same_donor
from pairing.patches import PatchReader
from shards.advice import not_soon
from shards.artifact import write_atomically, written_aside
from shards.dataset import read_record
from shards.schema import ShardInfo, sample_key
from shards.write import ROW_SCHEMA, Contents, narrow_counts, npy_header, write_shard

# Samples whose counts are gathered together.
_CHUNK_SAMPLES = 512


@dataclass(frozen=True, slots=True, eq=False)
class ShardTask:
    """All that a worker needs to write a shard, besides the folders of cells and patches.

    `table` holds the rows of its n samples but for what follows from the tar. `rows` are their
    rows among the cells; `near` those of all their neighbours, of which each has `n_near`, nearest
    first. `part`, an index into `parts`, `offset` and `size` tell where the patches lie.
    """

    name: str
    table: pa.Table
    rows: Rows
    near: Rows
    n_near: npt.NDArray[np.int64]
    parts: tuple[str, ...]
    part: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class RunTables:
    """What is known of the cells of a run, to join the rows of samples from.

    `same` are the columns that hold one value for the whole run. `cells` has the columns of
    cells.parquet, `donor`, `label` and `registration_error_um`; `donor` the numbers of the donors;
    `patches` is the index of the patches by cell, with flags.
    `image_um` is (cells, 2), the centres in the patches' orientation.
    """

    same: Mapping[str, Any]
    cells: pd.DataFrame
    donor: npt.NDArray[np.int32]
    patches: pd.DataFrame
    neighbors: npt.NDArray[np.int32]
    image_um: Points

    def task(self, name: str, rows: Rows) -> ShardTask:
        cell = {str(name): column.to_numpy()[rows] for name, column in self.cells.items()}
        patches = self.patches.loc[rows]
        part, parts = pd.factorize(patches["part"], sort=True)
        near, along = same_donor(self.neighbors, rows, self.donor)
        columns = {
            "key": [sample_key(self.same["run"], cell_id) for cell_id in cell["cell_id"]],
            **{column: pa.repeat(pa.scalar(value, ROW_SCHEMA.field(column).type), len(rows))
               for column, value in self.same.items()},
            **{column: cell[column] for column in
               ("cell_id", "donor", "label", "x_um", "y_um", "center", "n_counts")},
            "x_px": patches["x_px"].to_numpy(),
            "y_px": patches["y_px"].to_numpy(),
            "nucleus": _nuclei(cell),
            "registration_error_um": pa.array(
                cell["registration_error_um"].astype(np.float64), from_pandas=True
            ),
            **{name: pa.array(patches[name].to_numpy(np.float32), from_pandas=True)
               for name in QUALITY_COLUMNS},
            "neighbors": self._neighbors(rows, near, along),
            "flags": _flags(patches[list(FLAGS)].to_numpy(bool)),
        }  # fmt: skip
        return ShardTask(
            name=name,
            table=pa.table({f.name: columns[f.name] for f in ROW_SCHEMA}, schema=ROW_SCHEMA),
            rows=rows,
            near=near[along],
            n_near=along.sum(axis=1),
            parts=tuple(parts),
            part=part,
            offset=patches["offset"].to_numpy(np.int64),
            size=patches["size"].to_numpy(np.int64),
        )

    def _neighbors(
        self, rows: Rows, near: npt.NDArray[np.int64], along: npt.NDArray[np.bool_]
    ) -> pa.Array:
        of, flat = np.nonzero(along)[0], near[along]
        offsets_um = self.image_um[flat] - self.image_um[rows[of]]
        type_ = ROW_SCHEMA.field("neighbors").type
        structs = pa.StructArray.from_arrays(
            [
                pa.array(self.cells["cell_id"].to_numpy()[flat], pa.string()),
                pa.array(offsets_um[:, 0]),
                pa.array(offsets_um[:, 1]),
            ],
            fields=list(type_.value_type),
        )
        return pa.ListArray.from_arrays(_bounds(along.sum(axis=1)), structs, type=type_)


@dataclass(frozen=True, slots=True, eq=False)
class ShardTasks:
    """Tasks of shards by name and rows, each joined when it is asked for, and what they are."""

    shards: Sequence[tuple[str, Rows]]
    tables: RunTables
    what: str = "shards"

    def __len__(self) -> int:
        return len(self.shards)

    def __iter__(self) -> Iterator[ShardTask]:
        return (self.tables.task(name, rows) for name, rows in self.shards)


MapTasks = Callable[[Callable[[ShardTask], str], ShardTasks], Iterable[str]]


def write_task(out: Path, cells_folder: Path, patches_folder: Path, task: ShardTask) -> str:
    """Publish a shard as `out/<name>.tar` and `.parquet`, and after them `<name>.json`.

    Where the last one is, the shard is whole. Returns the name.
    """
    reader = PatchReader(patches_folder)
    jpegs = [b""] * len(task.rows)
    try:
        # Part by part, from its beginning to its end: a disk is spared the hashed order.
        order = np.lexsort((task.offset, task.part))
        for own in np.split(order, np.flatnonzero(np.diff(task.part[order])) + 1):
            reader.expect(task.parts[task.part[own[0]]], task.offset[own], task.size[own])
        for i in order.tolist():
            part = task.parts[task.part[i]]
            jpegs[i] = reader.read(part, int(task.offset[i]), int(task.size[i]))
    finally:
        reader.close()
    with (
        written_aside(out / f"{task.name}.tar") as tar,
        written_aside(out / f"{task.name}.parquet") as table,
    ):
        contents = _contents(task, jpegs, open_counts(cells_folder))
        info = write_shard(tar, table, task.name, task.table, contents)
    # Else shards push out the patches of those that are still to be written.
    not_soon(out / f"{task.name}.tar")
    write_atomically(out / f"{task.name}.json", info.model_dump_json().encode())
    return task.name


def read_shard_info(out: Path, name: str) -> ShardInfo | None:
    """What `write_task` published under this name, or None where it has not yet."""
    path = out / f"{name}.json"
    return read_record(path, ShardInfo) if path.exists() else None


def _contents(
    task: ShardTask, jpegs: list[bytes], counts: tuple[npt.NDArray[Any], ...]
) -> Iterator[Contents]:
    indptr, indices, data = counts
    near_bounds = _bounds(task.n_near)
    for start in range(0, len(task.rows), _CHUNK_SAMPLES):
        chunk = slice(start, min(start + _CHUNK_SAMPLES, len(task.rows)))
        entries, bounds = _entries(indptr, task.rows[chunk])
        own = _members([indices[entries], data[entries]], bounds)
        n_near = task.n_near[chunk]
        near = task.near[near_bounds[chunk.start] : near_bounds[chunk.stop]]
        ordinal = np.arange(len(near)) - np.repeat(_bounds(n_near)[:-1], n_near)
        entries, bounds = _entries(indptr, near)
        rows = [np.repeat(ordinal, np.diff(bounds)), indices[entries], data[entries]]
        theirs = _members(rows, bounds[_bounds(n_near)])
        yield from zip(jpegs[chunk], own, theirs, strict=True)


def _entries(
    indptr: npt.NDArray[Any], rows: Rows
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Places of the entries of rows of a CSR matrix, row after row, and where each row begins."""
    starts = np.asarray(indptr[rows], np.int64)
    n = np.asarray(indptr[rows + 1], np.int64) - starts
    bounds = _bounds(n)
    return np.repeat(starts - bounds[:-1], n) + np.arange(bounds[-1]), bounds


def _bounds(n: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(n)])


def _members(rows: list[npt.NDArray[Any]], bounds: npt.NDArray[np.int64]) -> Iterator[bytes]:
    """An .npy file of each piece of the rows, in as few bits as hold it."""
    wide = np.stack([np.asarray(row, np.int64) for row in rows])
    narrow = narrow_counts(wide)
    for start, stop in pairwise(bounds.tolist()):
        piece = narrow[:, start:stop]
        if piece.dtype != np.uint16:
            piece = narrow_counts(wide[:, start:stop])
        yield npy_header(piece.dtype.str, piece.shape) + piece.tobytes()


def _nuclei(cell: Mapping[str, npt.NDArray[Any]]) -> pa.Array:
    none = pd.isna(cell["he_nucleus_id"])
    values = [
        np.where(none, 0, cell["he_nucleus_id"]).astype(np.int64),
        *(cell[f"he_{name}"].astype(np.float64) for name in ("area_um2", "iou", "distance_um")),
    ]
    return pa.StructArray.from_arrays(
        [pa.array(v) for v in values],
        fields=list(ROW_SCHEMA.field("nucleus").type),
        mask=pa.array(none),
    )


def _flags(flagged: npt.NDArray[np.bool_]) -> pa.Array:
    """Lists of the names of each row's flags, of (n, FLAGS)."""
    values = pa.array(np.array(FLAGS, object)[np.nonzero(flagged)[1]], pa.string())
    return pa.ListArray.from_arrays(_bounds(flagged.sum(axis=1)), values)
