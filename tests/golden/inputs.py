"""The fixed input of the golden tests: a run, a slide and tables, of whole-number arithmetic alone.

Nothing is drawn by chance or by a library that may draw it otherwise elsewhere. Every size, shift
and turn is a sum of powers of two: positions, distances and the weights of a resampling come out
exact, so that no processor rounds them in its own way.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
import tifffile

from pairing.cells import CELLS_FILE, NEIGHBORS_FILE, PANEL_FILE
from pairing.geometry import Affine
from pairing.patch_blocks import INDEX_SCHEMA
from pairing.patches import INDEX_FILE
from segmentation.outlines import NUCLEI_SCHEMA
from shards.schema import Gene, Panel
from tests.pairing.handmade import CONTROLS, LURES, Bundle, rings
from tests.pairing.slides import repoint, spoil

Points = npt.NDArray[np.float64]
Rgb = npt.NDArray[np.uint8]

HE_MPP, MORPHOLOGY_MPP = 0.25, 0.5
WIDTH, HEIGHT, TILE = 2304, 768, 128
# The section lies on the slide turned by a quarter.
HE_PX_FROM_XENIUM_UM = Affine.of([[0, 4, 0], [-4, 0, HEIGHT], [0, 0, 1]])
MATRIX = f"0,-0.5,{HEIGHT // 2}\n0.5,0,0\n0,0,1\n"
TURNED_MATRIX = f"0,0.5,0\n-0.5,0,{WIDTH // 2}\n0,0,1\n"  # the other way round: wrong
# Morphology x, y and slide x, y; two of them set a pixel or two aside.
KEYPOINTS = (
    "fixedX,fixedY,alignmentX,alignmentY\n"
    "0,0,0,768\n0,1152,2304,768\n384,0,1,0\n384,1152,2304,-2\n192,576,1152,384\n"
)


def he_centres_px() -> Points:
    """(n, 2) centres of the cells on the slide: rows that fill two thirds of it, unevenly.

    Two more lie where a patch just reaches the border of the slide and just over it, as others do
    by far; the last three lie outside, two of them 20 µm from each other.
    """
    places = [
        (20.0 + 80 * i + 2 * ((5 * i + 3 * j) % 7), 24 + 60 * j + 2.25 * ((3 * i + 7 * j) % 5))
        for j in range(12)
        for i in range(28)
        if i - 2 * j <= 14
    ]
    places += [(64.0, 700.5), (63.75, 655.5), (2340.0, 300.0), (2404.0, 348.0), (700.0, -8.0)]
    return np.array(places, np.float64)


def xenium_centres_um() -> Points:
    return HE_PX_FROM_XENIUM_UM.inverse(he_centres_px())


def cell_ids(n: int) -> list[str]:
    letters = "abcdefghijklmnop"
    return [f"aaaaaa{letters[i // 16 % 16]}{letters[i % 16]}-{i // 256 + 1}" for i in range(n)]


# ---------------------------------------------------------------- pictures


def stained(centres_px: Points) -> Rgb:
    """(Y, X, 3) glass with squares of tissue, and a dark nucleus in each; no two pixels alike."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    texture = (3 * x + 5 * y + x * y // 64) % 17
    image = np.stack([240 + texture % 3, 238 + texture % 5, 242 + texture % 2], axis=-1)
    for half, colour in ((44, (212, 160, 196)), (14, (116, 70, 140))):
        for cx, cy in centres_px.astype(int).tolist():
            rows = slice(max(cy - half, 0), max(cy + half, 0))
            columns = slice(max(cx - half, 0), max(cx + half, 0))
            image[rows, columns] = np.array(colour) + texture[rows, columns, None]
    slide: Rgb = image.astype(np.uint8)
    return slide


def quartered(image: Rgb) -> Rgb:
    """Whole means of 4 x 4 pixels."""
    height, width, channels = image.shape
    blocks = image.reshape(height // 4, 4, width // 4, 4, channels).astype(np.int64)
    means: Rgb = (blocks.sum(axis=(1, 3)) // 16).astype(np.uint8)
    return means


def write_slide(path: Path) -> Path:
    """An OME-TIFF with a pyramid, and in it a black hole, a garbled tile and one left out."""
    image = stained(he_centres_px())
    image[300:360, 500:570] = 0
    options: dict[str, Any] = {
        "tile": (TILE, TILE), "photometric": "rgb", "compression": "deflate",
        "compressionargs": {"level": 1},
    }  # fmt: skip
    sizes = {"PhysicalSizeX": HE_MPP, "PhysicalSizeY": HE_MPP}
    with tifffile.TiffWriter(path, ome=True) as out:
        out.write(image, subifds=1, metadata={"axes": "YXS", **sizes}, **options)
        out.write(quartered(image), subfiletype=1, metadata=None, **options)
    n_across = WIDTH // TILE
    spoil(path, 4 * n_across + 8)
    repoint(path, 2 * n_across + 12, (0, 0))
    return path


def write_morphology(bundle: Path) -> None:
    """The DAPI image; its margin not imaged.

    The percentiles that make its grey scale, and few around them, are whole numbers: 170 and 3000.
    """
    height, width = WIDTH // 2, HEIGHT // 2
    y, x = np.mgrid[:height, :width]
    image = np.full((height, width), 200)
    image[:8], image[8:20] = 150, 170  # 170 from the 0.7th to the 1.1th
    for cx, cy in (xenium_centres_um() / MORPHOLOGY_MPP).astype(int).tolist():
        rows, columns = slice(max(cy - 8, 0), cy + 8), slice(max(cx - 8, 0), cx + 8)
        image[rows, columns] = 900 + (7 * x + 11 * y)[rows, columns] % 1800
        image[rows, columns][4:5, 4:7] = 3000  # from the 99.74th to the 99.92th
        image[rows, columns][6:7, 6:7] = 4000
    image[-24:] = 0
    path = bundle / "morphology_focus" / "morphology_focus_0000.ome.tif"
    sizes = {"PhysicalSizeX": MORPHOLOGY_MPP, "PhysicalSizeY": MORPHOLOGY_MPP}
    metadata = {"axes": "YX", **sizes}
    tifffile.imwrite(
        path, image.astype(np.uint16), ome=True, metadata=metadata, tile=(128, 128),
        photometric="minisblack",
    )  # fmt: skip


# ---------------------------------------------------------------- the run


def square(centre: npt.ArrayLike, half: float) -> Points:
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]], np.float64)
    return np.asarray(centre, np.float64) + half * corners


def write_bundle(folder: Path, *, transcripts: bool = True) -> Path:
    """A bundle without masks: cells with one nucleus, with none and with two; controls; all qv."""
    bundle = Bundle(folder)
    centres_um = xenium_centres_um()
    n = len(centres_um)
    ids = cell_ids(n)
    n_nuclei = np.array([0 if i % 11 == 5 else 2 if i % 13 == 3 else 1 for i in range(n)])
    bundle.experiment["pixel_size"] = MORPHOLOGY_MPP
    bundle.cells = pd.DataFrame(
        {
            "cell_id": ids,
            "x_centroid": centres_um[:, 0],
            "y_centroid": centres_um[:, 1],
            "cell_area": 60.0 + np.arange(n) % 32,
            "nucleus_area": np.where(n_nuclei > 0, 16.0 * n_nuclei, np.nan),
            "nucleus_count": n_nuclei,
        }
    )
    outlines = [
        (ids[i], square(centres_um[i] + (0.25 * (i % 4) + 5 * k, 0.5 * (i % 3)), 2 + i % 2))
        for i in range(n)
        for k in range(n_nuclei[i])
    ]
    outlines.append(("UNASSIGNED", square((8, 500), 2)))
    bundle.nuclei = rings(*((label, i, ring) for label, (i, ring) in enumerate(outlines, start=1)))
    bundle.transcripts = _transcripts(ids)
    bundle.counted = bundle.transcripts.iloc[:-3]  # the instrument's own matrix lacks some
    path = bundle.write()
    if not transcripts:
        (path / "transcripts.parquet").unlink()
    write_morphology(path)
    return path


def _transcripts(ids: list[str]) -> pd.DataFrame:
    names = [*LURES, *CONTROLS]
    category = ["predesigned_gene"] * len(LURES) + [kind for kind, _ in CONTROLS.values()]
    owner = np.repeat(np.arange(len(ids)), np.arange(len(ids)) * 7 % 23)
    k = np.arange(len(owner))
    feature = np.where(k % 31 == 0, len(LURES) + k // 31 % len(CONTROLS), k * (owner + 1) % 7)
    cell_id = np.array(ids, object)[owner]
    cell_id[k % 37 == 0] = "UNASSIGNED"
    return pd.DataFrame(
        {
            "cell_id": cell_id,
            "overlaps_nucleus": (k % 2).astype(np.uint8),
            "feature_name": np.array(names, object)[feature],
            "x_location": (k % 64).astype(np.float32),
            "y_location": (k % 32).astype(np.float32),
            "qv": np.array([40, 20, 30, 19.75, 25], np.float32)[k % 5],
            "fov_name": "A1",
            "nucleus_distance": np.float32(1.5),
            "codeword_category": np.array(category, object)[feature],
            "is_gene": feature < len(LURES),
        }
    )


def write_masked_bundle(folder: Path) -> Path:
    """Three cells whose nuclei have masks, that say other centres than their outlines."""
    bundle = Bundle(folder)
    bundle.experiment["pixel_size"] = MORPHOLOGY_MPP
    nuclei, cells = np.zeros((2, 24, 64), np.uint32)
    for i in range(3):
        cells[2:22, 20 * i + 2 : 20 * i + 20] = i + 1
    nuclei[4:8, 4:12], nuclei[4:8, 44:48], nuclei[12:20, 46:50] = 1, 2, 3
    bundle.cells["x_centroid"], bundle.cells["y_centroid"] = [5.5, 15.5, 25.5], 6.0
    bundle.cells["nucleus_count"] = [1, 0, 2]
    bundle.nuclei = rings(
        (1, bundle.cells["cell_id"][0], square((3.75, 3.25), 1)),
        (2, bundle.cells["cell_id"][2], square((23, 3), 1)),
        (3, bundle.cells["cell_id"][2], square((24, 8), 1)),
    )
    path = bundle.write()
    bundle.write_masks(
        masks__0=nuclei,
        masks__1=cells,
        polygon_sets__0__cell_index=np.array([0, 2, 2], np.uint32),
        polygon_sets__0__num_vertices=np.zeros(3, np.int32),
        polygon_sets__0__vertices=np.zeros((3, 10), np.float32),
        polygon_sets__1__cell_index=np.array([0, 1, 2], np.uint32),
        polygon_sets__1__num_vertices=np.zeros(3, np.int32),
        polygon_sets__1__vertices=np.zeros((3, 10), np.float32),
    )
    return path


def he_nuclei() -> pa.Table:
    """Nuclei as segmentation writes them, beside those of the cells: shifted, missing, doubled.

    Some overlap theirs by less than a match needs; some doubled ones overlap it alike.
    """
    rows: list[dict[str, Any]] = []
    for i, (x, y) in enumerate(he_centres_px().tolist()):
        shifts = [(2 * (i % 5) - 4 + (0, 5, 13)[i % 3 if i % 4 == 0 else 0], 0)]
        if i % 7 == 2:
            shifts = [(-5, 0), (5, 0)]
        if i % 13 == 3:  # the cell has two
            shifts = [(0, 0), (1, -19)]
        for dx, dy in [] if i % 9 == 4 else shifts:
            half = 8 + i % 3
            ring = square((x + dx, y + dy + i % 4 - 2), half)
            rows.append(
                {
                    "nucleus_id": len(rows) + 1,
                    "x_px": x,
                    "y_px": y,
                    "area_um2": (2 * half * HE_MPP) ** 2,
                    "eccentricity": 0.0,
                    "haematoxylin": 0.5,
                    "score": 0.75,
                    "flags": [],
                    "polygon_px": shapely.to_wkb(shapely.Polygon(ring)),
                }
            )
    return pa.Table.from_pylist(rows, schema=NUCLEI_SCHEMA)


# ---------------------------------------------------------------- donors and labels


def write_donors(path: Path) -> Path:
    """Three donors by polygons on the slide; cells between them have none."""
    boxes = {"D1": (0, 0, 800, HEIGHT), "D2": (830, 0, 1500, HEIGHT), "D3": (1500, 0, WIDTH, 700)}
    features = [
        {
            "type": "Feature",
            "properties": {"donor": donor},
            "geometry": shapely.geometry.mapping(shapely.box(*box)),
        }
        for donor, box in boxes.items()
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def write_labels(path: Path, ids: list[str]) -> Path:
    lines = [f"{cell_id},cluster,type {i % 4}" for i, cell_id in enumerate(ids) if i % 6]
    path.write_text("\n".join(["cell_id,group,label", *lines, ""]))
    return path


# ---------------------------------------------------------------- what the shards are made of


def errors_um(ids: list[str]) -> pd.Series[float]:
    """Registration errors by cell_id: some above 5 µm, one at it, some not assessed."""
    errors = [np.nan if i % 9 == 0 else 0.25 * (i % 23) for i in range(len(ids))]
    return pd.Series(errors, index=pd.Index(ids, name="cell_id"))


def write_cells_artifact(folder: Path) -> Path:
    """The files of a cells artifact, by hand: what the cells stage does is no matter here."""
    folder.mkdir()
    centres_um = xenium_centres_um()
    n = len(centres_um)
    i = np.arange(n)
    matched = i % 4 != 1
    panel = Panel.of("human", [Gene(symbol=s, ensembl=None) for s in LURES])
    indptr = np.concatenate([[0], np.cumsum(i % 6)]).astype(np.int64)
    indices = np.concatenate([np.arange(k % 6) for k in range(n)]).astype(np.int32)
    data = (1 + np.arange(len(indices)) * 5 % 19).astype(np.uint32)
    data[100] = 70_000  # more than 16 bits hold
    pq.write_table(
        pa.table(
            {
                "cell_id": cell_ids(n),
                "x_um": centres_um[:, 0],
                "y_um": centres_um[:, 1],
                "center": np.where(i % 3 == 0, "cell", "nucleus"),
                "n_counts": np.add.reduceat(np.append(data, 0), indptr[:-1]) * (i % 6 > 0),
                "he_nucleus_id": pa.array(i + 1, pa.int64(), mask=~matched),
                "he_area_um2": np.where(matched, 16.0 + i % 8, np.nan),
                "he_iou": np.where(matched, 0.5 + i % 16 / 32, np.nan),
                "he_distance_um": np.where(matched, i % 4 / 4, np.nan),
            }
        ),
        folder / CELLS_FILE,
    )
    (folder / PANEL_FILE).write_text(panel.model_dump_json())
    neighbors = np.stack([(i + step) % n for step in (1, 5, -1)], axis=1).astype(np.int32)
    neighbors[i % 8 == 0, 2] = -1
    np.save(folder / NEIGHBORS_FILE, neighbors)
    for name, array in (("indptr", indptr), ("indices", indices), ("data", data)):
        np.save(folder / f"counts_{name}.npy", array)
    return folder


def write_patches_artifact(folder: Path) -> Path:
    """The files of a patches artifact, by hand; what stands for a JPEG is any bytes."""
    folder.mkdir()
    columns: dict[str, list[Any]] = {name: [] for name in INDEX_SCHEMA.names}
    parts = {"part-00000-00000": bytearray(), "part-00000-00001": bytearray()}
    for row, (x, y) in enumerate(he_centres_px()[:-3].tolist()):
        name = "part-00000-00000" if x < 2048 else "part-00000-00001"
        picture = bytes((row + 3 * k) % 251 for k in range(40 + row % 600))
        scores = (row % 8 / 8, row % 5 / 32, 1 + row % 7 / 4, None if row % 9 else 0.0)
        values = (
            *(row, name, len(parts[name]), len(picture), x, y, row % 10 == 0, row % 17 == 0),
            *scores,
        )
        for column, value in zip(INDEX_SCHEMA.names, values, strict=True):
            columns[column].append(value)
        parts[name] += picture
    for name, data in parts.items():
        (folder / f"{name}.jpgs").write_bytes(data)
    pq.write_table(pa.table(columns, schema=INDEX_SCHEMA), folder / INDEX_FILE)
    return folder
