"""Writes what a Xenium instrument leaves of a section, in the layout of XOA 3.0."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from pairing.simulate.cells_zarr import write_cells_zarr
from pairing.simulate.manifests import PIXEL_UM, experiment, gene_panel
from pairing.simulate.panel import Feature
from pairing.simulate.pictures import write_morphology
from pairing.simulate.polygons import MAX_VERTICES, mask_polygons
from pairing.simulate.render import Labels
from pairing.simulate.transcripts import Transcripts

I32 = npt.NDArray[np.int32]
F64 = npt.NDArray[np.float64]

UNASSIGNED = "UNASSIGNED"
METHODS = ("Segmented by nucleus expansion of 5.0µm", "Segmented by interior stain (18S)")


@dataclass(frozen=True, slots=True)
class Section:
    """All that a bundle tells about one section; cells in file order, labels their row + 1."""

    name: str
    prefix: npt.NDArray[np.uint32]  # (n,) ascending: the cell ids
    nucleus: I32  # masks in the morphology frame; nucleus labels are 1 … m without gaps
    cell: I32
    cell_of_nucleus: npt.NDArray[np.int64]  # (m,)
    transcripts: Transcripts
    features: tuple[Feature, ...]
    matrix: sparse.csr_matrix  # (n, n_features)

    @classmethod
    def of(
        cls,
        name: str,
        prefix: npt.NDArray[np.uint32],
        labels: Labels,
        cell_of_nucleus: npt.NDArray[np.int64],
        transcripts: Transcripts,
        features: tuple[Feature, ...],
    ) -> Section:
        """Number the nuclei that are to be seen without gaps; `cell_of_nucleus` is of all."""
        seen = np.unique(labels.nucleus)[1:]
        number = np.zeros(len(cell_of_nucleus) + 1, np.int32)
        number[seen] = np.arange(1, len(seen) + 1)
        return cls(
            name=name,
            prefix=prefix,
            nucleus=number[labels.nucleus],
            cell=labels.cell,
            cell_of_nucleus=cell_of_nucleus[seen - 1],
            transcripts=transcripts,
            features=features,
            matrix=transcripts.matrix(len(prefix), len(features)),
        )

    @property
    def cell_ids(self) -> npt.NDArray[np.str_]:
        return cell_id_strings(self.prefix)


def cell_id_strings(prefix: npt.NDArray[np.uint32]) -> npt.NDArray[np.str_]:
    """10x's code: eight nibbles as letters a to p, then the suffix `-1`."""
    nibbles = (prefix[:, None] >> np.arange(28, -1, -4, dtype=np.uint32)) & 15
    letters = (nibbles + ord("a")).astype(np.uint8)
    text = np.ascontiguousarray(letters).view("S8")[:, 0].astype("U8")
    return np.char.add(text, "-1")


def write_bundle(folder: Path, section: Section, dapi: npt.NDArray[np.uint16]) -> None:
    """Every file of the bundle into the existing, empty `folder`."""
    cells = _cells_table(section)
    rings = {"cell": _rings_um(section.cell), "nucleus": _rings_um(section.nucleus)}
    owners = {"cell": np.arange(len(section.prefix)), "nucleus": section.cell_of_nucleus}
    _write_table(cells, folder / "cells.parquet")
    _write_table(_transcripts_table(section), folder / "transcripts.parquet")
    for kind in ("cell", "nucleus"):
        table = _boundaries_table(rings[kind], section.cell_ids[owners[kind]])
        _write_table(table, folder / f"{kind}_boundaries.parquet")
    _write_matrix(folder / "cell_feature_matrix.h5", section)
    _write_zarr(folder / "cells.zarr.zip", section, cells, rings, owners)
    (folder / "morphology_focus").mkdir()
    write_morphology(folder / "morphology_focus" / "morphology_focus_0000.ome.tif", dapi, PIXEL_UM)
    _write_json(folder / "gene_panel.json", gene_panel(section.features))
    _write_json(
        folder / "experiment.xenium",
        experiment(section.name, section.cell.shape, section.transcripts, section.features, cells),
    )


def _rings_um(labels: I32) -> list[F64]:
    return [ring * PIXEL_UM for ring in mask_polygons(labels)]


def _cells_table(section: Section) -> pa.Table:
    n = len(section.prefix)
    x, y = _centroids_um(section.cell, n)
    category = np.array([f.category for f in section.features])

    def counts(*categories: str) -> npt.NDArray[np.int64]:
        columns = np.flatnonzero(np.isin(category, categories))
        return np.asarray(section.matrix[:, columns].sum(axis=1)).ravel().astype(np.int64)

    area_um2 = np.bincount(section.cell.ravel(), minlength=n + 1)[1:] * PIXEL_UM**2
    of_nucleus = np.bincount(section.nucleus.ravel())[1:] * PIXEL_UM**2
    n_nuclei = np.bincount(section.cell_of_nucleus, minlength=n)
    nucleus_um2 = np.bincount(section.cell_of_nucleus, weights=of_nucleus, minlength=n)
    return pa.table(
        {
            "cell_id": section.cell_ids,
            "x_centroid": x,
            "y_centroid": y,
            "transcript_counts": counts("predesigned_gene", "custom_gene"),
            "control_probe_counts": counts("negative_control_probe"),
            "genomic_control_counts": counts("genomic_control_probe"),
            "control_codeword_counts": counts("negative_control_codeword"),
            "unassigned_codeword_counts": counts("unassigned_codeword"),
            "deprecated_codeword_counts": counts("deprecated_codeword"),
            "total_counts": np.asarray(section.matrix.sum(axis=1)).ravel().astype(np.int64),
            "cell_area": area_um2,
            "nucleus_area": np.where(n_nuclei > 0, nucleus_um2, np.nan),
            "nucleus_count": n_nuclei.astype(np.int64),
            "segmentation_method": np.array(METHODS)[(n_nuclei == 0).astype(int)],
        }
    )


def _centroids_um(labels: I32, n: int) -> tuple[F64, F64]:
    """(x, y) of the mean pixel centre of labels 1 … n; NaN where a label has no pixel."""
    y, x = np.nonzero(labels)
    owner = labels[y, x]
    size = np.bincount(owner, minlength=n + 1)[1:]
    with np.errstate(invalid="ignore"):
        mean_x, mean_y = (np.bincount(owner, v, n + 1)[1:] / size for v in (x, y))
    return (mean_x + 0.5) * PIXEL_UM, (mean_y + 0.5) * PIXEL_UM


def _transcripts_table(section: Section) -> pa.Table:
    t = section.transcripts
    ids = pa.array([*section.cell_ids, UNASSIGNED])
    names = pa.array([f.name for f in section.features])
    categories = pa.array([f.category for f in section.features])
    is_gene = np.array([f.kind is None for f in section.features])
    fovs, fov_index = np.unique(t.fov, return_inverse=True)
    first = np.searchsorted(t.fov, fovs)  # transcripts lie by field of view
    fov_names = [f"{chr(ord('A') + f // t.n_fov_columns)}{f % t.n_fov_columns + 1}" for f in fovs]
    transcript_id = (65536 + fov_index).astype(np.uint64) << np.uint64(32)
    transcript_id += (np.arange(len(t.fov)) - first[fov_index]).astype(np.uint64)
    return pa.table(
        {
            "transcript_id": transcript_id,
            "cell_id": ids.take(pa.array(np.where(t.cell < 0, len(section.prefix), t.cell))),
            "overlaps_nucleus": t.in_nucleus.astype(np.uint8),
            "feature_name": names.take(pa.array(t.feature)),
            "x_location": t.x_um.astype(np.float32),
            "y_location": t.y_um.astype(np.float32),
            "z_location": t.z_um.astype(np.float32),
            "qv": t.qv.astype(np.float32),
            "fov_name": pa.array(fov_names).take(pa.array(fov_index)),
            "nucleus_distance": t.nucleus_distance_um.astype(np.float32),
            "codeword_index": t.codeword.astype(np.int32),
            "codeword_category": categories.take(pa.array(t.feature)),
            "is_gene": is_gene[t.feature],
        }
    )


def _boundaries_table(rings: list[F64], ids: npt.NDArray[np.str_]) -> pa.Table:
    size = np.array([len(ring) for ring in rings])
    vertices = np.concatenate(rings).astype(np.float32)
    return pa.table(
        {
            "cell_id": np.repeat(ids, size),
            "vertex_x": vertices[:, 0],
            "vertex_y": vertices[:, 1],
            "label_id": np.repeat(np.arange(1, len(rings) + 1), size),
        }
    )


def _write_table(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd", row_group_size=100_000)


def _write_matrix(path: Path, section: Section) -> None:
    # Cells × features by rows is features × cells by columns, which is what the file holds.
    by_cell = section.matrix
    arrays = {
        "barcodes": section.cell_ids.astype("S"),
        "data": by_cell.data.astype("<i4"),
        "indices": by_cell.indices.astype("<i8"),
        "indptr": by_cell.indptr.astype("<i8"),
        "shape": np.array(by_cell.shape[::-1], "<i4"),
        "features/id": np.array([f.id for f in section.features], "S"),
        "features/name": np.array([f.name for f in section.features], "S"),
        "features/feature_type": np.array([f.feature_type for f in section.features], "S"),
        "features/genome": np.full(len(section.features), b"Unknown"),
    }
    with h5py.File(path, "w") as file:
        file.attrs["filetype"] = "matrix"
        file.attrs["version"] = 2
        file.attrs["library_ids"] = np.array([b"0000000_0000000"])
        file.attrs["original_gem_groups"] = np.array([1])
        for name, array in arrays.items():
            file.create_dataset(f"matrix/{name}", data=array, chunks=True, compression="gzip")
        file.create_dataset("matrix/features/_all_tag_keys", data=np.array([b"genome"]))


def _write_zarr(
    path: Path,
    section: Section,
    cells: pa.Table,
    rings: dict[str, list[F64]],
    owners: dict[str, npt.NDArray[np.int64]],
) -> None:
    n = len(section.prefix)
    to_px = np.diag([1 / PIXEL_UM, 1 / PIXEL_UM, 1, 1]).astype(np.float32)
    arrays: dict[str, npt.NDArray[Any]] = {
        "cell_id": np.stack([section.prefix, np.ones(n, np.uint32)], axis=1),
        "cell_summary": _cell_summary(section, cells),
        "masks/0": section.nucleus.astype(np.uint32),
        "masks/1": section.cell.astype(np.uint32),
        "masks/homogeneous_transform": to_px,
    }
    without_nucleus = cells["nucleus_count"].to_numpy() == 0
    for number, kind in enumerate(("nucleus", "cell")):
        flat = np.zeros((len(rings[kind]), 2 * MAX_VERTICES), np.float32)
        for row, ring in zip(flat, rings[kind], strict=True):
            row[: ring.size] = ring.ravel()
        group = f"polygon_sets/{number}"
        arrays[f"{group}/cell_index"] = owners[kind].astype(np.uint32)
        arrays[f"{group}/method"] = without_nucleus[owners[kind]].astype(np.uint32)
        arrays[f"{group}/num_vertices"] = np.array([len(r) for r in rings[kind]], np.int32)
        arrays[f"{group}/vertices"] = flat
    root = {
        "major_version": 6,
        "minor_version": 0,
        "number_cells": n,
        "polygon_set_names": ["nucleus", "cell"],
        "polygon_set_display_names": ["Nucleus boundaries", "Cell boundaries"],
        "segmentation_methods": list(METHODS),
        "spatial_units": "microns",
    }
    groups = {"": root, "masks": {}, "polygon_sets": {}, "polygon_sets/0": {}, "polygon_sets/1": {}}
    columns = (
        "cell_centroid_x", "cell_centroid_y", "cell_area",
        "nucleus_centroid_x", "nucleus_centroid_y", "nucleus_area", "z_level", "nucleus_count",
    )  # fmt: skip
    write_cells_zarr(path, groups, arrays, {"cell_summary": {"column_names": columns}})


def _cell_summary(section: Section, cells: pa.Table) -> F64:
    n = len(section.prefix)
    owner = np.concatenate([[0], section.cell_of_nucleus + 1]).astype(np.int32)
    nucleus_x, nucleus_y = _centroids_um(owner[section.nucleus], n)
    return np.stack(
        [
            *(cells[name].to_numpy() for name in ("x_centroid", "y_centroid", "cell_area")),
            np.nan_to_num(nucleus_x), np.nan_to_num(nucleus_y),
            np.nan_to_num(cells["nucleus_area"].to_numpy()),
            np.zeros(n), cells["nucleus_count"].to_numpy().astype(np.float64),
        ],
        axis=1,
    )  # fmt: skip


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=4), encoding="utf-8")
