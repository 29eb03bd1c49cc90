"""Identifiers to rows, for millions of identifiers of which a batch names a few thousand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa


class IdIndex:
    """Which row each of many identifiers is, to look up the few that a batch names.

    Sorted bytes, since a hash table of a million cells would be built anew for every batch.
    """

    def __init__(self, sorted_ids: npt.NDArray[np.bytes_], rows: npt.NDArray[np.int32]) -> None:
        self._ids, self._rows = sorted_ids, rows
        self._last: tuple[pa.StringArray, npt.NDArray[np.int32]] | None = None

    @classmethod
    def of(cls, ids: Sequence[str]) -> IdIndex:
        encoded_ids = np.array(pa.array(ids, pa.binary()).to_pylist(), dtype=np.bytes_)
        order = np.argsort(encoded_ids, kind="stable")
        return cls(encoded_ids[order], order.astype(np.int32))

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, ids=self._ids, rows=self._rows)

    @classmethod
    def load(cls, path: Path) -> IdIndex:
        with np.load(path, allow_pickle=False) as stored:
            return cls(stored["ids"], stored["rows"])

    def find(self, values: pa.StringArray) -> npt.NDArray[np.int32]:
        """Row of each value; -1 where it is none of the identifiers.

        Batches of one row group have the same values, which are looked up once.
        """
        if self._last is None or not self._last[0].equals(values):
            self._last = values, self._find(values)
        return self._last[1]

    def _find(self, values: pa.StringArray) -> npt.NDArray[np.int32]:
        wanted = np.array(values.cast(pa.binary()).to_pylist(), dtype=np.bytes_)
        if not len(self._ids) or not len(wanted):
            return np.full(len(wanted), -1, np.int32)
        place = np.minimum(np.searchsorted(self._ids, wanted), len(self._ids) - 1)
        return np.where(self._ids[place] == wanted, self._rows[place], np.int32(-1))
