"""One section written in every layout: what differs is there, and independent readers open it."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import numpy.typing as npt
import openslide
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from pairing.simulate import SimulationParams, SlideParams, simulate
from pairing.simulate.bundle import STAINS, cell_id_strings, write_bundle, zip_bundle
from pairing.simulate.panel import Feature
from pairing.simulate.params import BundleParams, Layout
from pairing.simulate.pictures import write_he
from pairing.simulate.polygons import mask_polygons, rings_um, taken, thinned
from pairing.simulate.section import PIXEL_UM, Masses, Section, Transcripts

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
OLD = LAYOUTS[:2]
SHAPE = (1090, 1301)
GRID = (6, 8)  # of cells, 150 px apart
N_CELLS = GRID[0] * GRID[1]
TYPES = {
    "predesigned_gene": "Gene Expression",
    "custom_gene": "Gene Expression",
    "negative_control_probe": "Negative Control Probe",
    "genomic_control_probe": "Genomic Control",
    "negative_control_codeword": "Negative Control Codeword",
    "unassigned_codeword": "Unassigned Codeword",
    "deprecated_codeword": "Deprecated Codeword",
}
NAMES = {
    "predesigned_gene": ["ACTB", "CD3E", "CD68", "NANOG", "NEGR1"],
    "custom_gene": ["BLNK"],
    "negative_control_probe": ["NegControlProbe_00001", "NegControlProbe_00002"],
    "genomic_control_probe": ["Intergenic_Region_1", "Intergenic_Region_2"],
    "negative_control_codeword": ["NegControlCodeword_0001"],
    "unassigned_codeword": ["UnassignedCodeword_0001", "UnassignedCodeword_0002"],
    "deprecated_codeword": ["DeprecatedCodeword_0001"],
}


def _features() -> tuple[Feature, ...]:
    named = [(name, category) for category, names in NAMES.items() for name in names]
    return tuple(
        Feature(
            id=f"ENSG{900000 + i:011d}" if "gene" in category.split("_") else name,
            name=name,
            category=category,
            feature_type=TYPES[category],
            codewords=(i,),
            kind=None,
        )
        for i, (name, category) in enumerate(named)
    )


def _masses(labels: npt.NDArray[np.int32], n: int) -> Masses:
    found = [np.nonzero(labels == label) for label in range(1, n + 1)]
    x_um, y_um = (np.array([np.mean(f[i]) + 0.5 for f in found]) * PIXEL_UM for i in (1, 0))
    return Masses(x_um, y_um, np.array([len(f[0]) for f in found]) * PIXEL_UM**2)


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> Section:
    """Round cells, each with a nucleus, but for some with none and some with two."""
    cell, nucleus = np.zeros(SHAPE, np.int32), np.zeros(SHAPE, np.int32)
    y, x = np.ogrid[: SHAPE[0], : SHAPE[1]]
    owner: list[int] = []
    for i in range(N_CELLS):
        cy, cx = 120 + 150 * (i // GRID[1]), 100 + 150 * (i % GRID[1])
        cell[(y - cy) ** 2 + (x - cx) ** 2 < 40**2] = i + 1
        radii = [] if i % 5 == 2 else [9, 14] if i % 7 == 3 else [18]
        for k, radius in enumerate(radii):
            owner.append(i)
            nucleus[(y - cy) ** 2 + (x - cx + 20 * (k - 0.5)) ** 2 < radius**2] = len(owner)
    rng = np.random.default_rng(5)
    features = _features()
    blocks = [
        _transcripts(rng, cell, nucleus, n, len(features)) for n in (900, 0, 1100, 400, 1, 700)
    ]
    cell_, feature, qv = (
        np.concatenate([getattr(b, name) for b in blocks]) for name in ("cell", "feature", "qv")
    )
    good = (cell_ >= 0) & (qv >= 20)
    entries = (np.ones(good.sum(), np.int32), (cell_[good], feature[good]))
    scratch = zarr.open_group(tmp_path_factory.mktemp("planes") / "scratch.zarr", mode="w")
    return Section(
        name="one section",
        prefix=np.sort(rng.choice(2**32 - 1, N_CELLS, replace=False)).astype(np.uint32),
        nucleus_labels=scratch.create_array("nucleus", data=nucleus, chunks=(256, 512)),
        cell_labels=scratch.create_array("cell", data=cell, chunks=(256, 512)),
        cell_of_nucleus=np.array(owner),
        cells=_masses(cell, N_CELLS),
        nuclei=_masses(nucleus, len(owner)),
        cell_rings=rings_um(mask_polygons(cell), PIXEL_UM),
        nucleus_rings=rings_um(mask_polygons(nucleus), PIXEL_UM),
        features=features,
        matrix=sparse.coo_matrix(entries, shape=(N_CELLS, len(features))).tocsr(),
        transcripts=lambda: iter(blocks),
        n_fov_columns=2,
        channels={
            stain: rng.integers(0, 400 * (i + 1), SHAPE).astype(np.uint16)
            for i, stain in enumerate(STAINS)
        },
    )


def _transcripts(
    rng: np.random.Generator,
    cell: npt.NDArray[np.int32],
    nucleus: npt.NDArray[np.int32],
    n: int,
    n_features: int,
) -> Transcripts:
    px = rng.integers(0, (SHAPE[1], SHAPE[0]), (n, 2))
    feature = rng.integers(0, n_features, n)
    in_nucleus = nucleus[px[:, 1], px[:, 0]] > 0
    return Transcripts(
        cell=cell[px[:, 1], px[:, 0]].astype(np.int64) - 1,
        feature=feature,
        codeword=feature,
        x_um=np.rint((px[:, 0] + 0.5) * PIXEL_UM * 64) / 64,
        y_um=np.rint((px[:, 1] + 0.5) * PIXEL_UM * 64) / 64,
        z_um=np.rint(rng.normal(16, 2, n) * 64) / 64,
        qv=np.where(rng.random(n) < 0.8, 40.0, 10.25),
        in_nucleus=in_nucleus,
        nucleus_distance_um=np.where(in_nucleus, 0, 1.5),
    )


def _params(layout: Layout, **more: Any) -> BundleParams:
    new = layout not in OLD
    return BundleParams(layout=layout, stains=new, protein=layout == "xoa-4.0", **more)


@pytest.fixture(scope="module")
def bundles(section: Section, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    root = tmp_path_factory.mktemp("é layouts")
    folders = {layout: root / layout for layout in LAYOUTS}
    for layout, folder in folders.items():
        folder.mkdir()
        write_bundle(folder, section, _params(layout))
    return folders


@contextmanager
def _foreign() -> Iterator[None]:
    """Around other people's readers: their deprecations are not ours to mend."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, ImportWarning):
            warnings.simplefilter("ignore", category)
        # Proteins have the names of genes, as they do in the instrument's own matrix.
        warnings.filterwarnings("ignore", "Variable names are not unique", UserWarning)
        yield


def _text(frame: pd.DataFrame) -> pd.DataFrame:
    """Bytes as text, as XOA 1.x has them in Parquet."""
    words = {
        c: [v.decode() if isinstance(v, bytes) else v for v in frame[c]]
        for c in frame.select_dtypes(object)
    }
    return frame.assign(**words)


def _store(folder: Path) -> Any:
    store = zarr.storage.ZipStore(folder / "cells.zarr.zip", read_only=True)
    return zarr.open_group(store, mode="r", zarr_format=2)


FILES = {
    "cell_boundaries.parquet", "nucleus_boundaries.parquet", "cells.parquet",
    "transcripts.parquet", "cell_feature_matrix.h5", "cells.zarr.zip", "experiment.xenium",
    "metrics_summary.csv", "cell_feature_matrix/matrix.mtx.gz",
    "cell_feature_matrix/features.tsv.gz", "cell_feature_matrix/barcodes.tsv.gz",
}  # fmt: skip
CSV = {f"{s}.csv.gz" for s in ("cell_boundaries", "nucleus_boundaries", "cells", "transcripts")}
SINGLE = {"morphology.ome.tif", "morphology_mip.ome.tif", "morphology_focus.ome.tif"}
NUMBERED = {f"morphology_focus/morphology_focus_{i:04d}.ome.tif" for i in range(4)}
NAMED = {
    f"morphology_focus/{name}.ome.tif"
    for name in (
        "ch0000_dapi", "ch0001_atp1a1_cd45_e-cadherin", "ch0002_18s", "ch0003_alphasma_vimentin"
    )
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("xoa-1.0", CSV | SINGLE | {"panel.tsv"}),
        ("xoa-1.3", CSV | SINGLE | {"gene_panel.json"}),
        ("xoa-2.0", CSV | NUMBERED | {"gene_panel.json"}),
        ("xoa-3.0", NUMBERED | {"gene_panel.json"}),
        ("xoa-4.0", NAMED | {"gene_panel.json", "protein_panel.json"}),
    ],
)
def test_a_bundle_has_the_files_of_its_layout(
    bundles: dict[Layout, Path], layout: Layout, more: set[str]
) -> None:
    folder = bundles[layout]
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == FILES | more


def test_what_a_person_leaves_out_is_left_out(section: Section, tmp_path: Path) -> None:
    write_bundle(tmp_path, section, BundleParams(layout="xoa-4.0", cells_zarr=False))
    assert not (tmp_path / "cells.zarr.zip").exists()
    assert not (tmp_path / "protein_panel.json").exists()
    assert [p.name for p in (tmp_path / "morphology_focus").iterdir()] == ["ch0000_dapi.ome.tif"]
    manifest = json.loads((tmp_path / "experiment.xenium").read_text())
    assert manifest["xenium_explorer_files"] == {}


TRANSCRIPT_COLUMNS = [
    "transcript_id", "cell_id", "overlaps_nucleus", "feature_name", "x_location", "y_location",
    "z_location", "qv", "fov_name", "nucleus_distance", "codeword_index", "codeword_category",
    "is_gene",
]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "n_columns", "cell_id", "text"),
    [
        ("xoa-1.0", 8, pa.int32(), pa.binary()),
        ("xoa-1.3", 8, pa.binary(), pa.binary()),
        ("xoa-2.0", 11, pa.large_string(), pa.large_string()),
        ("xoa-3.0", 13, pa.string(), pa.string()),
        ("xoa-4.0", 13, pa.string(), pa.string()),
    ],
)
def test_transcripts_have_the_columns_and_types_of_the_layout(
    section: Section,
    bundles: dict[Layout, Path],
    layout: Layout,
    n_columns: int,
    cell_id: pa.DataType,
    text: pa.DataType,
) -> None:
    table = pq.read_table(bundles[layout] / "transcripts.parquet")
    assert table.column_names == TRANSCRIPT_COLUMNS[:n_columns]
    assert table.schema.field("cell_id").type == cell_id
    assert table.schema.field("feature_name").type == text
    for name in ("cells", "cell_boundaries", "nucleus_boundaries"):
        schema = pq.read_schema(bundles[layout] / f"{name}.parquet")
        assert schema.field("cell_id").type == cell_id

    # Older releases have no genomic controls, and so none of their transcripts.
    drawn = _drawn(section, ("genomic_control_probe",) if layout in LAYOUTS[:3] else ())
    t = _text(table.to_pandas())
    assert t.transcript_id.is_unique
    for column, name in (("x_location", "x_um"), ("y_location", "y_um"), ("qv", "qv")):
        np.testing.assert_array_equal(t[column], drawn[name].to_numpy(np.float32))
    ids = [*cell_id_strings(section.prefix, layout), "-1" if layout == "xoa-1.0" else "UNASSIGNED"]
    assert t.cell_id.astype(str).tolist() == [ids[c] for c in drawn.cell]
    fov = (t.transcript_id.to_numpy() >> np.uint64(32)).astype(int) - 65536
    assert set(fov) == {0, 2, 3, 4, 5}  # the second field of view has none
    if "fov_name" in t:
        assert t.fov_name.tolist() == [["A1", "A2", "B1", "B2", "C1", "C2"][f] for f in fov]
    if "codeword_category" in t:
        assert t.codeword_category.tolist() == drawn.category.tolist()
        assert (t.is_gene == t.codeword_category.isin(["predesigned_gene", "custom_gene"])).all()


def _drawn(section: Section, without: tuple[str, ...] = ()) -> pd.DataFrame:
    """The section's transcripts, with category and name, but for the categories `without`."""
    columns = ("cell", "feature", "x_um", "y_um", "qv", "in_nucleus")
    t = pd.concat(
        [pd.DataFrame({c: getattr(b, c) for c in columns}) for b in section.transcripts()]
    )
    t["category"] = [section.features[f].category for f in t.feature]
    t["name"] = [section.features[f].name for f in t.feature]
    return t[~t.category.isin(without)].reset_index(drop=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_csv_copies_say_the_same(bundles: dict[Layout, Path], layout: Layout) -> None:
    for path in bundles[layout].glob("*.csv.gz"):
        frame = pd.read_csv(path)
        same = _text(pq.read_table(path.with_suffix("").with_suffix(".parquet")).to_pandas())
        pd.testing.assert_frame_equal(frame, same, check_dtype=False, check_exact=False, rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_matrices_agree(
    section: Section, bundles: dict[Layout, Path], layout: Layout
) -> None:
    folder = bundles[layout]
    with h5py.File(folder / "cell_feature_matrix.h5") as file:
        m = file["matrix"]
        shape = tuple(m["shape"][:])
        h5 = sparse.csc_matrix((m["data"][:], m["indices"][:], m["indptr"][:]), shape=shape)
        names, kinds, barcodes = (
            m[k].asstr()[:] for k in ("features/name", "features/feature_type", "barcodes")
        )
        assert ("protein_scaling_factor" in file.attrs) == (layout == "xoa-4.0")
    mex = folder / "cell_feature_matrix"
    with gzip.open(mex / "matrix.mtx.gz") as file:
        np.testing.assert_array_equal(scipy.io.mmread(file).toarray(), h5.toarray())
    rows = pd.read_csv(mex / "features.tsv.gz", sep="\t", header=None)
    assert rows[1].tolist() == names.tolist()
    assert rows[2].tolist() == kinds.tolist()
    listed = pd.read_csv(mex / "barcodes.tsv.gz", header=None, dtype=str)[0].tolist()
    assert listed == barcodes.tolist() == cell_id_strings(section.prefix, layout).tolist()

    measured = kinds != "Protein Expression"
    t = _text(pq.read_table(folder / "transcripts.parquet").to_pandas())
    kept = t[(t.cell_id.astype(str).isin(barcodes)) & (t.qv >= 20)]
    counted = pd.crosstab(kept.feature_name, kept.cell_id.astype(str))
    counted = counted.reindex(index=names[measured], columns=barcodes, fill_value=0)
    np.testing.assert_array_equal(h5.toarray()[measured], counted)
    cells = pq.read_table(folder / "cells.parquet").to_pandas()
    np.testing.assert_array_equal(cells.total_counts, counted.sum(axis=0))
    genes = kinds[measured] == "Gene Expression"
    np.testing.assert_array_equal(cells.transcript_counts, counted[genes].sum(axis=0))


@pytest.mark.parametrize(
    ("layout", "kinds"),
    [
        ("xoa-1.0", {"Blank Codeword": ["BLANK_0011", "BLANK_0012", "BLANK_0013"]}),
        (
            "xoa-1.3",
            {
                "Unassigned Codeword": NAMES["unassigned_codeword"],
                "Deprecated Codeword": NAMES["deprecated_codeword"],
            },
        ),
        ("xoa-3.0", {"Genomic Control": NAMES["genomic_control_probe"]}),
        ("xoa-4.0", {"Genomic Control": NAMES["genomic_control_probe"]}),
    ],
)
def test_controls_are_named_as_in_the_layout(
    bundles: dict[Layout, Path], layout: Layout, kinds: dict[str, list[str]]
) -> None:
    with h5py.File(bundles[layout] / "cell_feature_matrix.h5") as file:
        group = file["matrix/features"]
        rows = pd.DataFrame({k: group[k].asstr()[:] for k in ("name", "feature_type")})
    found = {kind: g.name.tolist() for kind, g in rows.groupby("feature_type")}
    probes = NAMES["negative_control_probe"]
    if layout == "xoa-1.0":
        probes = ["antisense_ACTB", probes[1]]
    assert found.pop("Negative Control Probe") == probes
    assert found.pop("Negative Control Codeword") == NAMES["negative_control_codeword"]
    assert found.pop("Gene Expression") == NAMES["predesigned_gene"] + NAMES["custom_gene"]
    if layout == "xoa-4.0":
        proteins = found.pop("Protein Expression")
        assert {"CD3E", "CD68"} <= set(proteins)  # genes are named so too
        assert rows.name.duplicated().sum() == 2
    for kind, names in kinds.items():
        assert found.pop(kind) == names
    if layout in LAYOUTS[2:]:
        assert set(found) == {"Unassigned Codeword", "Deprecated Codeword"}
    else:
        assert found == {}


CELL_COLUMNS = [
    "cell_id", "x_centroid", "y_centroid", "transcript_counts", "control_probe_counts",
    "genomic_control_counts", "control_codeword_counts", "unassigned_codeword_counts",
    "deprecated_codeword_counts", "total_counts", "cell_area", "nucleus_area", "nucleus_count",
    "segmentation_method",
]  # fmt: skip
NEW_IN_1_3 = {"unassigned_codeword_counts", "deprecated_codeword_counts"}
NEW_IN_2_0 = {"nucleus_count", "segmentation_method"}


@pytest.mark.parametrize(
    ("layout", "without"),
    [
        ("xoa-1.0", {"genomic_control_counts"} | NEW_IN_2_0 | NEW_IN_1_3),
        ("xoa-1.3", {"genomic_control_counts"} | NEW_IN_2_0),
        ("xoa-2.0", {"genomic_control_counts"}),
        ("xoa-3.0", set()),
        ("xoa-4.0", set()),
    ],
)
def test_cells_have_the_columns_of_the_layout(
    section: Section, bundles: dict[Layout, Path], layout: Layout, without: set[str]
) -> None:
    cells = _text(pq.read_table(bundles[layout] / "cells.parquet").to_pandas())
    assert cells.columns.tolist() == [c for c in CELL_COLUMNS if c not in without]
    ids = cell_id_strings(section.prefix, layout)
    assert cells.cell_id.astype(str).tolist() == ids.tolist()
    if layout == "xoa-1.0":
        assert cells.cell_id.tolist() == list(range(1, N_CELLS + 1))
    n_nuclei = np.bincount(section.cell_of_nucleus, minlength=N_CELLS)
    assert set(n_nuclei) == {0, 1, 2}
    np.testing.assert_array_equal(cells.nucleus_area.isna(), n_nuclei == 0)
    if "nucleus_count" in cells:
        np.testing.assert_array_equal(cells.nucleus_count, n_nuclei)
    np.testing.assert_allclose(cells.x_centroid, section.cells.x_um)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_polygons_are_closed_and_as_coarse_as_in_the_layout(
    section: Section, bundles: dict[Layout, Path], layout: Layout
) -> None:
    ids = cell_id_strings(section.prefix, layout)
    owner = section.cell_of_nucleus if layout not in OLD else np.unique(section.cell_of_nucleus)
    for kind, owners in (("cell", np.arange(N_CELLS)), ("nucleus", owner)):
        table = _text(pq.read_table(bundles[layout] / f"{kind}_boundaries.parquet").to_pandas())
        key = "cell_id" if layout in OLD else "label_id"
        assert ("label_id" in table) == (layout not in OLD)
        rings = [ring for _, ring in table.groupby(key, sort=False)]
        assert [str(r.cell_id.iloc[0]) for r in rings] == ids[owners].tolist()
        assert {len(r) for r in rings} == {13 if layout in OLD else 25}
        for ring in rings:
            xy = ring[["vertex_x", "vertex_y"]].to_numpy()
            np.testing.assert_array_equal(xy[0], xy[-1])
            assert len(np.unique(xy, axis=0)) == len(xy) - 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_and_owners(section: Section, bundles: dict[Layout, Path], layout: Layout) -> None:
    store = _store(bundles[layout])
    nucleus, cell = (np.asarray(store[f"masks/{i}"][...]) for i in (0, 1))
    np.testing.assert_array_equal(cell, section.cell_labels[...])
    assert nucleus.dtype == cell.dtype == np.uint32
    columns = store["cell_summary"].attrs["column_names"]
    assert ("nucleus_count" in columns) == (layout not in OLD)
    assert store["cell_summary"].shape == (N_CELLS, len(columns))
    if layout in OLD:
        # A nucleus has the label of its cell; two of one cell are one.
        inside = nucleus > 0
        np.testing.assert_array_equal(inside, section.nucleus_labels[...] > 0)
        np.testing.assert_array_equal(nucleus[inside], cell[inside])
        assert "polygon_sets" not in store
        assert store["polygon_vertices"].shape == (2, N_CELLS, 26)
        drawn = np.asarray(store["polygon_num_vertices"][...])
        n_nuclei = np.bincount(section.cell_of_nucleus, minlength=N_CELLS)
        np.testing.assert_array_equal(drawn, [13 * (n_nuclei > 0), np.full(N_CELLS, 13)])
    else:
        np.testing.assert_array_equal(nucleus, section.nucleus_labels[...])
        owner = store["polygon_sets/0/cell_index"][...]
        np.testing.assert_array_equal(owner, section.cell_of_nucleus)
        np.testing.assert_array_equal(store["polygon_sets/1/cell_index"][...], range(N_CELLS))
        table = pq.read_table(bundles[layout] / "nucleus_boundaries.parquet").to_pandas()
        first = np.asarray(store["polygon_sets/0/vertices"][0])
        np.testing.assert_array_equal(
            first.reshape(-1, 2), table.loc[table.label_id == 1, ["vertex_x", "vertex_y"]]
        )
    if layout == "xoa-1.0":
        np.testing.assert_array_equal(store["cell_id"][...], range(1, N_CELLS + 1))
    else:
        np.testing.assert_array_equal(store["cell_id"][:, 0], section.prefix)
        assert set(store["cell_id"][:, 1]) == {1}
    assert ("seg_mask_value" in store) == (layout == "xoa-1.3")


@pytest.mark.parametrize(
    ("layout", "software", "images"),
    [
        (
            "xoa-1.0",
            "Xenium-1.0.1",
            {
                "morphology_filepath": "morphology.ome.tif",
                "morphology_mip_filepath": "morphology_mip.ome.tif",
                "morphology_focus_filepath": "morphology_focus.ome.tif",
            },
        ),
        (
            "xoa-2.0",
            "xenium-2.0.0.6-35-ga7e17149a",
            {
                # Named though it is not there, as in bundles of that release.
                "morphology_mip_filepath": "morphology_mip.ome.tif",
                "morphology_focus_filepath": "morphology_focus/morphology_focus_0000.ome.tif",
            },
        ),
        (
            "xoa-4.0",
            "xenium-4.0.1.0",
            {"morphology_focus_filepath": "morphology_focus/ch0000_dapi.ome.tif"},
        ),
    ],
)
def test_the_manifest_of_the_layout(
    bundles: dict[Layout, Path], layout: Layout, software: str, images: dict[str, str]
) -> None:
    manifest = json.loads((bundles[layout] / "experiment.xenium").read_text())
    assert manifest["analysis_sw_version"] == software
    assert manifest["images"] == images
    assert manifest["num_cells"] == N_CELLS
    assert manifest["pixel_size"] == PIXEL_UM
    assert ("region_area" in manifest) == (layout == "xoa-4.0")
    assert "xenium_ranger" not in manifest


def test_figures_of_the_manifest_and_of_the_metrics(
    section: Section, bundles: dict[Layout, Path]
) -> None:
    manifest = json.loads((bundles["xoa-3.0"] / "experiment.xenium").read_text())
    metrics = pd.read_csv(bundles["xoa-3.0"] / "metrics_summary.csv").iloc[0]
    t = _drawn(section)
    good = t[t.category.isin(["predesigned_gene", "custom_gene"]) & (t.qv >= 20)]
    assert manifest["fraction_transcripts_assigned"] == (good.cell >= 0).mean()
    nuclei_um2 = section.nuclei.area_um2.sum()
    assert manifest["nuclear_transcripts_per_100um"] == pytest.approx(
        100 * good.in_nucleus.sum() / nuclei_um2
    )
    assert metrics.num_transcripts == len(t)
    probes = (t.category == "negative_control_probe") & (t.qv >= 20)
    assert metrics.negative_control_probe_rate == pytest.approx(probes.sum() / (t.qv >= 20).sum())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_panels(bundles: dict[Layout, Path], layout: Layout) -> None:
    folder = bundles[layout]
    genes = NAMES["predesigned_gene"] + NAMES["custom_gene"]
    if layout == "xoa-1.0":
        assert pd.read_csv(folder / "panel.tsv", sep="\t").Name.tolist() == genes
        return
    targets = json.loads((folder / "gene_panel.json").read_text())["payload"]["targets"]
    kinds = {x["type"]["data"]["name"]: x["type"]["descriptor"] for x in targets}
    assert [name for name, kind in kinds.items() if kind == "gene"] == genes
    assert ("Intergenic_Region_1" in kinds) == (layout in LAYOUTS[3:])
    if layout == "xoa-4.0":
        proteins = json.loads((folder / "protein_panel.json").read_text())["payload"]["targets"]
        assert "CD3E" in {x["type"]["data"]["name"] for x in proteins}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tifffile_reads_the_morphology(
    section: Section, bundles: dict[Layout, Path], layout: Layout
) -> None:
    folder = bundles[layout]
    dapi = section.channels["DAPI"][...]
    if layout in OLD:
        np.testing.assert_array_equal(tifffile.imread(folder / "morphology_focus.ome.tif"), dapi)
        with tifffile.TiffFile(folder / "morphology.ome.tif") as tiff:
            series = tiff.series[0]
            assert (series.axes, series.shape) == ("ZYX", (3, *SHAPE))
            assert [level.shape[1:] for level in series.levels] == [SHAPE, (545, 650)]
            stack = series.asarray()
            assert 'PhysicalSizeZ="3.0"' in str(tiff.ome_metadata)
        np.testing.assert_array_equal(stack[1], dapi)
        assert stack[0].std() < stack[1].std() / 3
        mip = tifffile.imread(folder / "morphology_mip.ome.tif")
        np.testing.assert_array_equal(mip, stack.max(axis=0))
        return
    files = sorted((folder / "morphology_focus").iterdir())
    for number, path in enumerate(files):
        # As one picture of all channels, from whichever file; and alone, with its levels.
        with tifffile.TiffFile(path) as tiff:
            assert (tiff.series[0].axes, tiff.series[0].shape) == ("CYX", (4, *SHAPE))
            names = re.findall(r'<Channel ID="Channel:(\d)" Name="([^"]+)"', str(tiff.ome_metadata))
            assert names == [(str(i), stain) for i, stain in enumerate(STAINS)]
        with tifffile.TiffFile(path, is_ome=False) as tiff:
            page = tiff.pages[0]
            assert isinstance(page, tifffile.TiffPage)
            assert (page.compression, page.tilewidth, page.dtype) == (34712, 1024, np.uint16)
            plane = section.channels[STAINS[number]][...]
            np.testing.assert_array_equal(tiff.series[0].asarray(), plane)
            half = tiff.series[0].levels[1].asarray()
        means = plane[:1090, :1300].reshape(545, 2, 650, 2).mean(axis=(1, 3))
        assert np.abs(half - means).max() <= 0.5
    assert not list(folder.rglob(".levels-*"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scanpy_reads_the_matrix(bundles: dict[Layout, Path], layout: Layout) -> None:
    folder = bundles[layout]
    with _foreign():
        import scanpy

        from_h5 = scanpy.read_10x_h5(folder / "cell_feature_matrix.h5", gex_only=False)
        from_mex = scanpy.read_10x_mtx(folder / "cell_feature_matrix", gex_only=False)
    np.testing.assert_array_equal(from_h5.X.toarray(), from_mex.X.toarray())
    assert from_h5.obs_names.tolist() == from_mex.obs_names.tolist()
    assert from_h5.var["feature_types"].tolist() == from_mex.var["feature_types"].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_spatialdata_io_reads_the_bundle(
    section: Section, bundles: dict[Layout, Path], layout: Layout
) -> None:
    with _foreign():
        from spatialdata_io import xenium

        sdata = xenium(bundles[layout])
    table = sdata.tables["table"]
    genes = NAMES["predesigned_gene"] + NAMES["custom_gene"]
    assert table.var_names.tolist() == genes
    np.testing.assert_array_equal(table.X.toarray(), section.matrix[:, :6].toarray())
    ids = cell_id_strings(section.prefix, layout)
    assert table.obs["cell_id"].astype(str).tolist() == ids.tolist()
    for name, plane in (("cell_labels", section.cell_labels), ("nucleus_labels", None)):
        read = sdata.labels[name]["scale0"]["image"]
        assert read.shape == SHAPE
        if plane is not None:
            np.testing.assert_array_equal(read.to_numpy(), plane[...])
    cells, nuclei = sdata.shapes["cell_boundaries"], sdata.shapes["nucleus_boundaries"]
    assert cells.index.astype(str).tolist() == ids.tolist()
    assert cells.area.to_numpy() == pytest.approx(section.cells.area_um2, rel=0.1)
    n_nuclei = len(section.cell_of_nucleus)
    assert len(nuclei) == (n_nuclei if layout not in OLD else len(set(section.cell_of_nucleus)))
    without = ("genomic_control_probe",) if layout in LAYOUTS[:3] else ()
    assert len(sdata.points["transcripts"]) == len(_drawn(section, without))
    focus = sdata.images["morphology_focus"]["scale0"]["image"]
    assert focus.shape == (1 if layout in OLD else 4, *SHAPE)
    np.testing.assert_array_equal(focus[0].to_numpy(), section.channels["DAPI"][...])
    assert ("morphology_mip" in sdata.images) == (layout in OLD)


def test_spatialdata_io_scales_proteins(bundles: dict[Layout, Path]) -> None:
    folder = bundles["xoa-4.0"]
    with _foreign():
        from spatialdata_io import xenium

        sdata = xenium(folder, gex_only=False)
    with h5py.File(folder / "cell_feature_matrix.h5") as file:
        scale = file.attrs["protein_scaling_factor"]
        m = file["matrix"]
        parts = tuple(m[k][:] for k in ("data", "indices", "indptr"))
        stored = sparse.csc_matrix(parts, shape=tuple(m["shape"][:])).T.toarray()
    table = sdata.tables["table"]
    protein = (table.var["feature_types"] == "Protein Expression").to_numpy()
    read = table.X.toarray()
    np.testing.assert_allclose(read[:, protein], stored[:, protein] / scale, rtol=1e-6)
    np.testing.assert_array_equal(read[:, ~protein], stored[:, ~protein])


@pytest.mark.parametrize("layout", ["xoa-1.3", "xoa-4.0"])
def test_spatialdata_io_takes_a_version_without_a_number_for_an_old_one(
    section: Section, tmp_path: Path, layout: Layout
) -> None:
    """It says that it takes it for the newest, then looks for the pictures of XOA 1.x."""
    write_bundle(tmp_path, section, BundleParams(layout=layout, rnd_version=True))
    assert json.loads((tmp_path / "experiment.xenium").read_text())["analysis_sw_version"] == "R&D"
    with _foreign():
        from spatialdata_io import xenium

        with pytest.warns(UserWarning, match="version of the Xenium Analyzer"):
            sdata = xenium(tmp_path, morphology_mip=layout in OLD, morphology_focus=layout in OLD)
        assert sdata.tables["table"].shape == (N_CELLS, 6)
        if layout not in OLD:
            with (
                pytest.warns(UserWarning, match="version of the Xenium Analyzer"),
                pytest.raises(Exception, match=r"morphology_focus\.ome\.tif"),
            ):
                xenium(tmp_path, morphology_mip=False)


def test_spatialdata_io_needs_the_masks(section: Section, tmp_path: Path) -> None:
    write_bundle(tmp_path, section, BundleParams(layout="xoa-3.0", cells_zarr=False))
    with _foreign():
        from spatialdata_io import xenium

        with pytest.raises(FileNotFoundError, match=r"cells\.zarr\.zip"):
            xenium(tmp_path)


def test_the_bundle_of_xoa_3_has_what_a_real_one_has(
    bundles: dict[Layout, Path], shared_data: Path
) -> None:
    real, ours = shared_data / "xenium" / "mouse_ileum_tiny", bundles["xoa-3.0"]
    manifests = [json.loads((f / "experiment.xenium").read_text()) for f in (real, ours)]
    assert manifests[1].keys() == manifests[0].keys()
    for name in ("transcripts", "cells", "cell_boundaries", "nucleus_boundaries"):
        wanted, found = (pq.read_schema(f / f"{name}.parquet") for f in (real, ours))
        assert (found.names, found.types) == (wanted.names, wanted.types)
    stores = []
    for folder in (real, ours):
        with h5py.File(folder / "cell_feature_matrix.h5") as file:
            names = sorted([*file["matrix"], *file["matrix/features"]])
            kinds = {n: file[f"matrix/{n}"].dtype for n in ("data", "indices", "indptr", "shape")}
            stores.append((names, kinds, sorted(file.attrs)))
    assert stores[1] == stores[0]
    pictures = [sorted(p.name for p in (f / "morphology_focus").iterdir()) for f in (real, ours)]
    assert pictures[1] == pictures[0]
    texts = [tifffile.tiffcomment(f / "morphology_focus" / pictures[0][2]) for f in (real, ours)]
    place = r'<TiffData ([^>]+)>\s*<UUID FileName="([^"]+)">urn:uuid:[0-9a-f-]{36}</UUID>'
    channel = r'<Channel ID="([^"]+)" Name="([^"]+)" SamplesPerPixel="1"'
    for pattern in (place, channel):
        wanted_, found_ = (re.findall(pattern, str(text)) for text in texts)
        assert found_ == wanted_
        assert len(found_) == 4


def _hashes(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.mark.parametrize("layout", ["xoa-1.3", "xoa-4.0"])
def test_the_same_section_gives_the_same_bytes_and_the_same_zip(
    section: Section, bundles: dict[Layout, Path], tmp_path: Path, layout: Layout
) -> None:
    wanted = _hashes(bundles[layout])
    zips = []
    for i in range(2):
        folder = tmp_path / f"{i}" / "outs"
        folder.mkdir(parents=True)
        write_bundle(folder, section, _params(layout))
        assert _hashes(folder) == wanted
        zip_bundle(folder, tmp_path / f"{i}.zip")
        assert not folder.exists()
        zips.append((tmp_path / f"{i}.zip").read_bytes())
    assert zips[0] == zips[1]
    with zipfile.ZipFile(tmp_path / "0.zip") as zipped:
        zipped.extractall(tmp_path / "out")
        assert {i.compress_type for i in zipped.infolist()} == {zipfile.ZIP_STORED}
    assert _hashes(tmp_path / "out") == wanted


def test_stains_that_a_section_does_not_have_are_refused(section: Section, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="18S"):
        write_bundle(
            tmp_path,
            replace(section, channels={"DAPI": section.channels["DAPI"]}),
            BundleParams(stains=True),
        )
    assert not list(tmp_path.iterdir())


def test_a_section_without_transcripts_is_a_bundle(section: Section, tmp_path: Path) -> None:
    nothing = sparse.csr_matrix(section.matrix.shape, dtype=np.int32)
    empty = replace(section, transcripts=lambda: iter(()), matrix=nothing)
    write_bundle(tmp_path, empty, BundleParams(layout="xoa-2.0"))
    table = pq.read_table(tmp_path / "transcripts.parquet")
    assert (table.num_rows, table.column_names) == (0, TRANSCRIPT_COLUMNS[:11])
    assert json.loads((tmp_path / "experiment.xenium").read_text())["transcripts_per_cell"] == 0


def test_a_simulation_is_zipped_where_it_is_asked_for(tmp_path: Path) -> None:
    params = SimulationParams(
        n_cells=20, bundle=BundleParams(layout="xoa-1.0", zipped=True), slide=SlideParams(mpp=1.0)
    )
    simulate(tmp_path / "s", params)
    assert not (tmp_path / "s" / "outs").exists()
    with zipfile.ZipFile(tmp_path / "s" / "outs.zip") as zipped:
        assert {"experiment.xenium", "panel.tsv", "cells.zarr.zip"} <= set(zipped.namelist())
    truth = pq.read_table(tmp_path / "s" / "truth" / "cells.parquet")
    assert truth["cell_id"].to_pylist() == [str(i) for i in range(1, 21)]


@given(st.lists(st.one_of(st.just(0), st.integers(4, 40)), max_size=8), st.integers(5, 25))
def test_thinned_rings_keep_their_corners_in_order_and_stay_closed(
    sizes: list[int], max_vertices: int
) -> None:
    angles = [np.linspace(0, 2 * np.pi, n) for n in sizes]
    outlines = [np.stack([np.cos(a), np.sin(a)], axis=1) + 3 * i for i, a in enumerate(angles)]
    rings = rings_um([*outlines, np.zeros((0, 2))], 1.0)
    thin = thinned(rings, max_vertices)
    assert np.diff(thin.start).tolist() == [min(n, max_vertices) for n in sizes] + [0]
    for outline, (first, end) in zip(outlines, pairwise(thin.start[:-1]), strict=True):
        ring = thin.vertices_um[first:end]
        row = {tuple(v): i for i, v in reversed(list(enumerate(outline.tolist())))}
        where = [row[tuple(v)] for v in ring[:-1].tolist()]
        assert where == sorted(set(where))
        if len(ring):
            np.testing.assert_array_equal(ring[[0, -1]], outline[[0, 0]])
    back = taken(rings, np.arange(len(sizes), -1, -1))
    assert np.diff(back.start).tolist() == [0, *reversed(sizes)]
    if sizes:
        np.testing.assert_array_equal(back.vertices_um[back.start[-2] :], outlines[0])


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, unique=True))
def test_ids_are_the_letters_of_their_nibbles(prefixes: list[int]) -> None:
    prefix = np.array(sorted(prefixes), np.uint32)
    ids = cell_id_strings(prefix, "xoa-1.3")
    digits = str.maketrans("abcdefghijklmnop", "0123456789abcdef")
    assert [int(i.removesuffix("-1").translate(digits), 16) for i in ids] == prefix.tolist()
    assert ids.tolist() == sorted(ids.tolist())
    assert cell_id_strings(prefix, "xoa-1.0").tolist() == [str(i + 1) for i in range(len(prefix))]


@pytest.fixture(scope="module")
def picture() -> npt.NDArray[np.uint8]:
    y, x = np.mgrid[:1231, :1089]
    waves = [127 + 90 * np.sin(x / (20 + 7 * c)) * np.cos(y / (31 - 5 * c)) for c in range(3)]
    return np.stack(waves, axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    ("compression", "quality", "code"), [("jpeg", 90, 7), ("jpeg2000", 40, 34712)]
)
def test_slides_keep_the_picture_at_every_level(
    picture: npt.NDArray[np.uint8], tmp_path: Path, compression: Any, quality: int, code: int
) -> None:
    planes = zarr.create_array(tmp_path / "he.zarr", data=picture, chunks=(300, 300, 3))
    write_he(tmp_path / "he.ome.tif", planes, 0.25, compression, quality)
    write_he(tmp_path / "again.ome.tif", picture, 0.25, compression, quality)
    with tifffile.TiffFile(tmp_path / "he.ome.tif") as tiff:
        assert [s.shape for s in tiff.series[0].levels] == [
            (1231, 1089, 3), (615, 544, 3), (307, 272, 3)
        ]  # fmt: skip
        page = tiff.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        assert (page.compression, page.tilewidth) == (code, 512)
        assert 'PhysicalSizeX="0.25"' in str(tiff.ome_metadata)
        levels = [level.asarray() for level in tiff.series[0].levels]
    with tifffile.TiffFile(tmp_path / "again.ome.tif") as tiff:
        np.testing.assert_array_equal(tiff.series[0].asarray(), levels[0])
    wanted = picture.astype(float)
    for level in levels:
        assert np.sqrt(((level - wanted) ** 2).mean()) < 4
        height, width = (n // 2 for n in level.shape[:2])
        wanted = wanted[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3).mean(axis=(1, 3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.ome.tif", "he.ome.tif", "he.zarr"]


def test_openslide_reads_level_0_of_jpeg_slides_alone(
    picture: npt.NDArray[np.uint8], bundles: dict[Layout, Path], tmp_path: Path
) -> None:
    write_he(tmp_path / "jpeg.ome.tif", picture, 0.25, "jpeg")
    with openslide.OpenSlide(tmp_path / "jpeg.ome.tif") as slide:
        assert slide.level_dimensions == ((1089, 1231),)
        assert "openslide.mpp-x" not in slide.properties
        region = np.asarray(slide.read_region((500, 700), 0, (80, 60)))[..., :3]
    assert np.abs(region.astype(int) - picture[700:760, 500:580]).mean() < 3
    write_he(tmp_path / "j2k.ome.tif", picture, 0.25, "jpeg2000", 40)
    for path in (tmp_path / "j2k.ome.tif", bundles["xoa-1.0"] / "morphology_focus.ome.tif"):
        with pytest.raises(openslide.OpenSlideError, match="Unsupported TIFF compression: 34712"):
            openslide.OpenSlide(path)
