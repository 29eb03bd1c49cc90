"""`cells.zarr.zip`: Zarr version 2 in an uncompressed zip, with what each layout has in it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numcodecs
import numcodecs.blosc
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pairing.simulate.bundle.cells import METHODS, nuclei_of_layout, nucleus_centroids_um
from pairing.simulate.bundle.layouts import TRAITS
from pairing.simulate.params import Layout
from pairing.simulate.polygons import thinned
from pairing.simulate.section import F64, I64, PIXEL_UM, Plane, Rings, Section

_CHUNK = 1024
_EPOCH = (1980, 1, 1, 0, 0, 0)
_SUMMARY = (
    "cell_centroid_x", "cell_centroid_y", "cell_area",
    "nucleus_centroid_x", "nucleus_centroid_y", "nucleus_area", "z_level", "nucleus_count",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Changed:
    """A label plane whose values are changed as it is read; uint32."""

    source: Plane
    change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> np.dtype[np.uint32]:
        return np.dtype(np.uint32)

    def __getitem__(self, key: Any) -> npt.NDArray[np.uint32]:
        return self.change(np.asarray(self.source[key])).astype(np.uint32)


def write_cells_zarr(path: Path, section: Section, cells: pa.Table, layout: Layout) -> None:
    """Write the store; `cells` is the table with all its columns."""
    traits = TRAITS[layout]
    n = len(section.prefix)
    # Before nuclei had labels of their own they had that of their cell.
    cell_label = np.concatenate([[0], section.cell_of_nucleus + 1])
    summary = _cell_summary(section, cells)
    columns = _SUMMARY if traits.own_nuclei else _SUMMARY[:-1]
    arrays: dict[str, Plane] = {
        "cell_id": np.arange(1, n + 1, dtype=np.uint32)
        if traits.numbered_cells
        else np.stack([section.prefix, np.ones(n, np.uint32)], axis=1),
        "cell_summary": summary[:, : len(columns)],
        "masks/0": _Changed(
            section.nucleus_labels,
            (lambda v: v) if traits.own_nuclei else (lambda v: cell_label[v]),
        ),
        "masks/1": _Changed(section.cell_labels, lambda v: v),
        "masks/homogeneous_transform": np.diag([1 / PIXEL_UM, 1 / PIXEL_UM, 1, 1]).astype(
            np.float32
        ),
    }
    groups: dict[str, dict[str, Any]] = {
        "": {"major_version": traits.format_version, "minor_version": 0, "number_cells": n},
        "masks": {},
    }
    nuclei, owner = nuclei_of_layout(section, layout)
    polygons = (
        (nuclei, owner),
        (thinned(section.cell_rings, traits.max_vertices), np.arange(n)),
    )
    if traits.own_nuclei:
        _add_polygon_sets(groups, arrays, polygons, cells, traits.max_vertices)
    else:
        _add_polygons_of_cells(arrays, polygons, n, traits.max_vertices)
        if not traits.numbered_cells:
            arrays["seg_mask_value"] = np.arange(1, n + 1, dtype=np.uint32)
    _write_store(path, groups, arrays, {"cell_summary": {"column_names": columns}})


def _cell_summary(section: Section, cells: pa.Table) -> F64:
    nucleus_x, nucleus_y = nucleus_centroids_um(section)
    return np.stack(
        [
            *(cells[name].to_numpy() for name in ("x_centroid", "y_centroid", "cell_area")),
            nucleus_x, nucleus_y, np.nan_to_num(cells["nucleus_area"].to_numpy()),
            np.zeros(len(cells)), cells["nucleus_count"].to_numpy().astype(np.float64),
        ],
        axis=1,
    )  # fmt: skip


def _padded(rings: Rings, max_vertices: int) -> npt.NDArray[np.float32]:
    """(n, 2 × max_vertices) x, y, x, y …, filled up with zeros."""
    size = np.diff(rings.start)
    flat = np.zeros((len(size), max_vertices, 2), np.float32)
    flat[np.arange(max_vertices) < size[:, None]] = rings.vertices_um
    return flat.reshape(len(size), -1)


def _add_polygon_sets(
    groups: dict[str, dict[str, Any]],
    arrays: dict[str, Plane],
    polygons: tuple[tuple[Rings, I64], ...],
    cells: pa.Table,
    max_vertices: int,
) -> None:
    """Since XOA 2.0: a group each for nuclei and cells, whose polygons name their cell."""
    groups[""] |= {
        "polygon_set_names": ["nucleus", "cell"],
        "polygon_set_display_names": ["Nucleus boundaries", "Cell boundaries"],
        "segmentation_methods": list(METHODS),
        "spatial_units": "microns",
    }
    groups["polygon_sets"] = {}
    without_nucleus = cells["nucleus_count"].to_numpy() == 0
    for number, (rings, owner) in enumerate(polygons):
        group = f"polygon_sets/{number}"
        groups[group] = {}
        arrays[f"{group}/cell_index"] = owner.astype(np.uint32)
        arrays[f"{group}/method"] = without_nucleus[owner].astype(np.uint32)
        arrays[f"{group}/num_vertices"] = np.diff(rings.start).astype(np.int32)
        arrays[f"{group}/vertices"] = _padded(rings, max_vertices)


def _add_polygons_of_cells(
    arrays: dict[str, Plane],
    polygons: tuple[tuple[Rings, I64], ...],
    n: int,
    max_vertices: int,
) -> None:
    """Before XOA 2.0: (nucleus or cell, row of the cell, …), nothing where a cell has none."""
    vertices = np.zeros((2, n, 2 * max_vertices), np.float32)
    n_vertices = np.zeros((2, n), np.int32)
    for number, (rings, owner) in enumerate(polygons):
        vertices[number, owner] = _padded(rings, max_vertices)
        n_vertices[number, owner] = np.diff(rings.start)
    arrays["polygon_vertices"] = vertices
    arrays["polygon_num_vertices"] = n_vertices


def _write_store(
    path: Path,
    groups: Mapping[str, dict[str, Any]],
    arrays: Mapping[str, Plane],
    attributes: Mapping[str, dict[str, Any]],
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
        for name, array in arrays.items():
            _put_array(put, put_json, name, array)
            if name in attributes:
                put_json(f"{name}/.zattrs", attributes[name])
    numcodecs.blosc.set_nthreads(n_threads)


def _put_array(
    put: Callable[[str, bytes], None],
    put_json: Callable[[str, dict[str, Any]], None],
    name: str,
    array: Plane,
) -> None:
    codec = numcodecs.Blosc(cname="zstd", clevel=3, shuffle=numcodecs.Blosc.SHUFFLE)
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
    counts = [-(-n // c) for n, c in zip(array.shape, chunks, strict=True)]
    for row in range(counts[0]):
        # A row of chunks at a time: a plane may be larger than memory.
        band = np.asarray(array[row * chunks[0] : (row + 1) * chunks[0]])
        for rest in np.ndindex(*counts[1:]):
            corner = [slice(i * c, (i + 1) * c) for i, c in zip(rest, chunks[1:], strict=True)]
            part = band[(slice(None), *corner)]
            whole = np.zeros(chunks, array.dtype)
            whole[tuple(slice(0, n) for n in part.shape)] = part
            put(f"{name}/{'.'.join(map(str, (row, *rest)))}", bytes(codec.encode(whole)))
