"""`cellpair export --to spatialdata`: stores that spatialdata reads, with every cell in place."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely

from flows import pipeline
from flows.cli import main
from flows.cluster import BlockMap, Runtime
from flows.config import read_curate_config
from pairing.registration.record import read_registration
from pairing.simulate import SimulationParams, SlideParams, simulate
from pairing.xenium import open_xenium
from segmentation.config import NUCLEI_FILE
from shards.dataset import dataset_path, read_dataset
from shards.schema import Dataset
from shards.stream import read_stream

# spatialdata and what it imports warn of their own futures.
pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG = """
name = "spatial"
out = "out"
[patch]
fov_um = 32
size_px = 64
[split]
assign = { D1 = "train", D2 = "test", D9 = "val" }
[[runs]]
id = "he"
xenium = "he/outs"
slide = "he/he.ome.tif"
alignment = "he/he_imagealignment.csv"
donor = "D9"
[[runs]]
id = "dapi"
xenium = "dapi"
image = "morphology"
donor = "D1"
"""
HE_MPP = 0.5
REAL = """
name = "real"
out = "out"
[[runs]]
id = "ileum"
xenium = "{bundle}"
image = "morphology"
donor = "M1"
species = "mouse"
"""


LONG_AGO = (1e9, 1e9)


def curate(config: Path, *only: str) -> Dataset:
    """The stages and the dataset, without the pages of the report."""
    with BlockMap(Runtime(workers=1)) as blocks:
        done = pipeline.curate(read_curate_config(config), blocks, only=only)
    assert done.dataset is not None
    return done.dataset


@pytest.fixture(scope="module")
def curated(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a slide that is stretched, and one of DAPI patches."""
    folder = tmp_path_factory.mktemp("spatial") / "é"
    stretched = SlideParams(mpp=HE_MPP, warp_um=8)
    simulate(folder / "he", SimulationParams(n_cells=250, seed=5, slide=stretched))
    shutil.copytree(simulated / "outs", folder / "dapi")
    for path in folder.rglob("*"):
        os.utime(path, LONG_AGO)  # what changed a moment ago is not remembered
    (folder / "curate.toml").write_text(CONFIG, encoding="utf-8")
    curate(folder / "curate.toml")
    return folder


@pytest.fixture(scope="module")
def two_donors(curated: Path) -> Path:
    """A dataset of the same folder in which the run on the slide has two donors by file."""
    before = (curated / "out" / "dataset.json").read_bytes()
    cells = pd.read_parquet(curated / "he" / "truth" / "cells.parquet")
    cells["donor"] = np.where(cells.index % 2, "D1", "D2")
    cells[["cell_id", "donor"]].to_csv(curated / "donors.csv", index=False)
    config = curated / "two.toml"
    config.write_text(CONFIG.replace('donor = "D9"', 'donors = "donors.csv"'), encoding="utf-8")
    dataset = curate(config, "he")
    (curated / "out" / "dataset.json").write_bytes(before)
    return curated / "out" / dataset_path(dataset.fingerprint)


def export(dataset: Path, out: Path, *options: str) -> int:
    return main(["export", str(dataset), "--to", "spatialdata", "--out", str(out), *options])


@pytest.fixture(scope="module")
def exported(curated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "stores"
    assert export(curated / "out", out) == 0
    return out


def read_store(path: Path) -> Any:
    """The store, each element of which passes spatialdata's own validation."""
    from spatialdata import read_zarr
    from spatialdata.models import get_model

    store = read_zarr(path)
    for _, _, element in store.gen_elements():
        get_model(element, validate=True)
    store.validate_table_in_spatialdata(store["table"])
    return store


def rows_of(dataset: Path, run: str) -> pd.DataFrame:
    """The rows of a run's index tables by cell, whatever the split."""
    tables = [
        read_stream([dataset], split).table(
            ["run", "cell_id", "donor", "x_um", "y_um", "x_px", "y_px", "n_counts", "nucleus"]
        )
        for split in ("train", "val", "test")
    ]
    rows = pd.concat([table.to_pandas() for table in tables])
    return rows[rows["run"] == run].set_index("cell_id")


def vertices(shapes: Any) -> np.ndarray:
    return shapely.get_coordinates(shapes.geometry.to_numpy())


def artifact(folder: Path, run: str, stage: str) -> Path:
    (found,) = folder.glob(f"out/runs/{run}/{stage}/*")
    return found


def test_stores_hold_the_samples_of_their_runs(curated: Path, exported: Path) -> None:
    assert sorted(os.listdir(exported)) == ["dapi.zarr", "export.json", "he.zarr"]
    dataset, _ = read_dataset(curated / "out")
    for run in ("he", "dapi"):
        store, rows = read_store(exported / f"{run}.zarr"), rows_of(curated / "out", run)
        table = store["table"]
        assert set(table.obs["cell_id"]) == set(rows.index) == set(store["cells"].index)
        of_table = rows.loc[table.obs["cell_id"]]
        np.testing.assert_array_equal(table.X.sum(axis=1).A1, of_table["n_counts"])
        np.testing.assert_array_equal(table.obsm["spatial"], of_table[["x_um", "y_um"]])
        assert table.obs["donor"].tolist() == of_table["donor"].tolist()
        assert store.attrs["cellpair"]["fingerprint"] == dataset.fingerprint


def test_cells_are_the_instruments_outlines(curated: Path, exported: Path) -> None:
    cells = read_store(exported / "he.zarr")["cells"]
    with open_xenium(curated / "he" / "outs") as run:
        outlines = dict(zip(run.read_cells()["cell_id"], run.read_cell_polygons(), strict=True))
    assert not cells["is_circle"].any()
    for cell_id, outline in zip(cells.index, cells.geometry, strict=True):
        assert outline.equals(outlines[cell_id])


def test_frames_agree_with_the_registration(curated: Path, exported: Path) -> None:
    from spatialdata import transform

    store = read_store(exported / "he.zarr")
    assert sorted(store.coordinate_systems) == ["he_px", "xenium_um"]
    _, warp = read_registration(artifact(curated, "he", "registration"))
    assert warp.shift is not None
    cells_um = vertices(store["cells"])
    # In its own frame every element is as it is stored; in the other, where the affine puts it.
    np.testing.assert_array_equal(vertices(store["cells_he"]), warp(cells_um))
    by_affine = vertices(transform(store["cells"], to_coordinate_system="he_px"))
    np.testing.assert_allclose(by_affine, warp.affine(cells_um), rtol=0, atol=1e-6)
    back = vertices(transform(store["he_nuclei"], to_coordinate_system="xenium_um"))
    there = warp.affine.inverse(vertices(store["he_nuclei"]))
    np.testing.assert_allclose(back, there, rtol=0, atol=1e-6)
    # The residual that is told is that of the patches' centres.
    rows = rows_of(curated / "out", "he")
    centres_um = rows[["x_um", "y_um"]].to_numpy()
    np.testing.assert_allclose(warp(centres_um), rows[["x_px", "y_px"]], rtol=0, atol=1e-6)
    off_um = np.hypot(*(warp.affine(centres_um) - rows[["x_px", "y_px"]].to_numpy()).T) * HE_MPP
    told = store.attrs["cellpair"]["affine_residual_um"]
    assert told == pytest.approx(
        {"median": np.median(off_um), "p95": np.quantile(off_um, 0.95), "max": off_um.max()}
    )
    assert told["max"] > 0.1
    (note,) = (n for n in json.loads((exported / "export.json").read_text())["notes"] if "he:" in n)
    assert f"{told['max']:.2f} at most" in note


def test_he_nuclei_are_those_of_the_slide_and_know_their_cells(
    curated: Path, exported: Path
) -> None:
    found = pq.read_table(artifact(curated, "he", "nuclei") / NUCLEI_FILE).to_pandas()
    nuclei, rows = read_store(exported / "he.zarr")["he_nuclei"], rows_of(curated / "out", "he")
    assert nuclei.index.tolist() == found["nucleus_id"].tolist()
    assert nuclei.geometry.to_wkb().tolist() == found["polygon_px"].tolist()
    of_cell = {cell: row["id"] for cell, row in rows["nucleus"].items() if row is not None}
    told = nuclei["cell_id"].dropna()
    assert dict(zip(told, told.index, strict=True)) == of_cell
    assert len(nuclei) > len(told) > 100


def test_of_several_donors_only_matched_nuclei_are_shown(two_donors: Path, tmp_path: Path) -> None:
    assert export(two_donors, tmp_path / "out", "--split", "test") == 0
    store, rows = read_store(tmp_path / "out" / "he.zarr"), rows_of(two_donors, "he")
    rows = rows[rows["donor"] == "D2"]
    assert set(store["cells"].index) == set(rows.index)
    nuclei = store["he_nuclei"]
    assert sorted(nuclei["cell_id"]) == sorted(rows.index[rows["nucleus"].notna()])


def test_dapi_runs_lie_on_their_morphology(curated: Path, exported: Path) -> None:
    from spatialdata import transform

    store, rows = read_store(exported / "dapi.zarr"), rows_of(curated / "out", "dapi")
    assert sorted(store.coordinate_systems) == ["morphology_px", "xenium_um"]
    assert set(store.shapes) == {"cells"}
    with open_xenium(curated / "dapi") as run:
        pixel_size_um = run.pixel_size_um
    cells_px = transform(store["cells"], to_coordinate_system="morphology_px")
    np.testing.assert_allclose(
        vertices(cells_px), vertices(store["cells"]) / pixel_size_um, rtol=1e-9
    )
    assert rows["nucleus"].isna().all()


def test_the_table_goes_with_the_shapes(exported: Path) -> None:
    from spatialdata import match_element_to_table

    store = read_store(exported / "he.zarr")
    shapes, table = match_element_to_table(store, "cells", "table")
    assert shapes["cells"].index.tolist() == table.obs["cell_id"].tolist()


def test_bundles_are_found_by_their_content(
    curated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, other, moved = curated / "out", curated / "he" / "outs", tmp_path / "moved"
    shutil.move(curated / "dapi", moved)
    try:
        assert export(dataset, tmp_path / "a", "--run", "dapi") == 2
        err = capsys.readouterr().err
        assert "found:    none of its content where it was curated from" in err
        assert "--outlines circles" in err
        assert not (tmp_path / "a").exists()
        assert export(dataset, tmp_path / "a", "--run", "dapi", "--xenium", str(other)) == 2
        assert export(dataset, tmp_path / "a", "--run", "dapi", "--xenium", str(moved)) == 0
        assert export(dataset, tmp_path / "b", "--run", "dapi", "--outlines", "circles") == 0
    finally:
        shutil.move(moved, curated / "dapi")
    outlines, circles = (read_store(tmp_path / name / "dapi.zarr")["cells"] for name in ("a", "b"))
    assert circles["is_circle"].all()
    assert not outlines["is_circle"].any()
    with open_xenium(curated / "dapi") as run:
        area_um2 = run.read_cells().set_index("cell_id")["cell_area_um2"]
    np.testing.assert_allclose(circles.area, area_um2.loc[circles.index], rtol=0.01)


def test_a_lost_artifact_is_told(
    curated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = artifact(curated, "he", "registration")
    shutil.move(folder, tmp_path / "aside")
    try:
        assert export(curated / "out", tmp_path / "out", "--run", "he") == 2
    finally:
        shutil.move(tmp_path / "aside", folder)
    assert str(folder) in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_real_bundle(shared_data: Path, tmp_path: Path) -> None:
    bundle = shared_data / "xenium" / "mouse_ileum_tiny"
    (tmp_path / "curate.toml").write_text(REAL.format(bundle=bundle), encoding="utf-8")
    curate(tmp_path / "curate.toml")
    for to in ("spatialdata", "h5ad", "openclip"):
        out = tmp_path / to
        assert main(["export", str(tmp_path / "out"), "--to", to, "--out", str(out)]) == 0
    store = read_store(tmp_path / "spatialdata" / "ileum.zarr")
    n_cells, n_genes = store["table"].shape
    assert (len(store["cells"]), n_genes) == (n_cells, 5006)
    assert n_cells == 12
    assert set(store.shapes) == {"cells"}
