"""Runs in SpatialData stores: a real one, both formats of today, and versions that are not read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import shapely
import zarr
from anndata.io import read_elem, write_elem

from pairing.simulate import SimulationParams, simulate
from pairing.xenium import open_xenium
from shards.errors import BadInput
from tests.pairing.handmade import count_by_cell, counted, looked_up


@pytest.fixture(scope="session")
def ileum(shared_data: Path) -> Path:
    return shared_data / "xenium" / "mouse_ileum_tiny"


@pytest.fixture(scope="session")
def store(shared_data: Path) -> Path:
    return shared_data / "xenium" / "mouse_ileum_tiny_nucleus_expansion.zarr"


def test_real_store(store: Path) -> None:
    with open_xenium(store) as run:
        assert run.layout == "SpatialData store"
        assert (run.n_cells, run.pixel_size_um) == (23, pytest.approx(0.2125, rel=1e-12))
        counts = counted(run)
        assert counts.sum() == 433
        table = zarr.open_group(store / "tables" / "table", mode="r", use_consolidated=False)
        np.testing.assert_array_equal(
            counts.sum(axis=1), np.asarray(table["obs/transcript_counts"])
        )
        assert looked_up(run) == (1983, 2, 0)
        cells, nuclei = run.read_cells(), run.read_nuclei()
        labels = run.read_labels("nucleus")
        assert labels is not None
        assert labels.shape == (3522, 5789)
    assert list(nuclei["cell_index"]) == list(range(23))
    # These are the masks' own areas, so they are the instrument's to its rounding.
    np.testing.assert_allclose(nuclei["area_um2"], cells["nucleus_area_um2"], rtol=1e-6)
    for nucleus in nuclei.itertuples():
        assert nucleus.polygon.distance(shapely.Point(nucleus.x_um, nucleus.y_um)) < 0.5


def test_store_with_and_without_names_of_genes(store: Path, ileum: Path, tmp_path: Path) -> None:
    with open_xenium(store) as run:
        without = counted(run)
        names = [gene.symbol for gene in run.genes()]
        named_in_store = run.notes == ()
    whole = tmp_path / "whole.zarr"
    shutil.copytree(store, whole, copy_function=shutil.copyfile)
    for folder in [whole, *(p for p in whole.rglob("*") if p.is_dir())]:
        folder.chmod(0o755)
    if not named_in_store:
        # The copy among the shared data lacks tables/table/var; its panel is the bundle's.
        assert names == sorted(names)
        with h5py.File(ileum / "cell_feature_matrix.h5") as file:
            features = {k: file[f"matrix/features/{k}"].asstr()[:] for k in ("name", "id")}
            kind = file["matrix/features/feature_type"].asstr()[:]
        rows = kind == "Gene Expression"
        var = pd.DataFrame(
            {"gene_ids": features["id"][rows], "feature_types": kind[rows]},
            index=pd.Index(features["name"][rows].astype(object)),
        )
        table = zarr.open_group(whole / "tables" / "table", mode="a", use_consolidated=False)
        write_elem(table, "var", var)
    with open_xenium(whole) as run:
        assert run.notes == ()
        assert run.species == "mouse"
        assert len(run.genes()) == 5006
        counts, matrix = counted(run), run.read_matrix()
        assert matrix is not None
        assert matrix.sum() == 433
        np.testing.assert_array_equal(matrix.toarray(), counts)
        index = [gene.symbol for gene in run.genes()]
    np.testing.assert_array_equal(counts[:, [index.index(n) for n in names]], without)


def test_store_of_a_run_that_counts_no_nuclei(store: Path, tmp_path: Path) -> None:
    """As of a bundle before XOA 2.0."""
    older = tmp_path / "older.zarr"
    shutil.copytree(store, older, copy_function=shutil.copyfile)
    for folder in [older, *(p for p in older.rglob("*") if p.is_dir())]:
        folder.chmod(0o755)
    table = zarr.open_group(older / "tables" / "table", mode="a", use_consolidated=False)
    write_elem(table, "obs", read_elem(table["obs"]).drop(columns="nucleus_count"))
    with open_xenium(store) as run, open_xenium(older) as old:
        pd.testing.assert_frame_equal(old.read_cells(), run.read_cells())


def test_store_of_another_placement_is_refused(store: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.zarr"
    shutil.copytree(store, moved, copy_function=shutil.copyfile)
    attrs = moved / "points" / "transcripts" / ".zattrs"
    described = json.loads(attrs.read_text())
    described["coordinateTransformations"][0] |= {"type": "affine", "scale": None}
    attrs.unlink()
    attrs.write_text(json.dumps(described))
    with open_xenium(moved) as run, pytest.raises(BadInput, match="placed by one scale"):
        _ = run.pixel_size_um


def small_store(folder: Path, **versions: Any) -> Path:
    """Groups and their versions alone, which is looked at first."""
    root = zarr.open_group(folder, mode="w", zarr_format=versions.pop("zarr_format", 2))
    if versions["store"] is not None:
        root.attrs["spatialdata_attrs"] = {"version": versions["store"]}
    root.create_group("points/transcripts").attrs["spatialdata_attrs"] = {
        "version": versions["points"]
    }
    root.create_group("shapes/nucleus_boundaries").attrs["spatialdata_attrs"] = versions["shapes"]
    root.create_group("tables/table").attrs["version"] = versions["tables"]
    return folder


OF_2024 = {"store": None, "points": "0.1", "shapes": {"version": "0.2"}, "tables": "0.1"}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    ("change", "where", "words"),
    [
        ({"store": "0.3"}, "s.zarr", r"0\.1 or 0\.2.*version 0\.3"),
        ({"points": "0.7"}, "points/transcripts", r"0\.1 or 0\.2.*version 0\.7"),
        (
            {"shapes": {"version": "0.1"}},
            "shapes/nucleus_boundaries",
            r"0\.2 or 0\.3.*version 0\.1",
        ),
        ({"shapes": {}}, "shapes/nucleus_boundaries", "none that is said"),
        ({"tables": "2"}, "tables/table", r"0\.1 or 0\.2.*version 2"),
    ],
)
def test_stores_of_other_versions(
    zarr_format: int, change: dict[str, Any], where: str, words: str, tmp_path: Path
) -> None:
    path = small_store(tmp_path / "s.zarr", zarr_format=zarr_format, **(OF_2024 | change))
    words = rf"(?s){where}\n.*SpatialData's format in version .*{words}.*write it again"
    with pytest.raises(BadInput, match=words), open_xenium(path):
        pass


def test_a_store_without_its_arrays(tmp_path: Path) -> None:
    path = small_store(tmp_path / "s.zarr", **OF_2024)
    with open_xenium(path) as run, pytest.raises(BadInput, match="tables/table/obs"):
        run.read_cells()
    with open_xenium(path) as run, pytest.raises(BadInput, match="morphology_focus"):
        _ = run.pixel_size_um


@pytest.mark.filterwarnings("ignore")  # of packages that are not ours
@pytest.mark.parametrize("container", ["0.1", "0.2"])
def test_what_spatialdata_writes_today(
    container: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """The run in a store is the run in its bundle, in both versions of the container."""
    from spatialdata._io.format import ContainerV01DefaultTypes, SpatialDataContainerFormats
    from spatialdata_io import xenium

    simulate(tmp_path / "run", SimulationParams(n_cells=40, seed=2))
    formats: list[Any] = [SpatialDataContainerFormats[container]]
    if container == "0.1":
        formats += ContainerV01DefaultTypes.values()
    bundle, path = tmp_path / "run" / "outs", tmp_path / "s.zarr"
    xenium(bundle, cells_as_circles=False).write(path, sdata_formats=formats)
    with open_xenium(path) as run, open_xenium(bundle) as own:
        counts = count_by_cell(run, 20)
        assert counts.qc == count_by_cell(own, 20).qc
        assert counts.qc.matrix_mismatches == 0
        assert [g.ensembl for g in run.genes()] == [g.ensembl for g in own.genes()]
        pd.testing.assert_frame_equal(run.read_cells(), own.read_cells())
        nuclei, own_nuclei = run.read_nuclei(), own.read_nuclei()
        assert shapely.area(nuclei.pop("polygon").to_numpy()) == pytest.approx(
            shapely.area(own_nuclei.pop("polygon").to_numpy())
        )
        pd.testing.assert_frame_equal(nuclei, own_nuclei)
        assert looked_up(run) == looked_up(own)
