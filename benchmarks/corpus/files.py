"""What lies on disk: whether it moved, and where somebody is named."""

from __future__ import annotations

import html
import json
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shards.artifact import sha256_of
from shards.schema import donor_slug

Facts = dict[str, tuple[int, int, str]]


def facts(out: Path, *patterns: str) -> Facts:
    """Inode, time of change and SHA-256 of the files below a folder that match, by path."""
    found = {path for pattern in patterns for path in out.glob(pattern) if path.is_file()}
    return {
        path.relative_to(out).as_posix(): (
            path.stat().st_ino,
            path.stat().st_mtime_ns,
            sha256_of(path),
        )
        for path in sorted(found)
    }


def naming(out: Path, donors: Collection[str], cell_ids: Collection[str]) -> list[str]:
    """Files below a folder that name one of these donors or hold one of these cells.

    In their path or bytes, as text, HTML, JSON or slug, and in the columns of tables, which are
    compressed. Names have to be long: two letters are in every picture.
    """
    spelt = {s for d in donors for s in (d, html.escape(d), json.dumps(d)[1:-1], donor_slug(d))}
    wanted = [text.encode() for text in (*spelt, *cell_ids)]
    found = []
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = path.relative_to(out).as_posix()
        parts = [name.encode(), path.read_bytes()]
        if path.suffix == ".parquet":
            parts.append("\n".join(_texts(pq.read_table(path))).encode())
        if any(word in part for part in parts for word in wanted):
            found.append(name)
    return found


def _texts(table: pa.Table) -> Iterator[str]:
    for column in table.columns:
        for value in column.to_pylist():
            if isinstance(value, str | list | dict):
                yield str(value)
