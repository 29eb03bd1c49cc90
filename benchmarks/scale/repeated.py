"""A section laid out many times over: bundle, slide and true nuclei of as many cells as wanted.

A simulated section of 20,000 cells is repeated on a lattice, so that per cell the large one holds
what the small one does. A step of the lattice is a whole number of tiles of the slide and of
chunks of the masks: what is encoded is copied, and labels are raised.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import h5py
import numcodecs
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
import tifffile
import zarr

from pairing.simulate import SimulationParams, simulate
from pairing.simulate.bundle import cell_id_strings
from pairing.simulate.params import BundleParams, SlideParams
from pairing.simulate.section import PIXEL_UM
from segmentation.outlines import NUCLEI_SCHEMA

TRUE_NUCLEI = "he_nuclei.parquet"

_LAYOUT: Final = "xoa-3.0"
_TILE_PX, _CHUNK_PX = 512, 1024
# 5 tiles of the slide are as wide as 3 chunks of the masks.
_MPP = 1.2 * PIXEL_UM
_STEP_PX, _STEP_MASK_PX = 5 * _TILE_PX, 3 * _CHUNK_PX
_LEVELS = (4, 16)
_QUALITY = 90
_SMALL_FILES = ("experiment.xenium", "gene_panel.json")
_NO_CELL = "UNASSIGNED"
_ROW_GROUP = 100_000


def write_unit(out: Path, n_cells: int, seed: int, workers: int) -> None:
    """The section that is repeated: not turned, at a pixel size that fits the lattice."""
    slide = SlideParams(mpp=_MPP, rotation_deg=0.0, compression="jpeg")
    params = SimulationParams(
        n_cells=n_cells, seed=seed, bundle=BundleParams(layout=_LAYOUT), slide=slide
    )
    simulate(out, params, workers)


@dataclass(frozen=True, slots=True)
class _Lattice:
    """`n` copies in rows, `steps` (x, y) steps apart."""

    n: int
    steps: tuple[int, int]

    @property
    def n_columns(self) -> int:
        return int(np.ceil(np.sqrt(self.n)))

    @property
    def n_rows(self) -> int:
        return -(-self.n // self.n_columns)

    def places(self) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Number of each copy, and (x, y) how many steps it lies from the first."""
        for i in range(self.n):
            across, down = self.steps
            yield i, np.array([i % self.n_columns * across, i // self.n_columns * down])


def repeat(unit: Path, out: Path, n_copies: int) -> None:
    """Write `outs/`, `he.ome.tif`, the alignment and the true nuclei of `n_copies` of `unit`.

    `out` appears whole or not at all.
    """
    aside = out.with_name(f"{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "outs").mkdir(parents=True)
    with tifffile.TiffFile(unit / "he.ome.tif") as slide:
        height, width = slide.pages.first.shape[:2]
    masks: Any = zarr.open_group(
        zarr.storage.ZipStore(unit / "outs/cells.zarr.zip", mode="r"), mode="r", zarr_format=2
    )
    rows, columns = masks["masks/0"].shape
    lattice = _Lattice(
        n_copies,
        (
            max(-(-width // _STEP_PX), -(-columns // _STEP_MASK_PX)),
            max(-(-height // _STEP_PX), -(-rows // _STEP_MASK_PX)),
        ),
    )
    for name in _SMALL_FILES:
        shutil.copy(unit / "outs" / name, aside / "outs" / name)
    shutil.copy(unit / "he_imagealignment.csv", aside / "he_imagealignment.csv")
    ids = _Ids.of(unit, n_copies)
    _write_tables(unit / "outs", aside / "outs", lattice, ids)
    _write_matrix(unit / "outs", aside / "outs", ids)
    _write_masks(masks, aside / "outs/cells.zarr.zip", lattice, ids)
    _write_slide(unit / "he.ome.tif", aside / "he.ome.tif", lattice)
    _write_true_nuclei(unit, aside / TRUE_NUCLEI, lattice)
    aside.rename(out)


@dataclass(frozen=True, slots=True)
class _Ids:
    """Cell ids of the unit, and the prefixes that stand for them in each copy, ascending."""

    unit: pa.Array
    prefix: npt.NDArray[np.uint32]  # (copies, cells)

    @classmethod
    def of(cls, unit: Path, n_copies: int) -> _Ids:
        ids = pq.read_table(unit / "outs/cells.parquet", columns=["cell_id"])["cell_id"]
        n = len(ids)
        spread = (2**32 - 1) // (n * n_copies)
        prefix = (np.arange(n * n_copies, dtype=np.uint64) * spread).astype(np.uint32)
        return cls(ids.combine_chunks().cast(pa.string()), prefix.reshape(n_copies, n))

    def texts(self, copy: int) -> pa.Array:
        """The ids of a copy, and last what stands for no cell."""
        return pa.array([*cell_id_strings(self.prefix[copy], _LAYOUT).tolist(), _NO_CELL])

    def rows(self, column: pa.ChunkedArray) -> pa.Array:
        """Where each id of a column is among `texts`."""
        found = pc.index_in(column.combine_chunks().cast(pa.string()), value_set=self.unit)
        return found.fill_null(len(self.unit))


def _write_tables(unit: Path, out: Path, lattice: _Lattice, ids: _Ids) -> None:
    moved = {
        "cells": ("x_centroid", "y_centroid"),
        "nucleus_boundaries": ("vertex_x", "vertex_y"),
        "cell_boundaries": ("vertex_x", "vertex_y"),
        "transcripts": ("x_location", "y_location"),
    }
    for stem, xy in moved.items():
        table = pq.read_table(unit / f"{stem}.parquet")
        rows = ids.rows(table["cell_id"])
        with pq.ParquetWriter(out / f"{stem}.parquet", table.schema, compression="zstd") as writer:
            for copy, steps in lattice.places():
                part = _set(table, "cell_id", ids.texts(copy).take(rows))
                for name, step in zip(xy, steps.tolist(), strict=True):
                    shift_um = step * _STEP_PX * _MPP
                    part = _set(part, name, pc.add(table[name].cast(pa.float64()), shift_um))
                if "label_id" in table.column_names:
                    n_labels = pc.max(table["label_id"]).as_py()
                    part = _set(part, "label_id", pc.add(table["label_id"], copy * n_labels))
                if "transcript_id" in table.column_names:
                    number = pa.scalar(copy << 52, pa.uint64())
                    part = _set(part, "transcript_id", pc.add(table["transcript_id"], number))
                writer.write_table(part, row_group_size=_ROW_GROUP)


def _set(table: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, column.cast(field.type))


def _write_matrix(unit: Path, out: Path, ids: _Ids) -> None:
    n_copies, n = ids.prefix.shape
    with (
        h5py.File(unit / "cell_feature_matrix.h5") as source,
        h5py.File(out / "cell_feature_matrix.h5", "w") as target,
    ):
        group = source["matrix"]
        source.copy(group["features"], target.create_group("matrix"))
        nnz = len(group["data"])
        for name in ("data", "indices"):
            made = target.create_dataset(
                f"matrix/{name}", (nnz * n_copies,), group[name].dtype, chunks=(min(nnz, 1 << 18),),
                compression="gzip", compression_opts=1,
            )  # fmt: skip
            for copy in range(n_copies):
                made[copy * nnz : (copy + 1) * nnz] = group[name][:]
        starts = group["indptr"][:-1] + np.arange(n_copies)[:, None] * nnz
        target["matrix/indptr"] = np.append(starts.ravel(), nnz * n_copies)
        target["matrix/shape"] = np.array([group["shape"][0], n * n_copies], "<i4")
        barcodes = cell_id_strings(ids.prefix.ravel(), _LAYOUT).astype("S")
        target.create_dataset("matrix/barcodes", data=barcodes, chunks=True, compression="gzip")


def _write_masks(unit: Any, path: Path, lattice: _Lattice, ids: _Ids) -> None:
    n_copies, n_cells = ids.prefix.shape
    prefix = ids.prefix.ravel()
    chunks_a_step = _STEP_MASK_PX // _CHUNK_PX
    codec = numcodecs.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.Blosc.SHUFFLE)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as zipped:

        def put(name: str, array: npt.NDArray[Any]) -> None:
            """An array of one chunk."""
            _put_head(zipped, name, array.shape, array.shape, array.dtype, codec)
            zeros = ".".join(["0"] * array.ndim)
            zipped.writestr(f"{name}/{zeros}", codec.encode(np.ascontiguousarray(array)))

        for group, attributes in {
            "": dict(unit.attrs) | {"number_cells": n_cells * n_copies},
            "masks/": {},
            "polygon_sets/": {},
            "polygon_sets/0/": {},
            "polygon_sets/1/": {},
        }.items():
            zipped.writestr(f"{group}.zgroup", '{"zarr_format": 2}')
            zipped.writestr(f"{group}.zattrs", json.dumps(attributes))
        put("cell_id", np.stack([prefix, np.ones(len(prefix), np.uint32)], axis=1))
        put("masks/homogeneous_transform", unit["masks/homogeneous_transform"][:])
        for number in (0, 1):
            _put_polygons(put, unit[f"polygon_sets/{number}"], f"polygon_sets/{number}", lattice,
                          n_cells)  # fmt: skip
            source = unit[f"masks/{number}"]
            n_labels = unit[f"polygon_sets/{number}/cell_index"].shape[0]
            steps = np.array(lattice.steps) * [lattice.n_columns, lattice.n_rows]
            columns, rows = (steps * _STEP_MASK_PX).tolist()
            chunk = (_CHUNK_PX, _CHUNK_PX)
            _put_head(zipped, f"masks/{number}", (rows, columns), chunk, source.dtype, codec)
            for y in range(0, source.shape[0], _CHUNK_PX):
                for x in range(0, source.shape[1], _CHUNK_PX):
                    part = source[y : y + _CHUNK_PX, x : x + _CHUNK_PX]
                    if not part.any():
                        continue  # a chunk that is not there is of zeros
                    whole = np.zeros(chunk, source.dtype)
                    whole[: part.shape[0], : part.shape[1]] = part
                    for copy, at in lattice.places():
                        raised = np.where(whole > 0, whole + np.uint32(copy * n_labels), 0)
                        column, row = (at * chunks_a_step).tolist()
                        name = f"{row + y // _CHUNK_PX}.{column + x // _CHUNK_PX}"
                        zipped.writestr(
                            f"masks/{number}/{name}", codec.encode(raised.astype(source.dtype))
                        )


def _put_polygons(put: Any, source: Any, name: str, lattice: _Lattice, n_cells: int) -> None:
    owner, method = source["cell_index"][:], source["method"][:]
    count, flat = source["num_vertices"][:], source["vertices"][:]
    points = flat.reshape(len(count), -1, 2)
    drawn = (np.arange(points.shape[1]) < count[:, None])[..., None]
    parts = [
        points + np.where(drawn, steps * _STEP_PX * _MPP, 0.0).astype(np.float32)
        for _, steps in lattice.places()
    ]
    put(f"{name}/vertices", np.concatenate(parts).reshape(-1, flat.shape[1]).astype(np.float32))
    put(f"{name}/num_vertices", np.tile(count, lattice.n))
    put(f"{name}/method", np.tile(method, lattice.n))
    raised = [owner + np.uint32(copy * n_cells) for copy, _ in lattice.places()]
    put(f"{name}/cell_index", np.concatenate(raised).astype(np.uint32))


def _put_head(
    zipped: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: np.dtype[Any],
    codec: numcodecs.Blosc,
) -> None:
    head = {
        "chunks": chunks, "compressor": codec.get_config(), "dtype": dtype.str, "fill_value": 0,
        "filters": None, "order": "C", "shape": shape, "zarr_format": 2,
    }  # fmt: skip
    zipped.writestr(f"{name}/.zarray", json.dumps(head))


def _write_slide(unit: Path, path: Path, lattice: _Lattice) -> None:
    """Level 0 is encoded once and copied; the smaller levels are made of what it shows."""
    side_x, side_y = (n * _STEP_PX for n in lattice.steps)
    with tifffile.TiffFile(unit) as tiff:
        page = tiff.pages.first
        description, pixels = page.description, page.asarray()
    old = (pixels.shape[1], pixels.shape[0])
    # What lies beyond the unit is glass, as the brightest of its corners.
    glass = np.array([pixels[y, x] for y in (0, -1) for x in (0, -1)]).max(axis=0)
    whole = np.broadcast_to(glass, (side_y, side_x, 3)).copy()
    whole[: old[1], : old[0]] = pixels
    size = (side_x * lattice.n_columns, side_y * lattice.n_rows)
    for axis, before, after in zip("XY", old, size, strict=True):
        description = description.replace(f'Size{axis}="{before}"', f'Size{axis}="{after}"')
    options: dict[str, Any] = {
        "photometric": "rgb", "compression": "jpeg", "tile": (_TILE_PX, _TILE_PX),
        "dtype": np.uint8, "metadata": None, "compressionargs": {"level": _QUALITY},
    }  # fmt: skip
    tiles = _encoded(path.with_suffix(".once"), whole, options)
    with tifffile.TiffWriter(path, ome=False, bigtiff=True) as out:
        out.write(
            _laid_out(tiles, side_x // _TILE_PX, lattice),
            shape=(size[1], size[0], 3), description=description.encode(),
            subifds=len(_LEVELS), subfiletype=0, **options,
        )  # fmt: skip
        for factor in _LEVELS:
            small: Any = cv2.resize(
                whole, (side_x // factor, side_y // factor), interpolation=cv2.INTER_AREA
            )
            shape = (size[1] // factor, size[0] // factor, 3)
            out.write(_tiles_of(small, shape), shape=shape, subfiletype=1, **options)


def _encoded(scratch: Path, whole: npt.NDArray[np.uint8], options: dict[str, Any]) -> list[bytes]:
    """The encoded tiles of a picture, row by row."""
    tifffile.imwrite(scratch, whole, **options)
    with tifffile.TiffFile(scratch) as tiff, scratch.open("rb") as file:
        page = tiff.pages.first
        tiles = []
        for offset, n_bytes in zip(page.dataoffsets, page.databytecounts, strict=True):
            file.seek(offset)
            tiles.append(file.read(n_bytes))
    scratch.unlink()
    return tiles


def _laid_out(tiles: list[bytes], n_across: int, lattice: _Lattice) -> Iterator[bytes]:
    """The tiles of all copies, row by row of the whole.

    Two places that hold the same bytes are damage: a tile is given a comment of where it lies.
    """
    for row in range(lattice.n_rows):
        for first in range(0, len(tiles), n_across):
            for column in range(lattice.n_columns):
                comment = f"{row} {column}".encode()
                head = b"\xff\xfe" + (len(comment) + 2).to_bytes(2) + comment
                for tile in tiles[first : first + n_across]:
                    yield tile[:2] + head + tile[2:]


def _tiles_of(
    small: npt.NDArray[np.uint8], shape: tuple[int, ...]
) -> Iterator[npt.NDArray[np.uint8]]:
    """Tiles of a picture that repeats itself, row by row."""
    for y in range(0, shape[0], _TILE_PX):
        rows = np.arange(y, y + _TILE_PX) % small.shape[0]
        band = small[rows]
        for x in range(0, shape[1], _TILE_PX):
            yield np.ascontiguousarray(band[:, np.arange(x, x + _TILE_PX) % small.shape[1]])


def _write_true_nuclei(unit: Path, path: Path, lattice: _Lattice) -> None:
    """As `segmentation` would find them, were it never wrong."""
    truth = pd.read_parquet(unit / "truth/he_nuclei.parquet").sort_values(["y_px", "x_px"])
    n = len(truth)
    sizes = [len(x) for x in truth["outline_x_px"]]
    corners = np.stack([np.concatenate(truth[f"outline_{a}_px"].tolist()) for a in "xy"], axis=1)
    rings = shapely.linearrings(corners, indices=np.repeat(np.arange(n), sizes))
    outlines = shapely.polygons(rings)
    with pq.ParquetWriter(path, NUCLEI_SCHEMA) as writer:
        for copy, steps in lattice.places():
            shift_px = steps * _STEP_PX
            moved = shapely.transform(outlines, lambda xy, by=shift_px: xy + by)
            columns = {
                "nucleus_id": np.arange(1, n + 1) + copy * n,
                "x_px": truth["x_px"].to_numpy() + shift_px[0],
                "y_px": truth["y_px"].to_numpy() + shift_px[1],
                "area_um2": truth["area_um2"].to_numpy(),
                "eccentricity": np.zeros(n),
                "haematoxylin": np.ones(n),
                "score": np.ones(n),
                "flags": pa.array([[]] * n, pa.list_(pa.string())),
                "polygon_px": pa.array(list(shapely.to_wkb(moved)), pa.binary()),
            }
            writer.write_table(pa.table(columns, schema=NUCLEI_SCHEMA))
