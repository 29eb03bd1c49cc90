"""Xenium runs: exact truths of real data, of simulated runs, and of small bundles made by hand."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pairing.simulate import SimulationParams, simulate
from pairing.xenium import CATEGORY_NAMES, XeniumRun, open_xenium
from pairing.xenium.rasters import label_moments, label_owners
from pairing.xenium.tables import cell_id_text
from shards.errors import BadInput
from tests.pairing.handmade import Bundle, counted, zipped


@pytest.fixture(scope="session")
def ileum(shared_data: Path) -> Path:
    return shared_data / "xenium" / "mouse_ileum_tiny"


@pytest.fixture(scope="session")
def store(shared_data: Path) -> Path:
    return shared_data / "xenium" / "mouse_ileum_tiny_nucleus_expansion.zarr"


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("xenium") / "Probe α 1"
    simulate(out, SimulationParams(n_cells=60, seed=1))
    return out / "outs"


# ---------------------------------------------------------------- the real bundle


def assert_is_the_ileum(run: XeniumRun) -> None:
    assert (run.n_cells, run.pixel_size_um, run.species) == (36, 0.2125, "mouse")
    genes = run.genes()
    assert len(genes) == 5006
    assert (genes[0].symbol, genes[0].ensembl) == ("A1cf", "ENSMUSG00000052595")
    counts = counted(run)
    assert ((counts > 0).sum(), counts.sum()) == (29, 464)
    matrix = run.read_matrix()
    assert matrix is not None
    assert matrix.dtype == np.int64
    np.testing.assert_array_equal(matrix.toarray(), counts)


def test_real_bundle(ileum: Path) -> None:
    with open_xenium(ileum) as run:
        assert_is_the_ileum(run)
        controls = run.read_control_counts()
        assert controls is not None
        # 467 over every kind of feature, 464 of them genes.
        assert controls.sum().to_dict() == {
            "Deprecated Codeword": 0,
            "Genomic Control": 0,
            "Negative Control Codeword": 0,
            "Negative Control Probe": 0,
            "Unassigned Codeword": 3,
        }
        (batch,) = run.iter_transcripts()
        assert ((batch.qv >= 20) & (batch.cell_index >= 0)).sum() == 467
        assert run.layout == "Xenium bundle without label masks"
        assert run.read_labels("cell") is None
        assert run.notes == ()


def test_real_bundle_tells_its_categories(ileum: Path) -> None:
    with open_xenium(ileum) as run:
        (batch,) = run.iter_transcripts()
    tally = np.bincount(batch.category, minlength=len(CATEGORY_NAMES))
    assert dict(zip(batch.category_names, tally.tolist(), strict=True)) == {
        "gene": 1504,
        "negative_control_probe": 7,
        "negative_control_codeword": 41,
        "unassigned_codeword": 428,
        "deprecated_codeword": 1,
        "genomic_control": 4,
        "other": 0,
    }
    assert len(batch.qv) == 1985
    assert (batch.cell_index == -1).sum() == 817
    np.testing.assert_array_equal(batch.gene_index >= 0, batch.category == 0)


def test_real_bundle_nuclei(ileum: Path) -> None:
    with open_xenium(ileum) as run:
        cells, nuclei = run.read_cells(), run.read_nuclei()
        outlines = run.read_cell_polygons()
    assert list(nuclei["label_id"]) == list(range(1, 24))
    owned = nuclei.groupby("cell_index").size().reindex(range(36), fill_value=0)
    np.testing.assert_array_equal(owned, cells["n_nuclei"])
    assert cells["nucleus_area_um2"].isna().sum() == (cells["n_nuclei"] == 0).sum() > 0
    assert shapely.is_valid(nuclei["polygon"].to_numpy()).all()
    centre = shapely.centroid(nuclei["polygon"].to_numpy())
    np.testing.assert_allclose(shapely.get_x(centre), nuclei["x_um"])
    # The instrument's areas are of its masks, of which the polygons are simplifications.
    single = nuclei[nuclei["cell_index"].map(owned) == 1]
    mask_um2 = cells["nucleus_area_um2"].to_numpy()[single["cell_index"]]
    np.testing.assert_allclose(single["area_um2"], mask_um2, rtol=0.2)
    assert len(outlines) == 36
    for outline, (x, y) in zip(outlines, cells[["x_um", "y_um"]].to_numpy(), strict=True):
        assert outline is not None
        assert outline.distance(shapely.Point(x, y)) < 1


@pytest.mark.parametrize("as_csv", [False, True])
def test_real_bundle_in_an_older_layout(as_csv: bool, ileum: Path, tmp_path: Path) -> None:
    """Without what came after XOA 1.x, and with text as it was: the same run."""
    older = tmp_path / "older"
    (older / "morphology_focus").mkdir(parents=True)
    for name in ("experiment.xenium", "cell_feature_matrix.h5"):
        shutil.copyfile(ileum / name, older / name)
    later = ["is_gene", "codeword_category", "codeword_index", "label_id", "nucleus_count"]
    for stem in ("transcripts", "cells", "nucleus_boundaries", "cell_boundaries"):
        table = pq.read_table(ileum / f"{stem}.parquet")
        table = table.drop([c for c in later if c in table.column_names])
        if as_csv:
            with gzip.open(older / f"{stem}.csv.gz", "wb") as file:
                pa_csv.write_csv(table, file)
            continue
        types = [pa.binary() if pa.types.is_string(f.type) else f.type for f in table.schema]
        cast = table.cast(pa.schema(list(zip(table.column_names, types, strict=True))))
        pq.write_table(cast, older / f"{stem}.parquet", row_group_size=500)
    with open_xenium(ileum) as run, open_xenium(older) as old:
        assert_is_the_ileum(old)
        pd.testing.assert_frame_equal(old.read_cells(), run.read_cells())
        nuclei, outlines = run.read_nuclei(), run.read_cell_polygons()
        assert old.read_cell_polygons() == outlines
        old_nuclei = old.read_nuclei()
    order = nuclei.sort_values("cell_index", kind="stable").index
    old_order = old_nuclei.sort_values("cell_index", kind="stable").index
    for column in ("cell_index", "x_um", "y_um", "area_um2"):
        assert nuclei.loc[order, column].tolist() == old_nuclei.loc[old_order, column].tolist()


def test_real_morphology(ileum: Path, store: Path) -> None:
    with open_xenium(ileum) as run, run.open_morphology() as slide:
        assert slide.size_px == (5789, 3522)
        assert [level.downsample for level in slide.levels] == [1, 2, 4, 8, 16]
        assert (slide.mpp, slide.n_channels, slide.dtype) == (0.2125, 1, np.uint16)
        assert not slide.read((-5, -5, 0, 0)).any()
        pixels = slide.read((1800, 1400, 1900, 1500))
    assert pixels.mean() > 100
    with open_xenium(store) as run, run.open_morphology() as slide:
        assert [level.size_px for level in slide.levels][-1] == (361, 220)
        np.testing.assert_array_equal(slide.read((1800, 1400, 1900, 1500)), pixels)


def test_provenance_points_to_nobody(ileum: Path) -> None:
    with open_xenium(ileum) as run:
        assert run.provenance == {
            "software": "xenium-3.0.0.15",
            "panel": "Xenium Mouse 5K Pan Tissue & Pathways Panel",
        }


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.integers(1, 2100))
def test_batches_change_nothing(ileum: Path, rows: int) -> None:
    fields = ("cell_index", "gene_index", "category", "x_um", "y_um", "qv", "overlaps_nucleus")
    with open_xenium(ileum) as run:
        (whole,) = run.iter_transcripts()
        parts = list(run.iter_transcripts(rows))
    assert max(len(part.qv) for part in parts) <= rows
    for name in fields:
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole, name))


# ---------------------------------------------------------------- zips


@pytest.mark.parametrize("top", ["", "outs/"])
def test_zip_of_a_bundle(
    ileum: Path, top: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = tmp_path / "aside"
    aside.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(aside))
    mac = {f"__MACOSX/{top}._experiment.xenium": "x", f"{top}._experiment.xenium": "x"}
    path = zipped(tmp_path / "Lauf 1.zip", ileum, top, mac)
    with open_xenium(path) as run:
        assert run.layout == "zipped Xenium bundle without label masks"
        assert_is_the_ileum(run)
        with run.open_morphology() as slide:
            assert slide.size_px == (5789, 3522)
        taken = {p.name for p in aside.rglob("*") if p.is_file()}
    assert taken == {
        "experiment.xenium",
        "cells.parquet",
        "transcripts.parquet",
        "cell_feature_matrix.h5",
        "morphology_focus_0000.ome.tif",
    }
    assert not list(aside.iterdir())
    assert {p.name for p in tmp_path.iterdir()} == {"aside", "Lauf 1.zip"}


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\evil", "C:/evil"])
def test_zip_that_would_write_elsewhere(name: str, ileum: Path, tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", ileum / "morphology_focus", more={name: "x"})
    with pytest.raises(BadInput, match="relative names"), open_xenium(path):
        pass


def test_zip_of_two_bundles_and_of_none(tmp_path: Path) -> None:
    for members, words in [
        ({"a/experiment.xenium": "{}", "b/experiment.xenium": "{}"}, "2 of them"),
        ({"readme.txt": "x"}, "0 of them"),
    ]:
        path = zipped(tmp_path / "a.zip", tmp_path / "none", more=members)
        with pytest.raises(BadInput, match=words), open_xenium(path):
            pass


# ---------------------------------------------------------------- a simulated bundle, with masks


def test_simulated_bundle(simulated: Path) -> None:
    with open_xenium(simulated) as run:
        assert (run.n_cells, run.species) == (60, "human")
        assert run.layout == "Xenium bundle with label masks"
        counts, matrix = counted(run), run.read_matrix()
        assert matrix is not None
        np.testing.assert_array_equal(matrix.toarray(), counts)
        controls = run.read_control_counts()
        assert controls is not None
        cells = pq.read_table(simulated / "cells.parquet").to_pandas()
        np.testing.assert_array_equal(
            controls["Negative Control Probe"], cells["control_probe_counts"]
        )


def test_simulated_nuclei_are_those_of_the_masks(simulated: Path) -> None:
    with open_xenium(simulated) as run:
        nuclei, cells = run.read_nuclei(), run.read_cells()
        mask = np.asarray(run.read_labels("nucleus")[:])
        cell_mask = np.asarray(run.read_labels("cell")[:])
        row_of_label = run.label_cell_index("cell")
    n = int(mask.max())
    assert list(nuclei["label_id"]) == list(range(1, n + 1))
    yx = np.array(ndimage.center_of_mass(mask > 0, mask, range(1, n + 1)))
    np.testing.assert_allclose(nuclei[["y_um", "x_um"]], (yx + 0.5) * 0.2125)
    np.testing.assert_allclose(nuclei["area_um2"], np.bincount(mask.ravel())[1:] * 0.2125**2)
    # Every nucleus lies in its own cell.
    majority = label_owners(mask, cell_mask)[1:]
    np.testing.assert_array_equal(row_of_label[majority], nuclei["cell_index"])
    owned = nuclei.groupby("cell_index").size().reindex(range(60), fill_value=0)
    np.testing.assert_array_equal(owned, cells["n_nuclei"])
    for nucleus in nuclei.itertuples():
        assert nucleus.polygon.distance(shapely.Point(nucleus.x_um, nucleus.y_um)) < 0.5


def test_masks_of_another_run_are_refused(simulated: Path, tmp_path: Path) -> None:
    shutil.copytree(simulated, tmp_path / "outs")
    cells = pq.read_table(simulated / "cells.parquet")
    pq.write_table(cells.take(pa.array([1, 0, *range(2, 60)])), tmp_path / "outs" / "cells.parquet")
    with open_xenium(tmp_path / "outs") as run, pytest.raises(BadInput, match="same order"):
        run.read_labels("cell")


def test_cells_in_another_order_keep_their_counts(simulated: Path, tmp_path: Path) -> None:
    shutil.copytree(simulated, tmp_path / "outs")
    order = np.random.default_rng(0).permutation(60)
    cells = pq.read_table(simulated / "cells.parquet")
    pq.write_table(cells.take(pa.array(order)), tmp_path / "outs" / "cells.parquet")
    with open_xenium(simulated) as run:
        matrix, controls = run.read_matrix(), run.read_control_counts()
    with open_xenium(tmp_path / "outs") as run:
        np.testing.assert_array_equal(run.read_matrix().toarray(), matrix.toarray()[order])
        np.testing.assert_array_equal(run.read_control_counts(), controls.to_numpy()[order])


# ---------------------------------------------------------------- shapes and identifiers


def test_cell_id_code() -> None:
    pairs = np.array([[1, 1], [1437536272, 1], [0xFFFFFFFF, 2], [0, 1]], np.uint32)
    assert list(cell_id_text(pairs)) == ["aaaaaaab-1", "ffkpbaba-1", "pppppppp-2", "aaaaaaaa-1"]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pairing.xenium.rasters._BLOCK_PX", 7)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 10**6), height=st.integers(1, 40), width=st.integers(1, 40))
def test_rasters_in_blocks(small_blocks: None, seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    inner = rng.integers(0, 9, (height, width)).astype(np.uint32)
    outer = rng.integers(0, 4, (height, width)).astype(np.uint32)
    moments = label_moments(inner)
    owners = label_owners(inner, outer)
    np.testing.assert_array_equal(moments.n_px[1:], np.bincount(inner.ravel())[1:])
    for label in range(1, int(inner.max()) + 1):
        y, x = np.nonzero(inner == label)
        if len(x) == 0:
            assert np.isnan(moments.centroid_px[label]).all()
            continue
        np.testing.assert_allclose(moments.centroid_px[label], [x.mean() + 0.5, y.mean() + 0.5])
        shares = np.bincount(outer[inner == label], minlength=4)[1:]
        expected = int(shares.argmax()) + 1 if shares.any() else 0
        assert owners[label] == expected


def test_files_of_macos_are_no_images(ileum: Path, tmp_path: Path) -> None:
    path = Bundle(tmp_path / "outs").write()
    (path / "morphology_focus" / "._morphology_focus_0000.ome.tif").write_text("x")
    source = ileum / "morphology_focus" / "morphology_focus_0000.ome.tif"
    # The only one of four files: what the others would hold isn't asked for.
    shutil.copyfile(source, path / "morphology_focus" / "ch0000_dapi.ome.tif")
    with open_xenium(path) as run, run.open_morphology() as slide:
        assert slide.size_px == (5789, 3522)
