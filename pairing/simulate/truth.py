"""The truth beside a simulation: what no instrument tells and every score needs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile
from scipy import sparse

from pairing.simulate.biology import PHASES, ExpressionModel
from pairing.simulate.celltypes import CELL_TYPES
from pairing.simulate.mount import SlidePicture
from pairing.simulate.params import SimulationParams
from pairing.simulate.render import Mounted
from pairing.simulate.tissue import Tissue

SIMULATOR_VERSION = 2

_TILE_PX = 512
_CORE_CORNERS = 48


def donor_names(n_donors: int) -> list[str]:
    """D1, D2, …: the donors of a run, in the order of its cores."""
    return [f"D{i + 1}" for i in range(n_donors)]


def write_truth(
    folder: Path,
    params: SimulationParams,
    tissue: Tissue,
    cell_ids: Sequence[str],
    models: Sequence[ExpressionModel],
    made_by: sparse.csr_matrix,
    section: Mounted,
    picture: SlidePicture,
    morphology_px_from_he_px: npt.NDArray[np.float64],
) -> None:
    """Write every file of `truth/` into the existing, empty `folder`; see docs/simulator.md.

    `section` is what lies on the slide: the tissue itself or the section after it.
    """
    donors = donor_names(params.n_donors)
    own = section if section.tissue is tissue else Mounted.of(tissue, section.slide_map)
    tissue_cells = _tissue_cells(own, donors)
    pq.write_table(tissue_cells, folder / "tissue_cells.parquet")
    seen = np.flatnonzero(tissue.cells.seen)
    cells = tissue_cells.take(pa.array(seen)).add_column(0, "cell_id", pa.array(cell_ids))
    pq.write_table(cells, folder / "cells.parquet")
    ids = pa.array(cell_ids) if section.tissue is tissue else None
    pq.write_table(_he_nuclei(section, picture, ids), folder / "he_nuclei.parquet")
    _write_labels(folder / "he_nuclei.tif", picture)
    (folder / "expression").mkdir()
    for name, model in zip(donors, models, strict=True):
        model.write(folder / "expression" / f"{name}.npz")
    sparse.save_npz(folder / "spill.npz", made_by)
    _write_csv(folder / "donors.csv", ("cell_id", "donor"), cell_ids, cells["donor"].to_pylist())
    _write_csv(
        folder / "cell_groups.csv", ("cell_id", "group"), cell_ids, cells["type"].to_pylist()
    )
    _write_json(folder / "donors.geojson", _cores(section, donors))
    slide_map = section.slide_map
    transform = {
        "morphology_px_from_he_px": morphology_px_from_he_px.tolist(),
        "xenium_um_from_he_px": slide_map.um_from_px.matrix if slide_map.is_affine else None,
    }
    _write_json(folder / "transform.json", transform)
    about = {"simulator_version": SIMULATOR_VERSION, "params": params.model_dump()}
    _write_json(folder / "simulation.json", about)


def _tissue_cells(section: Mounted, donors: list[str]) -> pa.Table:
    """One row a cell of the tissue; the position is the mean of its nuclei's, hidden ones too."""
    cells, nuclei = section.tissue.cells, section.tissue.nuclei
    n = len(cells.state)
    n_placed = np.bincount(nuclei.cell, minlength=n)
    area = np.bincount(nuclei.cell, weights=nuclei.area_um2, minlength=n)
    x_um, y_um = (np.bincount(nuclei.cell, w, n) / n_placed for w in nuclei.centres_um.T)
    um = np.stack([x_um, y_um], axis=1)
    px = section.slide_map.px_from_um(um)
    shown = np.bincount(nuclei.cell, weights=nuclei.in_he, minlength=n)
    return pa.table(
        {
            "donor": pa.array(donors).take(pa.array(cells.donor)),
            "type": np.array([t.name for t in CELL_TYPES])[cells.type_index],
            "state": cells.state,
            "niche": cells.niche,
            "phase": np.array(PHASES)[cells.phase],
            "x_um": x_um,
            "y_um": y_um,
            "x_px": px[:, 0],
            "y_px": px[:, 1],
            "nucleus_count": np.where(cells.has_nucleus, n_placed, 0),
            "nucleus_area_um2": np.where(cells.has_nucleus, area, np.nan),
            "in_he": shown > 0,
            **section.slide_map.flags(um),
        }
    )


def _he_nuclei(section: Mounted, picture: SlidePicture, ids: pa.Array | None) -> pa.Table:
    """One row for each label of `he_nuclei.tif`, with its outline in H&E pixels."""
    nuclei, cells = section.tissue.nuclei, section.tissue.cells
    there = np.zeros(len(nuclei.cell) + 1, bool)
    for block in _rows_of_tiles(picture):
        there[np.unique(block)] = True
    shown = np.flatnonzero(there[1:])
    um = nuclei.take(shown).outlines_um()
    px = section.slide_map.px_from_um(um.reshape(-1, 2)).reshape(um.shape)
    starts = pa.array(np.arange(len(um) + 1, dtype=np.int32) * um.shape[1])
    row = cells.instrument_row[nuclei.cell[shown]]
    if ids is None:
        cell_id = pa.nulls(len(shown), pa.string())
    else:
        cell_id = ids.take(pa.array(row, mask=row < 0))
    return pa.table(
        {
            "label": (shown + 1).astype(np.int64),
            "cell_id": cell_id,
            "type": np.array([t.name for t in CELL_TYPES])[cells.type_index[nuclei.cell[shown]]],
            "x_um": nuclei.x_um[shown],
            "y_um": nuclei.y_um[shown],
            "x_px": section.centres_px[shown, 0],
            "y_px": section.centres_px[shown, 1],
            "area_um2": nuclei.area_um2[shown],
            "outline_x_px": pa.ListArray.from_arrays(starts, px[..., 0].ravel()),
            "outline_y_px": pa.ListArray.from_arrays(starts, px[..., 1].ravel()),
        }
    )


def _rows_of_tiles(picture: SlidePicture) -> Iterator[npt.NDArray[np.uint32]]:
    for y in range(0, picture.nucleus.shape[0], _TILE_PX):
        yield np.asarray(picture.nucleus[y : y + _TILE_PX])


def _write_labels(path: Path, picture: SlidePicture) -> None:
    height, width = picture.nucleus.shape

    def tiles() -> Iterator[npt.NDArray[np.uint32]]:
        for rows in _rows_of_tiles(picture):
            for x in range(0, width, _TILE_PX):
                tile = np.zeros((_TILE_PX, _TILE_PX), np.uint32)
                part = rows[:, x : x + _TILE_PX]
                tile[: part.shape[0], : part.shape[1]] = part
                yield tile

    with tifffile.TiffWriter(path, bigtiff=height * width > 2**29) as tiff:
        tiff.write(
            tiles(),
            shape=(height, width),
            dtype=np.uint32,
            tile=(_TILE_PX, _TILE_PX),
            compression="zlib",
            metadata=None,
        )


def _cores(section: Mounted, donors: list[str]) -> dict[str, Any]:
    """The pieces of tissue as polygons on the slide, as a pathologist would draw around them."""
    features = []
    for piece in section.tissue.pieces:
        x0, y0, x1, y1 = piece.box_um
        turn = np.linspace(0, 2 * np.pi, _CORE_CORNERS, endpoint=False)
        # Around the box, through its corners: a core of a microarray keeps more distance.
        reach = np.hypot(x1 - x0, y1 - y0) / 2 if len(section.tissue.pieces) == 1 else (x1 - x0) / 2
        middle = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
        around = middle + (reach + 8) * np.stack([np.cos(turn), np.sin(turn)], axis=1)
        corners = section.slide_map.px_from_um(around).tolist()
        ring = [*corners, corners[0]]
        features.append(
            {
                "type": "Feature",
                "properties": {"donor": donors[piece.donor]},
                "geometry": {"type": "Polygon", "coordinates": [ring]},
            }
        )
    return {"type": "FeatureCollection", "features": features}


def _write_csv(path: Path, header: tuple[str, str], *columns: Sequence[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(zip(*columns, strict=True))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
