"""What a folder of files says, as digests that are the same on any processor.

Whole numbers, text and bytes count exactly. Of floats only what is left after rounding to a step of
their unit does, since the last bits of a sum hang on the processor (its vector width, fused
multiply-add). Parquet, JSON and npy count by content: their bytes hang on the library that wrote
them. Tars and JPEGs, which are ours alone, count by their bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from shards.artifact import files_under, sha256_of
from shards.schema import digest

STEP = 1e-6  # of any unit: a picometre, a millionth of a pixel or of a share
# What the network says of a nucleus is computed in float32, whose noise is some 1e-7.
STEPS = {"score": 1e-3}
# A value this near to the border of two steps, in steps, may fall to either side elsewhere.
_BORDER = 1e-5
# No step begins at a round number, on which exact results like to lie.
_SHIFT = 0.618

# Hashes of files whose bytes hang on the library that wrote them.
_LEFT_OUT = ("table_sha256", "weights_sha256")


def digests_of(folder: Path) -> dict[str, str]:
    """20 hex digits for each file below a folder, by its relative path.

    Raises ValueError on a kind of file that is not known here, and where a value lies on the
    border of two rounded ones.
    """
    return {
        str(path.relative_to(folder)): digest(_reader(path)(path)) for path in files_under(folder)
    }


def digest_of(value: Any) -> str:
    """20 hex digits for a value of JSON, with its floats rounded."""
    return digest(canonical(value))


def canonical(value: Any, step: float = STEP) -> Any:
    """A value of JSON with rounded floats, and without hashes of what libraries write."""
    if isinstance(value, dict):
        return {
            key: canonical(inner, STEPS.get(key, STEP))
            for key, inner in value.items()
            if key not in _LEFT_OUT
        }
    if isinstance(value, list | tuple):
        return [canonical(inner, step) for inner in value]
    if isinstance(value, float):
        return rounded(np.array([value]), step)[0]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return value


def rounded(values: npt.NDArray[np.floating], step: float = STEP) -> list[int | str]:
    """The number of the step in which each value lies; "nan" for NaN.

    Raises ValueError where one is too near to the border of two steps to say so anywhere.
    """
    scaled = values.astype(np.float64) / step + _SHIFT
    near = np.abs(scaled - np.rint(scaled)) < _BORDER
    if near.any():
        raise ValueError(
            f"{values[near][0]!r} lies on the border of two steps of {step}: change the fixed input"
        )
    return ["nan" if np.isnan(v) else int(np.floor(v)) for v in scaled]


def _reader(path: Path) -> Callable[[Path], Any]:
    readers: dict[str, Callable[[Path], Any]] = {
        ".json": lambda p: canonical(json.loads(p.read_bytes())),
        ".parquet": lambda p: _table(pq.read_table(p)),
        ".npy": lambda p: _array(np.load(p, allow_pickle=False)),
        ".tar": sha256_of,
        ".jpgs": sha256_of,
    }
    if path.suffix not in readers:
        raise ValueError(f"{path.name}: say in {__name__} what of such a file counts")
    return readers[path.suffix]


def _array(array: npt.NDArray[Any]) -> list[Any]:
    values = rounded(array.ravel()) if array.dtype.kind == "f" else array.ravel().tolist()
    return [str(array.dtype), list(array.shape), values]


def _table(table: pa.Table) -> list[Any]:
    """Fields in their order, with types, and the values of each; metadata is the libraries'."""
    columns = []
    for field in table.schema:
        values = table[field.name].to_pylist()
        if field.name == "polygon_px":
            values = [_outline(shapely.from_wkb(wkb)) for wkb in values]
        columns.append(
            [
                field.name,
                str(field.type),
                field.nullable,
                canonical(values, STEPS.get(field.name, STEP)),
            ]
        )
    return columns


def _outline(polygon: shapely.Polygon) -> list[Any]:
    return [
        shapely.get_coordinates(ring).tolist() for ring in (polygon.exterior, *polygon.interiors)
    ]
