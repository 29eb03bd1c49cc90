"""Outlines of nuclei as WKB: of a table in memory, or read from its file as they are asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

_COLUMN = "polygon_px"
# Row groups that are held: tables are ordered by y, and tiles are gone through row by row.
_HELD = 3
_AT_A_TIME = 65_536

Wkb = npt.NDArray[Any]  # (n,) bytes


class Outlines(Protocol):
    """`polygon_px` of a table of nuclei, by its rows."""

    def __len__(self) -> int: ...

    def parts(self) -> Iterator[Wkb]:
        """All of them, in order, some at a time."""

    def take(self, rows: npt.NDArray[np.int64]) -> list[bytes]:
        """Those of these rows, which ascend."""


class TableOutlines:
    """Those of a table in memory."""

    def __init__(self, nuclei: pa.Table) -> None:
        self._column: pa.ChunkedArray = nuclei[_COLUMN]

    def __len__(self) -> int:
        return len(self._column)

    def parts(self) -> Iterator[Wkb]:
        for first in range(0, len(self._column), _AT_A_TIME):
            yield self._column.slice(first, _AT_A_TIME).to_numpy()

    def take(self, rows: npt.NDArray[np.int64]) -> list[bytes]:
        outlines: list[bytes] = self._column.take(pa.array(rows)).to_pylist()
        return outlines


class StoredOutlines:
    """Those of a file, of which a few row groups are held: of a million they are gigabytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        metadata = pq.read_metadata(path)
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._ends = np.cumsum([0, *sizes])
        self._held: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def parts(self) -> Iterator[Wkb]:
        for group in range(len(self._ends) - 1):
            yield self._group(group).to_numpy()

    def take(self, rows: npt.NDArray[np.int64]) -> list[bytes]:
        groups = np.searchsorted(self._ends, rows, side="right") - 1
        found: list[bytes] = []
        for group in np.unique(groups).tolist():
            own = rows[groups == group] - self._ends[group]
            found += self._group(group).take(pa.array(own)).to_pylist()
        return found

    def _group(self, group: int) -> pa.ChunkedArray:
        if group in self._held:
            self._held.move_to_end(group)
            return self._held[group]
        with pq.ParquetFile(self._path) as file:
            column = file.read_row_group(group, columns=[_COLUMN])[_COLUMN]
        self._held[group] = column
        if len(self._held) > _HELD:
            self._held.popitem(last=False)
        return column
