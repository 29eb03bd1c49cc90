"""The samples of a shard as rows of `obs`, with the same columns for every shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from flows.export.source import Part, Source
from shards.schema import INDEX_SCHEMA, SPLITS

# Told by other names, or once for all; where members lie is the tar's business.
_LEFT_OUT = {"key", "cell_id", "run", "donor", "species", "crc32", "neighbors", "flags"}
_FIELDS = [
    field
    for field in INDEX_SCHEMA
    if field.name not in _LEFT_OUT and not field.name.endswith(("_offset", "_size"))
]
_TEXTS = [field.name for field in _FIELDS if pa.types.is_string(field.type)]
_NUMBERS = [field for field in _FIELDS if field.name not in _TEXTS]


@dataclass(frozen=True, slots=True)
class Columns:
    """What the columns of all parts have in common: categories of texts, and the flags."""

    categories: dict[str, tuple[str, ...]]
    flags: tuple[str, ...]

    @classmethod
    def of(cls, source: Source, parts: Sequence[Part]) -> Columns:
        """Found by looking at the texts of every table, which is a small part of it."""
        found: dict[str, set[str]] = {name: set() for name in (*_TEXTS, "flags")}
        for part in parts:
            table = part.read_table(list(found))
            for name in _TEXTS:
                found[name].update(pc.unique(table[name]).drop_null().to_pylist())
            found["flags"].update(pc.unique(pc.list_flatten(table["flags"])).to_pylist())
        donors = {part.shard.info.donor for part in parts}
        return cls(
            categories={
                **{name: tuple(sorted(found[name])) for name in _TEXTS},
                "run": tuple(dict.fromkeys(part.manifest.run for part in parts)),
                "donor": tuple(sorted(donors)),
                "person": tuple(sorted(set(map(source.person, donors)))),
                "split": tuple(s for s in SPLITS if s in {part.split for part in parts}),
            },
            flags=tuple(sorted(found["flags"])),
        )

    def obs(self, source: Source, part: Part) -> pd.DataFrame:
        """The samples of a part in the tar's order, named by their keys.

        Numbers of the index table under its own names (of the nucleus `nucleus_<name>`, NaN or NA
        where there is none), texts as categories, `flag_<name>` for each flag.
        """
        numbers = [field.name for field in _NUMBERS]
        table = part.read_table(["key", "cell_id", "flags", *_TEXTS, *numbers])
        n = table.num_rows
        donor = part.shard.info.donor
        same = {
            "run": part.manifest.run,
            "donor": donor,
            "person": source.person(donor),
            "split": part.split,
        }
        columns: dict[str, object] = {"cell_id": table["cell_id"].to_numpy().astype(object)}
        texts = {name: np.full(n, value, object) for name, value in same.items()}
        texts |= {name: table[name].to_numpy() for name in _TEXTS}
        for name, values in texts.items():
            columns[name] = pd.Categorical(values, categories=list(self.categories[name]))
        for field in _NUMBERS:
            flat = table.select([field.name]).flatten()
            for name, values in zip(flat.column_names, flat.columns, strict=True):
                columns[name.replace(".", "_")] = _number(values, nullable=field.nullable)
        columns |= {f"flag_{flag}": _has(table["flags"], flag) for flag in self.flags}
        return pd.DataFrame(columns, index=table["key"].to_numpy().astype(object))


def _number(values: pa.ChunkedArray, *, nullable: bool) -> object:
    if pa.types.is_integer(values.type) and nullable:
        return pd.array(values.to_pylist(), dtype="Int64")
    return values.to_numpy()


def _has(flags: pa.ChunkedArray, flag: str) -> npt.NDArray[np.bool_]:
    lists = flags.combine_chunks()
    rows = pc.list_parent_indices(lists).to_numpy()
    result = np.zeros(len(lists), dtype=bool)
    result[rows[pc.equal(pc.list_flatten(lists), flag).to_numpy(zero_copy_only=False)]] = True
    return result


def neighbor_graph(part: Part, row_of_cell: pd.Index, n_rows: int) -> sparse.csr_matrix:
    """(samples, n_rows) distances in µm from each sample to those of its neighbours that are rows.

    `row_of_cell` holds the cell ids of the run in the order of rows; a distance of 0 is stored.
    """
    lists = part.read_table(["neighbors"])["neighbors"].combine_chunks()
    owner = pc.list_parent_indices(lists).to_numpy()
    near = pc.list_flatten(lists)
    row = row_of_cell.get_indexer(near.field("cell_id").to_numpy(zero_copy_only=False))
    distance_um = np.hypot(near.field("dx_um").to_numpy(), near.field("dy_um").to_numpy())
    there = row >= 0
    owner, row, distance_um = owner[there], row[there], distance_um[there]
    order = np.lexsort((row, owner))
    indptr = np.zeros(len(lists) + 1, np.int64)
    np.cumsum(np.bincount(owner, minlength=len(lists)), out=indptr[1:])
    return sparse.csr_matrix((distance_um[order], row[order], indptr), shape=(len(lists), n_rows))
