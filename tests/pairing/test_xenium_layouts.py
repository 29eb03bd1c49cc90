"""Every layout of a bundle is read as the same run: by one difference at a time, and by release."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile

from pairing.simulate import SimulationParams, simulate
from pairing.simulate.params import BundleParams, Layout
from pairing.xenium import open_xenium
from shards.errors import BadInput
from tests.pairing.handmade import (
    CELL_IDS,
    CONTROLS,
    LURES,
    TEXTS,
    Bundle,
    count_by_cell,
    counted,
    looked_up,
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle(tmp_path / "outs")


def assert_is_as_made(bundle: Bundle, path: Path) -> None:
    """Whatever the layout, what is read is what was made."""
    made = bundle.transcripts
    with open_xenium(path) as run:
        batches = list(run.iter_transcripts(5))
        cells, nuclei, matrix = run.read_cells(), run.read_nuclei(), run.read_matrix()
        counts = counted(run)
        genes = [gene.symbol for gene in run.genes()]
        controls = run.read_control_counts()
    assert max(len(batch.qv) for batch in batches) <= 5
    cell_index, gene_index, x_um, y_um, qv = (
        np.concatenate([getattr(batch, name) for batch in batches]).tolist()
        for name in ("cell_index", "gene_index", "x_um", "y_um", "qv")
    )
    assert genes == LURES
    assert cell_index == [CELL_IDS.index(c) if c in CELL_IDS else -1 for c in made["cell_id"]]
    assert gene_index == [LURES.index(f) if f in LURES else -1 for f in made["feature_name"]]
    assert (x_um, y_um) == (made["x_location"].tolist(), made["y_location"].tolist())
    assert qv == made["qv"].tolist()
    assert cells["cell_id"].tolist() == bundle.cell_ids
    assert cells["n_nuclei"].tolist() == [2, 0, 0]
    assert cells["nucleus_area_um2"].isna().tolist() == [False, True, True]
    assert nuclei["cell_index"].tolist() == [0, 0, -1]
    assert nuclei[["x_um", "y_um"]].to_numpy().tolist() == [[2, 2], [8, 8], [2, 2]]
    assert matrix is not None
    np.testing.assert_array_equal(matrix.toarray(), counts)
    assert counts.sum() > 0
    assert controls is not None
    assert "Protein Expression" not in controls
    good = made[(made["qv"] >= 20) & (made["cell_id"] != "UNASSIGNED")]
    expected = [(good["feature_name"] == name).sum() for name in CONTROLS]
    assert controls[[kind for _, kind in CONTROLS.values()]].sum().tolist() == expected


# ---------------------------------------------------------------- one difference at a time


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("as_csv", [False, True])
def test_types_of_text(text: str, as_csv: bool, bundle: Bundle) -> None:
    bundle.text, bundle.as_csv = text, as_csv
    assert_is_as_made(bundle, bundle.write())


@pytest.mark.parametrize(
    "absent",
    [
        ("transcripts", "fov_name"), ("transcripts", "nucleus_distance"),
        ("transcripts", "codeword_category"), ("transcripts", "is_gene"),
        ("transcripts", "overlaps_nucleus"), ("cells", "nucleus_count"), ("nuclei", "label_id"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_csv", [False, True])
def test_columns_that_may_be_absent(absent: tuple[str, str], as_csv: bool, bundle: Bundle) -> None:
    table, column = absent
    del getattr(bundle, table)[column]
    bundle.as_csv = as_csv
    path = bundle.write()
    assert_is_as_made(bundle, path)
    with open_xenium(path) as run:
        (batch,) = run.iter_transcripts()
        assert (batch.overlaps_nucleus is None) == (column == "overlaps_nucleus")
        assert ("label_id" in " ".join(run.notes)) == (column == "label_id")


def test_several_row_groups(bundle: Bundle) -> None:
    bundle.row_group, bundle.text = 2, "bytes"
    assert_is_as_made(bundle, bundle.write())


@pytest.mark.parametrize("text", ["text", "numbers"])
@pytest.mark.parametrize("as_mex", [False, True])
def test_matrix_with_proteins(as_mex: bool, text: str, bundle: Bundle) -> None:
    """Proteins called as genes are neither genes nor controls, not even to the transcripts."""
    bundle.as_mex, bundle.text, bundle.proteins = as_mex, text, ("NEGR1", "CD3E")
    del bundle.transcripts["is_gene"], bundle.transcripts["codeword_category"]
    assert_is_as_made(bundle, bundle.write())


def test_genes_with_awkward_names(bundle: Bundle) -> None:
    """Names that tools take for a missing value, a number or a quotation."""
    names = ["NA", "nan", "1", '"DPH', "null", "a,b", "TRUE"]
    bundle.features = {n: (n, "Gene Expression") for n in names} | {
        name: (name, kind) for name, (_, kind) in CONTROLS.items()
    }
    bundle.transcripts["feature_name"] = [*names, *CONTROLS]
    bundle.counted = bundle.transcripts.copy()
    bundle.as_mex = bundle.as_csv = True
    with open_xenium(bundle.write()) as run:
        assert [gene.symbol for gene in run.genes()] == names
        assert count_by_cell(run, 20).qc.matrix_mismatches == 0


def test_panel_of_the_first_release(bundle: Bundle) -> None:
    bundle.features = None
    del bundle.transcripts["is_gene"], bundle.transcripts["codeword_category"]
    path = bundle.write()
    rows = [f"{name}\tENSG{i:011d}" for i, name in enumerate(LURES)]
    rows += ["BLANK_0001\tBLANK_0001", "antisense_NANOG\tantisense_NANOG"]
    (path / "panel.tsv").write_text("\n".join(["Name\tID", *rows, ""]), encoding="utf-8-sig")
    with open_xenium(path) as run:
        assert [(g.symbol, g.ensembl) for g in run.genes()] == [
            (name, f"ENSG{i:011d}") for i, name in enumerate(LURES)
        ]
        (batch,) = run.iter_transcripts()
        told = [batch.category_names[c] for c in batch.category]
        assert told == ["gene"] * len(LURES) + [c for c, _ in CONTROLS.values()]
        assert run.notes == ()


def test_counts_of_the_matrix_alone(bundle: Bundle) -> None:
    path = bundle.write()
    with open_xenium(path) as run:
        expected = count_by_cell(run, 20).matrix.toarray()
    (path / "transcripts.parquet").unlink()
    with open_xenium(path) as run:
        counts = count_by_cell(run, 20)
        assert counts.qc.source == "matrix"
        assert "no transcripts" in run.notes[0]
        np.testing.assert_array_equal(counts.matrix.toarray(), expected)
        with pytest.raises(BadInput, match="qv_min = 20"):
            count_by_cell(run, 25)


@pytest.mark.parametrize("as_mex", [False, True])
def test_panel_of_the_matrix_outweighs_that_of_the_json(as_mex: bool, bundle: Bundle) -> None:
    bundle.as_mex, bundle.panel = as_mex, {"OTHER": "gene"}
    assert_is_as_made(bundle, bundle.write())


def test_cells_of_1_x_have_one_nucleus_where_nothing_else_tells(bundle: Bundle) -> None:
    del bundle.cells["nucleus_count"]
    path = bundle.write()
    (path / "nucleus_boundaries.parquet").unlink()
    with open_xenium(path) as run:
        assert run.read_cells()["n_nuclei"].tolist() == [1, 0, 0]


# ---------------------------------------------------------------- the image of DAPI


@pytest.mark.parametrize(
    "names",
    [
        ["morphology_focus/ch0000_dapi.ome.tif", "morphology_focus/ch0001_18s.ome.tif"],
        ["morphology_focus/ch0001_DAPI.ome.tif", "morphology_focus/ch0000_18s.ome.tif"],
        ["morphology_focus/morphology_focus_0000.ome.tif"],
        ["morphology_focus.ome.tif", "morphology_mip.ome.tif", "morphology.ome.tif"],
        ["morphology_mip.ome.tif", "morphology.ome.tif"],
    ],
)
def test_names_of_the_image(names: list[str], bundle: Bundle) -> None:
    bundle.experiment["images"] = {"morphology_mip_filepath": "morphology_mip.ome.tif"}
    path = bundle.write()
    for i, name in enumerate(names):
        tifffile.imwrite(path / name, np.full((20, 30), i, np.uint16), metadata=None)
        (path / name).with_name(f"._{Path(name).name}").write_bytes(b"macOS")
    with open_xenium(path) as run, run.open_morphology() as slide:
        assert slide.size_px == (30, 20)
        assert (slide.read((0, 0, 30, 20)) == 0).all()


# ---------------------------------------------------------------- every release of the software

LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@pytest.fixture(scope="module", params=[(x, m) for x in LAYOUTS for m in (False, True)], ids=str)
def release(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Layout, bool, Path]:
    """Layout, whether it has masks, and a simulated run with the same bundle zipped and not."""
    layout, with_masks = request.param
    params = BundleParams(
        layout=layout,
        cells_zarr=with_masks,
        zipped=True,
        stains=layout >= "xoa-2.0" and with_masks,
        protein=layout == "xoa-4.0",
        rnd_version=not with_masks,
    )
    run = tmp_path_factory.mktemp("release") / "run"
    simulate(run, SimulationParams(n_cells=60, seed=3, bundle=params))
    with zipfile.ZipFile(run / "outs.zip") as file:
        file.extractall(run / "outs")
    return layout, with_masks, run


@pytest.mark.parametrize("name", ["outs", "outs.zip"])
def test_release(name: str, release: tuple[Layout, bool, Path]) -> None:
    layout, with_masks, folder = release
    truth = pq.read_table(folder / "truth" / "cells.parquet").to_pandas()
    with open_xenium(folder / name) as run:
        assert run.notes == ()
        assert (run.species, run.pixel_size_um) == ("human", 0.2125)
        counts = count_by_cell(run, 20)
        assert counts.qc.matrix_mismatches == 0
        assert counts.qc.n_counts == counts.qc.by_category["gene"] > 0
        cells, nuclei, outlines = run.read_cells(), run.read_nuclei(), run.read_cell_polygons()
        assert cells["cell_id"].tolist() == truth["cell_id"].tolist()
        owned = nuclei.groupby("cell_index").size().reindex(range(60), fill_value=0)
        np.testing.assert_array_equal(owned, cells["n_nuclei"])
        # Before 2.0 a cell was an expanded nucleus and had one.
        true_number = truth["nucleus_count"].clip(upper=1 if layout < "xoa-2.0" else None)
        np.testing.assert_array_equal(cells["n_nuclei"], true_number)
        for nucleus in nuclei.itertuples():
            centre = shapely.Point(nucleus.x_um, nucleus.y_um)
            assert nucleus.polygon.distance(centre) < 1
            outline = outlines[nucleus.cell_index]
            assert outline is not None
            assert outline.intersection(nucleus.polygon).area > 0.8 * nucleus.polygon.area
        assert all(outline is not None for outline in outlines)
        with run.open_morphology() as slide:
            size_px = slide.size_px
        labels = run.read_labels("cell")
        assert (labels is not None) == with_masks
        if labels is not None:
            assert labels.shape == size_px[::-1]
            inside, near, elsewhere = looked_up(run)
            assert elsewhere == 0
            assert inside >= 0.998 * (inside + near)


def test_tables_of_csv_alone(tmp_path: Path) -> None:
    """The csv copies of a whole run say what its Parquet files say."""
    simulate(tmp_path / "run", SimulationParams(n_cells=60, bundle=BundleParams(layout="xoa-1.3")))
    path = tmp_path / "run" / "outs"
    with open_xenium(path) as run:
        of_parquet = (count_by_cell(run, 20), run.read_cells(), run.read_nuclei())
    for file in path.glob("*.parquet"):
        file.unlink()
    with open_xenium(path) as run:
        counts, cells, nuclei = (count_by_cell(run, 20), run.read_cells(), run.read_nuclei())
        assert run.n_cells == 60
    assert counts.qc == of_parquet[0].qc
    assert (counts.matrix != of_parquet[0].matrix).nnz == 0
    pd.testing.assert_frame_equal(cells, of_parquet[1])
    pd.testing.assert_frame_equal(
        nuclei.drop(columns="polygon"), of_parquet[2].drop(columns="polygon")
    )


def test_csv_in_blocks(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pairing.xenium.transcripts._CSV_BLOCK_BYTES", 300)
    bundle.as_csv = True
    path = bundle.write()
    assert len(gzip.decompress((path / "transcripts.csv.gz").read_bytes())) > 900
    assert_is_as_made(bundle, path)
