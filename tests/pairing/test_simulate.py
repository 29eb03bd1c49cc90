"""A simulated section holds together: bundle, slide, alignment and truth agree with each other."""

from __future__ import annotations

import csv
import hashlib
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import tifffile
import zarr
from pydantic import ValidationError
from scipy import sparse
from shapely import Polygon, contains_xy

from pairing.simulate import (
    BundleParams,
    SimulationParams,
    SlideParams,
    labelled_tile,
    simulate,
)
from pairing.simulate.architecture import TissueMap
from pairing.simulate.biology import ExpressionModel
from pairing.simulate.tissue import PERIOD_UM
from shards.errors import BadInput

N_CELLS = 150
PIXEL_UM = 0.2125
SLIDE = SlideParams(mpp=0.26, compression="jpeg")
CATEGORIES = {
    "predesigned_gene", "custom_gene", "negative_control_probe", "genomic_control_probe",
    "negative_control_codeword", "unassigned_codeword", "deprecated_codeword",
}  # fmt: skip


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("with space µ 組織") / "donor one"
    simulate(out, SimulationParams(n_cells=N_CELLS, seed=41, slide=SLIDE))
    return out


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("larger") / "s"
    simulate(out, SimulationParams(n_cells=500, seed=44, slide=SlideParams(mpp=1.0)))
    return out


def _matrix(path: Path) -> tuple[sparse.csr_matrix, list[str], list[str], list[str]]:
    with h5py.File(path) as file:
        m = file["matrix"]
        shape = m["shape"][:]
        counts = sparse.csr_matrix(
            (m["data"][:], m["indices"][:], m["indptr"][:]), shape=(shape[1], shape[0])
        )
        text = [m[k].asstr()[:].tolist() for k in ("barcodes", "features/name")]
        kinds = m["features/feature_type"].asstr()[:].tolist()
    return counts, text[0], text[1], kinds


def _masks(section: Path) -> dict[str, npt.NDArray[Any]]:
    store = zarr.storage.ZipStore(section / "outs" / "cells.zarr.zip", read_only=True)
    group = zarr.open_group(store, mode="r")
    names = ("cell_id", "masks/0", "masks/1", "polygon_sets/0/cell_index")
    return {name: np.asarray(group[name][...]) for name in names}  # type: ignore[index]  # arrays


def _transform(section: Path, name: str) -> npt.NDArray[np.float64]:
    return np.array(json.loads((section / "truth" / "transform.json").read_text())[name])


def _apply(matrix: npt.NDArray[np.float64], points: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.asarray(points @ matrix[:2, :2].T + matrix[:2, 2])


def test_matrix_is_what_the_transcripts_say(section: Path) -> None:
    counts, barcodes, names, kinds = _matrix(section / "outs" / "cell_feature_matrix.h5")
    t = pq.read_table(section / "outs" / "transcripts.parquet").to_pandas()
    kept = t[(t.cell_id != "UNASSIGNED") & (t.qv >= 20)]
    row = {c: i for i, c in enumerate(barcodes)}
    column = {n: i for i, n in enumerate(names)}
    want = np.zeros(counts.shape, np.int64)
    np.add.at(want, (kept.cell_id.map(row), kept.feature_name.map(column)), 1)
    np.testing.assert_array_equal(counts.toarray(), want)
    assert len(set(names)) == len(names)
    assert barcodes == sorted(barcodes)

    cells = pq.read_table(section / "outs" / "cells.parquet").to_pandas()
    assert cells.cell_id.tolist() == barcodes
    genes = np.array([k == "Gene Expression" for k in kinds])
    np.testing.assert_array_equal(cells.transcript_counts, want[:, genes].sum(1))
    np.testing.assert_array_equal(cells.total_counts, want.sum(1))
    assert 60 < cells.transcript_counts.median() < 300


def test_transcripts_have_the_columns_of_a_real_bundle(section: Path, shared_data: Path) -> None:
    for name in ("transcripts", "cells", "cell_boundaries", "nucleus_boundaries"):
        real = pq.read_schema(shared_data / f"xenium/mouse_ileum_tiny/{name}.parquet")
        ours = pq.read_schema(section / "outs" / f"{name}.parquet")
        assert ours.names == real.names
        assert ours.types == real.types


def test_every_kind_of_control_and_gene_is_there(section: Path) -> None:
    t = pq.read_table(section / "outs" / "transcripts.parquet").to_pandas()
    assert set(t.codeword_category) == CATEGORIES
    assert (t.is_gene == t.codeword_category.isin(["predesigned_gene", "custom_gene"])).all()
    assert 0.75 < (t.qv[t.is_gene] >= 20).mean() < 0.9
    assert 0.05 < (t.cell_id == "UNASSIGNED").mean() < 0.25
    assert {"NEGR1", "NANOG", "NANS"} <= set(t.feature_name[t.is_gene])
    _, _, names, kinds = _matrix(section / "outs" / "cell_feature_matrix.h5")
    assert set(kinds) == {
        "Gene Expression", "Negative Control Probe", "Genomic Control",
        "Negative Control Codeword", "Unassigned Codeword", "Deprecated Codeword",
    }  # fmt: skip
    targets = json.loads((section / "outs" / "gene_panel.json").read_text())["payload"]["targets"]
    assert [x["type"]["data"]["name"] for x in targets] == names


def test_masks_agree_with_the_assignment_but_for_edges(section: Path) -> None:
    masks = _masks(section)
    t = pq.read_table(section / "outs" / "transcripts.parquet").to_pandas()
    ids = pq.read_table(section / "outs" / "cells.parquet")["cell_id"].to_pylist()
    assert ((t.x_location * 64) % 1 == 0).all()
    x, y = ((t[c].to_numpy(float) / PIXEL_UM).astype(int) for c in ("x_location", "y_location"))
    looked_up = np.array(["UNASSIGNED", *ids])[masks["masks/1"][y, x]]
    differ = (looked_up != t.cell_id).mean()
    assert 0 < differ < 0.01
    in_nucleus = masks["masks/0"][y, x] > 0
    assert (in_nucleus != t.overlaps_nucleus).mean() < 0.01
    assert (t.nucleus_distance[t.overlaps_nucleus == 1] == 0).all()
    assert (t.nucleus_distance[t.cell_id == "UNASSIGNED"] > 0).all()


def test_nuclei_are_many_to_one(section: Path, larger: Path) -> None:
    for folder in (section, larger):
        masks = _masks(folder)
        cells = pq.read_table(folder / "outs" / "cells.parquet").to_pandas()
        owner = masks["polygon_sets/0/cell_index"]
        np.testing.assert_array_equal(np.bincount(owner, minlength=len(cells)), cells.nucleus_count)
        assert masks["masks/0"].max() == len(owner)
        # Every pixel of a nucleus lies in the nucleus' own cell.
        inside = masks["masks/0"] > 0
        cell_of_pixel = masks["masks/1"][inside].astype(int) - 1
        np.testing.assert_array_equal(cell_of_pixel, owner[masks["masks/0"][inside] - 1])
        assert (cells.nucleus_area.isna() == (cells.nucleus_count == 0)).all()
        truth = pq.read_table(folder / "truth" / "cells.parquet").to_pandas()
        assert truth.cell_id.tolist() == cells.cell_id.tolist()
        assert truth.nucleus_count.tolist() == cells.nucleus_count.tolist()
    assert set(cells.nucleus_count) == {0, 1, 2}


def test_polygons_are_closed_rings_about_their_masks(section: Path) -> None:
    masks = _masks(section)
    for kind, mask in (("cell", masks["masks/1"]), ("nucleus", masks["masks/0"])):
        table = pq.read_table(section / "outs" / f"{kind}_boundaries.parquet").to_pandas()
        areas = np.bincount(mask.ravel())[1:] * PIXEL_UM**2
        ratios = []
        for label, ring in table.groupby("label_id"):
            xy = ring[["vertex_x", "vertex_y"]].to_numpy(float)
            assert 4 <= len(xy) <= 25
            np.testing.assert_array_equal(xy[0], xy[-1])
            ratios.append(Polygon(xy).area / areas[int(str(label)) - 1])
        # A mask that another nucleus cuts in two is drawn by its larger piece.
        assert np.mean(np.abs(np.array(ratios) - 1) < 0.15) > 0.95
        assert max(ratios) < 1.3


def test_cell_ids_are_coded_as_10x_does(section: Path) -> None:
    prefix = _masks(section)["cell_id"][:, 0]
    ids = pq.read_table(section / "outs" / "cells.parquet")["cell_id"].to_pylist()
    digits = str.maketrans("abcdefghijklmnop", "0123456789abcdef")
    assert [int(i.split("-")[0].translate(digits), 16) for i in ids] == prefix.tolist()


def test_zip_holds_each_entry_once(section: Path) -> None:
    with zipfile.ZipFile(section / "outs" / "cells.zarr.zip") as zipped:
        names = zipped.namelist()
    assert len(names) == len(set(names))


def test_an_independent_reader_opens_the_bundle(section: Path) -> None:
    with warnings.catch_warnings():
        # Of the reader and of what it imports; what it says of the bundle itself still fails.
        for category in (DeprecationWarning, FutureWarning, ImportWarning):
            warnings.simplefilter("ignore", category)
        from spatialdata_io import xenium

        sdata = xenium(section / "outs", n_jobs=1)
    table = sdata.tables["table"]
    counts, barcodes, _, kinds = _matrix(section / "outs" / "cell_feature_matrix.h5")
    genes = np.array([k == "Gene Expression" for k in kinds])
    assert table.obs["cell_id"].tolist() == barcodes
    np.testing.assert_array_equal(table.X.toarray(), counts[:, genes].toarray())
    assert len(sdata.shapes["cell_boundaries"]) == N_CELLS
    dapi = section / "outs/morphology_focus/morphology_focus_0000.ome.tif"
    shape = tifffile.imread(dapi, is_ome=False).shape
    assert sdata.labels["cell_labels"]["scale0"]["image"].shape == shape
    assert (
        len(sdata.points["transcripts"])
        == pq.read_metadata(section / "outs" / "transcripts.parquet").num_rows
    )


@pytest.mark.parametrize(
    ("name", "mpp", "dtype", "compression", "tile"),
    [
        ("he.ome.tif", 0.26, np.uint8, "JPEG", 512),
        (
            "outs/morphology_focus/morphology_focus_0000.ome.tif",
            PIXEL_UM,
            np.uint16,
            "JPEG2000",
            1024,
        ),
    ],
)
def test_pictures_are_pyramids_with_a_pixel_size(
    section: Path, name: str, mpp: float, dtype: type, compression: str, tile: int
) -> None:
    with tifffile.TiffFile(section / name) as tiff:
        assert tiff.is_ome
        series = tiff.series[0]
        assert series.dtype == dtype
        page = tiff.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        assert (tifffile.COMPRESSION(page.compression).name, page.tilewidth, page.tilelength) == (
            compression,
            tile,
            tile,
        )
        shapes = [level.shape for level in series.levels]
        assert max(shapes[-1][:2]) <= tile
        assert [s[:2] for s in shapes[1:]] == [
            (h // 2, w // 2) for h, w in [s[:2] for s in shapes[:-1]]
        ]
        assert tiff.ome_metadata is not None
        pixels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
        assert pixels["PhysicalSizeX"] == pixels["PhysicalSizeY"] == pytest.approx(mpp)
        assert (pixels["SizeY"], pixels["SizeX"]) == shapes[0][:2]


def test_alignment_files_and_truth_agree(section: Path) -> None:
    truth = _transform(section, "morphology_px_from_he_px")
    given = np.loadtxt(section / "he_imagealignment.csv", delimiter=",")
    np.testing.assert_array_equal(given, truth)
    with (section / "he_keypoints.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["fixedX", "fixedY", "alignmentX", "alignmentY"]
    points = np.array(rows, float)
    assert len(points) >= 12
    np.testing.assert_allclose(_apply(truth, points[:, 2:]), points[:, :2], atol=1e-6)
    assert np.sqrt(abs(np.linalg.det(truth[:2, :2]))) == pytest.approx(0.26 / PIXEL_UM)


def test_the_slide_is_lopsided_and_has_blank_glass(section: Path) -> None:
    he = tifffile.imread(section / "he.ome.tif", is_ome=False)
    glass = (he.min(axis=2) > 220).astype(float)
    assert 0.25 < glass.mean() < 0.8
    size = min(glass.shape)
    square = 1 - glass[:size, :size]
    for turned in (square[::-1], square[:, ::-1], np.rot90(square), np.rot90(square, 2)):
        assert np.corrcoef(square.ravel(), turned.ravel())[0, 1] < 0.8


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_labelled_tiles_are_varied_and_repeatable() -> None:
    rgb, labels = labelled_tile(5, 160, 0.4)
    assert rgb.shape == (160, 160, 3)
    assert rgb.dtype == np.uint8
    assert labels.shape == (160, 160)
    assert labels.dtype == np.int32
    again = labelled_tile(5, 160, 0.4)
    np.testing.assert_array_equal(rgb, again[0])
    np.testing.assert_array_equal(labels, again[1])
    assert not np.array_equal(rgb, labelled_tile(6, 160, 0.4)[0])
    areas_um2 = np.bincount(labels.ravel())[1:] * 0.4**2
    inner = areas_um2[areas_um2 > 0]
    assert len(inner) >= 8
    assert 25 < np.median(inner) < 60
    grey = rgb.mean(axis=2)
    assert grey[labels > 0].mean() < grey[labels == 0].mean() - 20


def test_nuclei_touch_in_some_labelled_tiles() -> None:
    touching = []
    for seed in range(12):
        _, labels = labelled_tile(seed, 128, 0.5)
        left, right = labels[:, :-1], labels[:, 1:]
        meet = (left != right) & (left > 0) & (right > 0)
        touching.append(len(np.unique(left[meet])))
    assert sum(n > 0 for n in touching) >= 4


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers(
    section: Path, tmp_path: Path
) -> None:
    params = SimulationParams(n_cells=N_CELLS, seed=41, slide=SLIDE)
    simulate(tmp_path / "again", params, workers=2)
    assert _hashes(tmp_path / "again") == _hashes(section)
    assert sorted(_hashes(section))[0] == "he.ome.tif"


def test_two_sections_of_one_donor_share_the_donor(tmp_path: Path) -> None:
    donors = []
    for seed, donor_seed in ((1, None), (2, 1), (2, None)):
        out = tmp_path / f"{seed}-{donor_seed}"
        params = SimulationParams(
            n_cells=20, seed=seed, donor_seed=donor_seed, slide=SlideParams(mpp=1.0)
        )
        simulate(out, params)
        donors.append(ExpressionModel.read(out / "truth" / "expression" / "D1.npz").donor)
    np.testing.assert_array_equal(donors[0], donors[1])
    assert not np.allclose(donors[1], donors[2])


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note.txt").write_text("mine")
    with pytest.raises(BadInput, match="empty"):
        simulate(tmp_path / "used", SimulationParams(n_cells=20))
    assert [p.name for p in tmp_path.iterdir()] == ["used"]


@pytest.mark.parametrize(
    ("bundle", "words"),
    [
        ({"layout": "xoa-1.3", "stains": True}, "since 2.0"),
        ({"layout": "xoa-3.0", "protein": True}, "since 4.0"),
    ],
)
def test_what_a_layout_does_not_have_is_refused(bundle: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        BundleParams(**bundle)
    with pytest.raises(ValidationError):
        SimulationParams(n_cells=0)


def test_some_nuclei_are_in_one_of_the_pictures_alone(larger: Path) -> None:
    tissue = pq.read_table(larger / "truth" / "tissue_cells.parquet").to_pandas()
    cells = pq.read_table(larger / "truth" / "cells.parquet").to_pandas()
    seen = tissue.set_index(["x_um", "y_um"]).index.isin(cells.set_index(["x_um", "y_um"]).index)
    assert seen.sum() == len(cells) == 500
    nucleus = (tissue.nucleus_count > 0).to_numpy()
    one_alone = (seen != tissue.in_he.to_numpy())[nucleus].mean()
    assert 0.08 < one_alone < 0.3
    he = pq.read_table(larger / "truth" / "he_nuclei.parquet").to_pandas()
    assert set(he.cell_id.dropna()) == set(cells.cell_id[cells.in_he])
    assert he.cell_id.isna().any()


def test_labels_of_the_slide_lie_where_the_truth_has_the_nuclei(tmp_path: Path) -> None:
    """On a slide that is mirrored, stretched, torn, folded and robbed of a piece."""
    slide = SlideParams(
        mpp=0.5, mirror=True, rotation_deg=200, warp_um=20, tear_um=25, fold_um=20, missing_um=120
    )
    simulate(tmp_path / "s", SimulationParams(n_cells=900, seed=7, slide=slide))
    labels = tifffile.imread(tmp_path / "s/truth/he_nuclei.tif")
    nuclei = pq.read_table(tmp_path / "s/truth/he_nuclei.parquet").to_pandas()
    y, x = np.nonzero(labels)
    of = labels[y, x]
    n_px = np.bincount(of)
    assert set(np.flatnonzero(n_px)) == set(nuclei.label)
    whole = nuclei[n_px[nuclei.label] * 0.25 > 0.9 * nuclei.area_um2]
    assert len(whole) > 400
    found = [np.bincount(of, v + 0.5)[whole.label] / n_px[whole.label] for v in (x, y)]
    off_px = np.hypot(found[0] - whole.x_px, found[1] - whole.y_px)
    assert np.percentile(off_px, 98) < 1.5

    cells = pq.read_table(tmp_path / "s/truth/cells.parquet").to_pandas()
    for flag in ("folded", "torn", "missing"):
        assert 0 < cells[flag].mean() < 0.4, flag
    missing = cells[cells.missing & (cells.nucleus_count == 1)]
    assert not set(missing.cell_id) & set(whole.cell_id.dropna())
    he = tifffile.imread(tmp_path / "s/he.ome.tif", is_ome=False)
    at = missing[["y_px", "x_px"]].to_numpy().astype(int)
    inside = np.all((at >= 0) & (at < he.shape[:2]), axis=1)
    alone = inside & ~missing.folded.to_numpy()
    glass = np.percentile(he.min(axis=2), 95)
    assert (he[at[alone, 0], at[alone, 1]].min(axis=1) > glass - 15).mean() > 0.9


def test_both_pictures_show_the_nuclei(larger: Path) -> None:
    cells = pq.read_table(larger / "truth" / "cells.parquet").to_pandas()
    he = tifffile.imread(larger / "he.ome.tif", is_ome=False)[..., 0].astype(float)
    name = "outs/morphology_focus/morphology_focus_0000.ome.tif"
    dapi = tifffile.imread(larger / name, is_ome=False)
    one = cells[cells.nucleus_count == 1]
    x, y = (one[["x_um", "y_um"]].to_numpy() / PIXEL_UM).astype(int).T
    assert np.median(dapi[y, x]) > 3 * np.median(dapi)
    shown = one[one.in_he]
    x, y = shown[["x_px", "y_px"]].to_numpy().astype(int).T
    assert np.median(he[y, x]) < np.median(he) - 30
    # The given matrix is exact where the slide was only turned and scaled.
    matrix = np.loadtxt(larger / "he_imagealignment.csv", delimiter=",")
    um = _apply(matrix, shown[["x_px", "y_px"]].to_numpy()) * PIXEL_UM
    np.testing.assert_allclose(um, shown[["x_um", "y_um"]], atol=1e-6)


def test_the_largest_stretch_is_as_asked(tmp_path: Path) -> None:
    simulate(
        tmp_path / "s", SimulationParams(n_cells=300, seed=3, slide=SlideParams(mpp=1, warp_um=20))
    )
    cells = pq.read_table(tmp_path / "s/truth/cells.parquet").to_pandas()
    matrix = np.loadtxt(tmp_path / "s/he_imagealignment.csv", delimiter=",")
    um = _apply(matrix, cells[["x_px", "y_px"]].to_numpy()) * PIXEL_UM
    # The matrix takes up what is common to all: what is left is of that size, not more.
    left = np.abs(um - cells[["x_um", "y_um"]]).to_numpy()
    assert 0.5 < left.max() < 40
    with (tmp_path / "s/he_keypoints.csv").open(encoding="utf-8", newline="") as file:
        points = np.array(list(csv.reader(file))[1:], float)
    residual = np.abs(_apply(matrix, points[:, 2:]) - points[:, :2]) * PIXEL_UM
    assert residual.max() > 0.3


def test_the_next_section_has_the_architecture_and_other_cells(tmp_path: Path) -> None:
    pictures, cells = [], []
    for serial in (False, True):
        slide = SlideParams(mpp=1.0, rotation_deg=0, serial_section=serial)
        out = tmp_path / str(serial)
        simulate(out, SimulationParams(n_cells=400, seed=5, slide=slide))
        pictures.append(
            tifffile.imread(out / "he.ome.tif", is_ome=False)[..., 1].astype(np.float32)
        )
        cells.append(pq.read_table(out / "truth" / "he_nuclei.parquet").to_pandas())
    assert cells[1].cell_id.isna().all()
    height, width = np.minimum(*(p.shape for p in pictures))
    coarse = [
        p[: height // 16 * 16, : width // 16 * 16].reshape(height // 16, 16, -1, 16).mean((1, 3))
        for p in pictures
    ]
    assert np.corrcoef(coarse[0].ravel(), coarse[1].ravel())[0, 1] > 0.8
    same = cells[1].merge(cells[0], on=["x_um", "y_um"])
    assert len(same) == 0


def test_other_pieces_lie_beside_the_section(tmp_path: Path) -> None:
    slide = SlideParams(mpp=1.0, other_pieces=2)
    simulate(tmp_path / "s", SimulationParams(n_cells=150, seed=8, slide=slide))
    he = tifffile.imread(tmp_path / "s/he.ome.tif", is_ome=False)
    labels = tifffile.imread(tmp_path / "s/truth/he_nuclei.tif")
    tissue = he.min(axis=2) < 200
    columns = np.flatnonzero(labels.any(axis=0))
    own = np.zeros(he.shape[1], bool)
    own[columns[0] : columns[-1] + 1] = True
    assert tissue[:, own].sum() > 5000
    assert tissue[:, ~own].sum() > 5000
    assert len(pq.read_table(tmp_path / "s/outs/cells.parquet")) == 150


def test_a_microarray_has_a_core_for_each_donor(tmp_path: Path) -> None:
    params = SimulationParams(n_cells=203, seed=9, n_donors=4, slide=SlideParams(mpp=1.0))
    simulate(tmp_path / "s", params)
    truth = tmp_path / "s" / "truth"
    cells = pq.read_table(truth / "cells.parquet").to_pandas()
    assert cells.donor.value_counts().to_dict() == {"D1": 51, "D2": 51, "D3": 51, "D4": 50}
    drawn = json.loads((truth / "donors.geojson").read_text(encoding="utf-8"))["features"]
    inside = np.stack(
        [
            contains_xy(Polygon(f["geometry"]["coordinates"][0]), cells.x_px, cells.y_px)
            for f in drawn
        ]
    )
    assert (inside.sum(axis=0) == 1).all()
    names = np.array([f["properties"]["donor"] for f in drawn])
    assert names[inside.argmax(axis=0)].tolist() == cells.donor.tolist()
    with (truth / "donors.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["cell_id"], r["donor"]) for r in rows] == list(
        zip(cells.cell_id, cells.donor, strict=True)
    )
    assert sorted(p.stem for p in (truth / "expression").iterdir()) == ["D1", "D2", "D3", "D4"]


def test_several_fields_of_view_are_one_section(tmp_path: Path) -> None:
    """Masks, cells and transcripts agree across the seams."""
    simulate(tmp_path / "s", SimulationParams(n_cells=1000, seed=4, slide=SlideParams(mpp=1.0)))
    masks = _masks(tmp_path / "s")
    assert min(masks["masks/1"].shape) > 2 * 1024
    cells = pq.read_table(tmp_path / "s/outs/cells.parquet").to_pandas()
    area_px = np.bincount(masks["masks/1"].ravel(), minlength=1001)[1:]
    np.testing.assert_allclose(area_px * PIXEL_UM**2, cells.cell_area)
    y, x = np.nonzero(masks["masks/1"])
    of = masks["masks/1"][y, x]
    for column, v in (("x_centroid", x), ("y_centroid", y)):
        mean_um = np.bincount(of, v + 0.5)[1:] / area_px * PIXEL_UM
        np.testing.assert_allclose(mean_um, cells[column])
    t = pq.read_table(tmp_path / "s/outs/transcripts.parquet").to_pandas()
    assert t.fov_name.nunique() > 1
    x, y = ((t[c].to_numpy(float) / PIXEL_UM).astype(int) for c in ("x_location", "y_location"))
    looked_up = np.array(["UNASSIGNED", *cells.cell_id])[masks["masks/1"][y, x]]
    assert (looked_up == t.cell_id).mean() > 0.998
    ring = pq.read_table(tmp_path / "s/outs/cell_boundaries.parquet").to_pandas()
    drawn = [
        Polygon(r[["vertex_x", "vertex_y"]].to_numpy()).area for _, r in ring.groupby("label_id")
    ]
    assert np.corrcoef(drawn, cells.cell_area)[0, 1] > 0.98


def test_vessels_drift_around_the_period() -> None:
    """Where one drifted beyond its edge, no next section could be drawn."""
    rng = np.random.default_rng(1)
    tissue_map = TissueMap.draw(rng, PERIOD_UM, None)
    for _ in range(40):
        tissue_map = tissue_map.next_section(rng)
        centres = tissue_map.vessels[:, :2]
        assert ((centres >= 0) & (centres < PERIOD_UM)).all()
