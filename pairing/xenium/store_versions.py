"""Which versions of SpatialData's storage format are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shards.errors import BadInput

# As of spatialdata 0.7. Shapes before 0.2 lay in zarr arrays, and are in Parquet since.
_READ = {
    "images": ("0.1", "0.2", "0.3"),
    "labels": ("0.1", "0.2", "0.3"),
    "points": ("0.1", "0.2"),
    "shapes": ("0.2", "0.3"),
    "tables": ("0.1", "0.2"),
}
_READ_STORE = ("0.1", "0.2")


def check_versions(path: Path, root: Any) -> None:
    """Raises BadInput where the store or an element of it is of a version that is not read.

    Stores say theirs since spatialdata 0.3, elements always.
    """
    store = root.attrs.get("spatialdata_attrs", {}).get("version")
    if store is not None and store not in _READ_STORE:
        raise _other_version(path, store, _READ_STORE)
    for kind, versions in _READ.items():
        group = root.get(kind)
        for name, element in () if group is None else group.groups():
            told = element.attrs if kind == "tables" else element.attrs.get("spatialdata_attrs", {})
            if told.get("version") not in versions:
                raise _other_version(f"{path}, {kind}/{name}", told.get("version"), versions)


def _other_version(where: object, found: str | None, versions: tuple[str, ...]) -> BadInput:
    return BadInput(
        where,
        expected=f"SpatialData's format in version {' or '.join(versions)}",
        found="none that is said" if found is None else f"version {found}",
        remedy="read the store with spatialdata and write it again with spatialdata 0.7, or give "
        "the bundle itself",
    )
