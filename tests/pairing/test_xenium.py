"""Xenium runs: exact truths of real data, of simulated runs, and of small bundles made by hand."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import zarr
from anndata.io import write_elem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage, sparse

from pairing.simulate import SimulationParams, simulate
from pairing.xenium import CATEGORY_NAMES, XeniumRun, open_xenium
from pairing.xenium.rasters import label_moments, label_owners
from pairing.xenium.tables import cell_id_text
from shards.errors import BadInput


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


def counted(run: XeniumRun, rows: int = 1_000_000) -> Any:
    """(cells, genes) counts at qv >= 20 by the transcripts' own cell."""
    counts = np.zeros((run.n_cells, len(run.genes())), np.int64)
    for batch in run.iter_transcripts(rows):
        kept = (batch.qv >= 20) & (batch.cell_index >= 0) & (batch.gene_index >= 0)
        np.add.at(counts, (batch.cell_index[kept], batch.gene_index[kept]), 1)
    return counts


def looked_up(run: XeniumRun) -> tuple[int, int]:
    """Transcripts whose cell is the one that the label raster shows there, and all of them."""
    labels = run.read_labels("cell")
    assert labels is not None
    raster, row = np.asarray(labels[:]), run.label_cell_index("cell")
    agree = total = 0
    for batch in run.iter_transcripts():
        x, y = (np.floor(v / run.pixel_size_um).astype(int) for v in (batch.x_um, batch.y_um))
        agree += int((row[raster[y, x]] == batch.cell_index).sum())
        total += len(x)
    return agree, total


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


def zipped(path: Path, bundle: Path, top: str = "", more: dict[str, str] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for file in sorted(bundle.rglob("*")):
            if file.is_file():
                out.write(file, top + file.relative_to(bundle).as_posix())
        for name, text in (more or {}).items():
            out.writestr(name, text)
    return path


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


# ---------------------------------------------------------------- the SpatialData store


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
        assert looked_up(run) == (1983, 1985)
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


# ---------------------------------------------------------------- a simulated bundle, with masks


def test_simulated_bundle(simulated: Path) -> None:
    with open_xenium(simulated) as run:
        assert (run.n_cells, run.species) == (60, "human")
        assert run.layout == "Xenium bundle with label masks"
        counts, matrix = counted(run), run.read_matrix()
        assert matrix is not None
        np.testing.assert_array_equal(matrix.toarray(), counts)
        agree, total = looked_up(run)
        # Positions are rounded to 1/64 µm after the assignment, which moves a few over an edge.
        assert total > agree > 0.995 * total
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


# ---------------------------------------------------------------- small bundles by hand

# Genes that a loose pattern takes for controls, and controls of every kind.
LURES = ["NEGR1", "NANOG", "NANS", "BLANKET1", "ANTISENSE2", "UnassignedGene", "INTERGENIC1"]
CONTROLS = {
    "NegControlProbe_00042": ("negative_control_probe", "Negative Control Probe"),
    "NegControlCodeword_0500": ("negative_control_codeword", "Negative Control Codeword"),
    "UnassignedCodeword_0001": ("unassigned_codeword", "Unassigned Codeword"),
    "DeprecatedCodeword_0002": ("deprecated_codeword", "Deprecated Codeword"),
    "Intergenic_Region_4": ("genomic_control", "Genomic Control"),
    "BLANK_0001": ("other", "Blank Codeword"),
}
CELL_IDS = ["aaaaaaab-1", "aaaaaaac-1", "aaaaaaad-1"]
SQUARE = np.array([[0, 0], [4, 0], [4, 4], [0, 4], [0, 0]], np.float32)


class Bundle:
    """A bundle of three cells, whose tables a test changes before it is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = [*LURES, *CONTROLS]
        n = len(names)
        self.experiment: dict[str, Any] = {
            "pixel_size": 0.2125, "panel_organism": "Human", "analysis_sw_version": "R&D",
        }  # fmt: skip
        self.cells = pd.DataFrame(
            {
                "cell_id": CELL_IDS, "x_centroid": [2.0, 12, 22], "y_centroid": [2.0, 2, 2],
                "cell_area": [16.0, 16, 16], "nucleus_area": [32.0, 0.0, np.nan],
                "nucleus_count": [2, 0, 0],
            }
        )  # fmt: skip
        self.transcripts = pd.DataFrame(
            {
                "cell_id": [CELL_IDS[0], CELL_IDS[2], "UNASSIGNED", *[CELL_IDS[1]] * (n - 3)],
                "overlaps_nucleus": np.arange(n, dtype=np.uint8) % 2,
                "feature_name": names,
                "x_location": np.arange(n, dtype=np.float32),
                "y_location": np.arange(n, dtype=np.float32) / 2,
                "qv": np.linspace(15, 40, n).astype(np.float32),
                "codeword_category": ["predesigned_gene"] * len(LURES)
                + ["genomic_control_probe" if c == "genomic_control" else c
                   for c, _ in CONTROLS.values()],
                "is_gene": [True] * len(LURES) + [False] * len(CONTROLS),
            }
        )  # fmt: skip
        self.counted = self.transcripts.copy()  # what the matrix is made of
        rings = [(1, CELL_IDS[0], SQUARE), (2, CELL_IDS[0], SQUARE + 6), (3, "UNASSIGNED", SQUARE)]
        self.nuclei = pd.concat(
            [
                pd.DataFrame(
                    {"cell_id": c, "vertex_x": r[:, 0], "vertex_y": r[:, 1], "label_id": i}
                )
                for i, c, r in rings
            ]
        )
        # name -> (identifier, feature type); None writes no matrix.
        self.features: dict[str, tuple[str, str]] | None = {
            name: (f"ENSG{i:011d}", "Gene Expression") for i, name in enumerate(LURES)
        } | {name: (name, kind) for name, (_, kind) in CONTROLS.items()}
        self.panel: dict[str, str] | None = None  # name -> descriptor

    def write(self) -> Path:
        self.folder.mkdir()
        (self.folder / "experiment.xenium").write_text(json.dumps(self.experiment))
        self.cells.to_parquet(self.folder / "cells.parquet")
        self.transcripts.to_parquet(self.folder / "transcripts.parquet")
        self.nuclei.to_parquet(self.folder / "nucleus_boundaries.parquet", index=False)
        if self.features is not None:
            self._write_matrix(self.features)
        if self.panel is not None:
            targets = [
                {"type": {"data": {"name": name}, "descriptor": kind}}
                for name, kind in self.panel.items()
            ]
            text = json.dumps({"payload": {"targets": targets}})
            (self.folder / "gene_panel.json").write_text(text)
        return self.folder

    def _write_matrix(self, features: dict[str, tuple[str, str]]) -> None:
        good = self.counted[self.counted["qv"] >= 20]
        good = good[good["cell_id"].isin(CELL_IDS)]
        row = good["cell_id"].map({c: i for i, c in enumerate(CELL_IDS)})
        column = good["feature_name"].map({f: i for i, f in enumerate(features)})
        shape = (len(CELL_IDS), len(features))
        matrix = sparse.csr_matrix((np.ones(len(good), np.int32), (row, column)), shape=shape)
        with h5py.File(self.folder / "cell_feature_matrix.h5", "w") as file:
            for key in ("data", "indices", "indptr"):
                file[f"matrix/{key}"] = getattr(matrix, key)
            file["matrix/shape"] = shape[::-1]
            file["matrix/barcodes"] = np.array(CELL_IDS, "S")
            file["matrix/features/name"] = np.array(list(features), "S")
            file["matrix/features/id"] = np.array([i for i, _ in features.values()], "S")
            file["matrix/features/feature_type"] = np.array([t for _, t in features.values()], "S")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle(tmp_path / "outs")


KNOWN_BY = ["is_gene", "codeword_category", "feature type", "descriptor", "prefix"]


@pytest.mark.parametrize("known_by", KNOWN_BY)
def test_genes_are_told_from_controls(known_by: str, bundle: Bundle) -> None:
    """By each of the five sources alone, the earlier ones missing."""
    position = KNOWN_BY.index(known_by)
    if position > 0:
        del bundle.transcripts["is_gene"]
    if position > 1:
        del bundle.transcripts["codeword_category"]
    if position > 2:
        bundle.features = None
    if position == 3:
        bundle.panel = dict.fromkeys(LURES, "gene") | dict.fromkeys(CONTROLS, "control")
    with open_xenium(bundle.write()) as run:
        (batch,) = run.iter_transcripts()
        genes = [gene.symbol for gene in run.genes()]
        assert bool(run.notes) == (position > 3)
    assert sorted(genes) == sorted(LURES)
    assert [genes[i] for i in batch.gene_index[: len(LURES)]] == LURES
    assert (batch.gene_index[len(LURES) :] == -1).all()
    told = [batch.category_names[c] for c in batch.category]
    assert told == ["gene"] * len(LURES) + [category for category, _ in CONTROLS.values()]


def test_is_gene_outweighs_the_category(bundle: Bundle) -> None:
    bundle.transcripts.loc[0, "is_gene"] = False
    with open_xenium(bundle.write()) as run:
        (batch,) = run.iter_transcripts()
    assert (batch.category_names[batch.category[0]], batch.gene_index[0]) == ("other", -1)


def test_protein_is_no_gene(bundle: Bundle) -> None:
    assert bundle.features is not None
    bundle.features["CD3E protein"] = ("CD3E", "Protein Expression")
    with open_xenium(bundle.write()) as run:
        assert [gene.symbol for gene in run.genes()] == LURES
        matrix = run.read_matrix()
        assert matrix is not None
        np.testing.assert_array_equal(matrix.toarray(), counted(run))


def test_values_come_through(bundle: Bundle) -> None:
    with open_xenium(bundle.write()) as run:
        (batch,) = run.iter_transcripts()
        assert run.provenance == {"software": "R&D"}
        assert run.species == "human"
        cells = run.read_cells()
        assert run.read_cell_polygons() == [None, None, None]
    assert batch.cell_index.tolist() == [0, 2, -1] + [1] * (len(batch.qv) - 3)
    np.testing.assert_array_equal(batch.x_um, bundle.transcripts["x_location"])
    np.testing.assert_array_equal(batch.y_um, bundle.transcripts["y_location"])
    np.testing.assert_array_equal(batch.qv, bundle.transcripts["qv"])
    np.testing.assert_array_equal(batch.overlaps_nucleus, bundle.transcripts["overlaps_nucleus"])
    kinds = [getattr(batch, name).dtype for name in ("cell_index", "gene_index", "x_um", "qv")]
    assert kinds == [np.int32, np.int32, np.float32, np.float32]
    assert cells["nucleus_area_um2"].isna().tolist() == [False, True, True]  # 0 is none, too


def test_nuclei_of_one_cell_stay_apart(bundle: Bundle) -> None:
    with open_xenium(bundle.write()) as run:
        nuclei = run.read_nuclei()
    assert nuclei["cell_index"].tolist() == [0, 0, -1]
    assert nuclei["area_um2"].tolist() == [16, 16, 16]
    assert nuclei[["x_um", "y_um"]].to_numpy().tolist() == [[2, 2], [8, 8], [2, 2]]


def test_rings_in_pieces_and_rings_that_enclose_nothing(bundle: Bundle) -> None:
    line = pd.DataFrame(
        {"cell_id": CELL_IDS[1], "vertex_x": [10.0, 14, 10], "vertex_y": [0.0, 4, 0], "label_id": 4}
    )
    bow = np.array([[20, 0], [24, 4], [24, 0], [20, 2], [20, 0]])
    crossed = pd.DataFrame(
        {"cell_id": CELL_IDS[2], "vertex_x": bow[:, 0], "vertex_y": bow[:, 1], "label_id": 5}
    )
    # The rows of label 1 are taken apart by all the others.
    first = bundle.nuclei["label_id"] == 1
    pieces = [bundle.nuclei[first][:2], bundle.nuclei[~first], line, crossed]
    bundle.nuclei = pd.concat([*pieces, bundle.nuclei[first][2:]])
    with open_xenium(bundle.write()) as run:
        nuclei = run.read_nuclei().set_index("label_id")
    assert nuclei.loc[1, "area_um2"] == 16
    assert nuclei.loc[4, "polygon"].is_empty
    assert (nuclei.loc[4, "area_um2"], nuclei.loc[4, "x_um"]) == (0, pytest.approx(34 / 3))
    assert nuclei.loc[5, "polygon"].is_valid
    assert 0 < nuclei.loc[5, "area_um2"] < 16


def changed(table: str, column: str, value: Any) -> Any:
    def change(bundle: Bundle) -> None:
        getattr(bundle, table)[column] = value

    return change


def dropped(table: str, column: str) -> Any:
    def change(bundle: Bundle) -> None:
        del getattr(bundle, table)[column]

    return change


N = len(LURES) + len(CONTROLS)
FAULTS: dict[str, tuple[Any, str]] = {
    "no quality": (dropped("transcripts", "qv"), "column qv"),
    "a cell of another run": (
        changed("transcripts", "cell_id", ["pppppppp-1"] * N),
        r"(?s)cells of the bundle's cells.*pppppppp-1",
    ),
    "a gene of another panel": (
        changed("transcripts", "feature_name", ["GAPDH"] * N),
        r"(?s)genes of the bundle's panel.*GAPDH",
    ),
    "an empty name": (
        changed("transcripts", "feature_name", [None, *[LURES[0]] * (N - 1)]),
        "empty rows",
    ),
    "cells by fractions": (changed("cells", "cell_id", [1.5, 2, 3]), "text, bytes or whole"),
    "a cell twice": (
        changed("cells", "cell_id", [CELL_IDS[0]] * 3), r"(?s)of its own.*'aaaaaaab-1' more than"
    ),
    "a nucleus of another run": (changed("nuclei", "cell_id", "pppppppp-1"), "pppppppp-1"),
    "no pixel size": (lambda b: b.experiment.pop("pixel_size"), "pixel_size"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_read_is_refused(fault: str, bundle: Bundle) -> None:
    change, words = FAULTS[fault]
    change(bundle)
    path = bundle.write()
    with pytest.raises(BadInput, match=words):
        read_all(path)


def read_all(path: Path) -> None:
    with open_xenium(path) as run:
        run.read_cells()
        list(run.iter_transcripts())
        run.read_nuclei()


def test_two_genes_of_one_symbol_are_refused(bundle: Bundle) -> None:
    bundle.features = None
    bundle.panel = dict.fromkeys(LURES, "gene")
    path = bundle.write()
    panel = json.loads((path / "gene_panel.json").read_text())
    panel["payload"]["targets"].append(panel["payload"]["targets"][0])
    (path / "gene_panel.json").write_text(json.dumps(panel))
    with open_xenium(path) as run, pytest.raises(BadInput, match="NEGR1"):
        run.genes()


def test_a_matrix_of_other_cells_is_refused(bundle: Bundle) -> None:
    path = bundle.write()
    with h5py.File(path / "cell_feature_matrix.h5", "r+") as file:
        file["matrix/barcodes"][:] = np.array(["aaaaaaab-1", "aaaaaaab-1", "aaaaaaad-1"], "S")
    with open_xenium(path) as run, pytest.raises(BadInput, match="not the same cells"):
        run.read_matrix()


def test_a_bundle_without_transcripts(bundle: Bundle) -> None:
    path = bundle.write()
    (path / "transcripts.parquet").unlink()
    with open_xenium(path) as run:
        assert not run.has_transcripts
        assert run.read_matrix() is not None
        with pytest.raises(BadInput, match=r"transcripts\.parquet"):
            list(run.iter_transcripts())
        with pytest.raises(BadInput, match="morphology_focus"):
            run.open_morphology()


def test_what_is_no_run_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    path = bundle.write()
    with pytest.raises(BadInput, match=f"own folder: {path}"), open_xenium(tmp_path):
        pass
    with pytest.raises(BadInput, match="nothing"), open_xenium(tmp_path / "none"):
        pass
    with pytest.raises(BadInput, match="no zip"), open_xenium(path / "experiment.xenium"):
        pass
    (path / "experiment.xenium").write_text("{")
    with pytest.raises(BadInput, match="JSON"), open_xenium(path):
        pass


def test_files_of_macos_are_no_images(bundle: Bundle, ileum: Path) -> None:
    path = bundle.write()
    (path / "morphology_focus").mkdir()
    (path / "morphology_focus" / "._morphology_focus_0000.ome.tif").write_text("x")
    source = ileum / "morphology_focus" / "morphology_focus_0000.ome.tif"
    # The only one of four files: what the others would hold isn't asked for.
    shutil.copyfile(source, path / "morphology_focus" / "ch0000_dapi.ome.tif")
    with open_xenium(path) as run, run.open_morphology() as slide:
        assert slide.size_px == (5789, 3522)


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
