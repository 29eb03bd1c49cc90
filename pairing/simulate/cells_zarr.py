"""`cells.zarr.zip`: Zarr version 2 in an uncompressed zip, laid out as XOA 3 does."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numcodecs
import numcodecs.blosc
import numpy as np
import numpy.typing as npt

_CHUNK = 1024
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_cells_zarr(
    path: Path,
    groups: dict[str, dict[str, Any]],
    arrays: dict[str, npt.NDArray[Any]],
    attributes: dict[str, dict[str, Any]],
) -> None:
    """Groups and arrays by path within the store, each entry once, with no times in it.

    Written by hand: zarr 3 adds entries twice, which the instrument's own viewer refuses, and
    stamps them with the clock.
    """
    # With several threads Blosc writes its blocks in the order in which they were done.
    n_threads = numcodecs.blosc.set_nthreads(1)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as zipped:

        def put(name: str, content: bytes) -> None:
            zipped.writestr(zipfile.ZipInfo(name, _EPOCH), content)

        def put_json(name: str, value: dict[str, Any]) -> None:
            put(name, json.dumps(value, indent=4).encode())

        for group, attrs in groups.items():
            prefix = f"{group}/" if group else ""
            put_json(f"{prefix}.zgroup", {"zarr_format": 2})
            if attrs:
                put_json(f"{prefix}.zattrs", attrs)
        codec = numcodecs.Blosc(cname="zstd", clevel=3, shuffle=numcodecs.Blosc.SHUFFLE)
        for name, array in arrays.items():
            chunks = [min(_CHUNK, max(1, n)) for n in array.shape]
            put_json(
                f"{name}/.zarray",
                {
                    "chunks": chunks,
                    "compressor": codec.get_config(),
                    "dtype": array.dtype.str,
                    "fill_value": 0,
                    "filters": None,
                    "order": "C",
                    "shape": list(array.shape),
                    "zarr_format": 2,
                },
            )
            if name in attributes:
                put_json(f"{name}/.zattrs", attributes[name])
            for index in np.ndindex(
                *(-(-n // c) for n, c in zip(array.shape, chunks, strict=True))
            ):
                corner = [slice(i * c, (i + 1) * c) for i, c in zip(index, chunks, strict=True)]
                part = array[tuple(corner)]
                whole = np.zeros(chunks, array.dtype)
                whole[tuple(slice(0, n) for n in part.shape)] = part
                put(f"{name}/{'.'.join(map(str, index))}", bytes(codec.encode(whole)))
    numcodecs.blosc.set_nthreads(n_threads)
