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
from shapely import Polygon

from pairing.simulate import (
    SimulationParams,
    SlideParams,
    labelled_tile,
    simulate,
)
from pairing.simulate.expression import ExpressionModel
from pairing.simulate.oracle import log_likelihood, pointwise_mutual_information
from shards.errors import BadInput

N_CELLS = 150
PIXEL_UM = 0.2125
CATEGORIES = {
    "predesigned_gene", "custom_gene", "negative_control_probe", "genomic_control_probe",
    "negative_control_codeword", "unassigned_codeword", "deprecated_codeword",
}  # fmt: skip


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("with space µ 組織") / "donor one"
    simulate(out, SimulationParams(n_cells=N_CELLS, seed=41, slide=SlideParams(mpp=0.26)))
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
    assert 60 < cells.transcript_counts.median() < 200


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
        for label, ring in table.groupby("label_id"):
            xy = ring[["vertex_x", "vertex_y"]].to_numpy(float)
            assert 4 <= len(xy) <= 25
            np.testing.assert_array_equal(xy[0], xy[-1])
            assert Polygon(xy).area == pytest.approx(areas[int(str(label)) - 1], rel=0.15)


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


@pytest.mark.parametrize("mirror", [False, True])
def test_both_pictures_show_each_nucleus_where_the_truth_has_it(
    tmp_path: Path, mirror: bool
) -> None:
    simulate(
        tmp_path / "s",
        SimulationParams(n_cells=60, seed=7, slide=SlideParams(rotation_deg=200, mirror=mirror)),
    )
    truth = pq.read_table(tmp_path / "s/truth/he_nuclei.parquet").to_pandas()
    labels = tifffile.imread(tmp_path / "s/truth/he_nuclei.tif")
    he = tifffile.imread(tmp_path / "s/he.ome.tif", is_ome=False)
    dapi = tifffile.imread(
        tmp_path / "s/outs/morphology_focus/morphology_focus_0000.ome.tif", is_ome=False
    )
    he_px = truth[["x_px", "y_px"]].to_numpy()
    um = _apply(_transform(tmp_path / "s", "xenium_um_from_he_px"), he_px)
    np.testing.assert_allclose(um, truth[["x_um", "y_um"]], atol=1e-6)
    assert np.sign(np.linalg.det(_transform(tmp_path / "s", "xenium_um_from_he_px"))) == (
        -1 if mirror else 1
    )
    for label, centre in zip(truth.label, he_px, strict=True):
        y, x = np.nonzero(labels == label)
        # Where two nuclei touch, one loses a few pixels to the other.
        assert np.hypot(x.mean() + 0.5 - centre[0], y.mean() + 0.5 - centre[1]) < 2
    red = he[..., 0].astype(float)
    assert red[labels > 0].mean() < red[labels == 0].mean() - 40
    x, y = (um / PIXEL_UM).astype(int).T
    assert np.median(dapi[y, x]) > 4 * np.median(dapi)


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


def test_the_same_seed_gives_the_same_bytes(section: Path, tmp_path: Path) -> None:
    simulate(
        tmp_path / "again", SimulationParams(n_cells=N_CELLS, seed=41, slide=SlideParams(mpp=0.26))
    )
    assert _hashes(tmp_path / "again") == _hashes(section)
    assert sorted(_hashes(section))[0] == "he.ome.tif"


def test_two_sections_of_one_donor_share_the_donor(tmp_path: Path) -> None:
    donors = []
    for seed, donor_seed in ((1, None), (2, 1), (2, None)):
        out = tmp_path / f"{seed}-{donor_seed}"
        simulate(
            out,
            SimulationParams(
                n_cells=20, seed=seed, donor_seed=donor_seed, slide=SlideParams(mpp=1.0)
            ),
        )
        with np.load(out / "truth" / "expression.npz", allow_pickle=False) as model:
            donors.append(model["donor"])
    np.testing.assert_array_equal(donors[0], donors[1])
    assert not np.allclose(donors[1], donors[2])


def test_a_folder_in_use_and_too_many_cells_are_refused(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note.txt").write_text("mine")
    with pytest.raises(BadInput, match="empty"):
        simulate(tmp_path / "used", SimulationParams(n_cells=20))
    assert [p.name for p in tmp_path.iterdir()] == ["used"]
    with pytest.raises(BadInput, match="not there yet"):
        simulate(tmp_path / "new", SimulationParams(n_cells=10**6))
    with pytest.raises(ValidationError):
        SimulationParams(n_cells=0)
    assert not (tmp_path / "new").exists()


def test_the_oracle_tells_cells_by_their_counts(larger: Path) -> None:
    counts, barcodes, names, kinds = _matrix(larger / "outs" / "cell_feature_matrix.h5")
    genes = [i for i, k in enumerate(kinds) if k == "Gene Expression"][::-1]
    symbols = [names[i] for i in genes]
    chosen = np.random.default_rng(0).choice(len(barcodes), 64, replace=False)
    ids = [barcodes[i] for i in chosen]
    batch = counts[chosen][:, genes]
    score = pointwise_mutual_information(larger / "truth", batch, symbols, ids)
    own = np.diag(score)
    for rivals in (score > own[:, None], (score > own[None, :]).T):
        assert (rivals.sum(axis=1) < 5).mean() > 0.65
    # The marginal depends on the counts alone.
    given = log_likelihood(larger / "truth", batch, symbols, ids)
    np.testing.assert_allclose(np.ptp(given - score, axis=1), 0, atol=1e-6)
    with pytest.raises(BadInput, match="NOTAGENE"):
        log_likelihood(larger / "truth", batch, [*symbols[:-1], "NOTAGENE"], ids)


def test_counts_follow_the_model_of_the_truth(larger: Path) -> None:
    """Each gene's total strays from what the model expects by no more than chance."""
    counts, _, _, kinds = _matrix(larger / "outs" / "cell_feature_matrix.h5")
    observed = counts[:, [k == "Gene Expression" for k in kinds]].toarray()
    model = ExpressionModel.read(larger / "truth" / "expression.npz")
    truth = pq.read_table(larger / "truth" / "cells.parquet").to_pandas()
    number = {name: i for i, name in enumerate(model.types)}
    profile = model.profile(truth.type.map(number).to_numpy(), truth.state.to_numpy())
    expected = profile * observed.sum(axis=1, keepdims=True)
    z = (observed.sum(0) - expected.sum(0)) / np.sqrt(expected.sum(0))
    assert np.abs(z.mean()) < 0.3
    assert 0.8 < z.std() < 1.2


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
