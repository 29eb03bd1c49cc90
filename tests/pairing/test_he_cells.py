"""Counts of H&E nuclei by lookup: against polygons, the simulator's truth, and a real store."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from pairing.cells import CellsConfig, HeSide, Withdrawal, read_cells, read_counts, write_cells
from pairing.geometry import Affine
from pairing.he_cells import he_cell_errors
from pairing.label_tiles import PIXEL_UM
from pairing.warp import Warp
from pairing.xenium import XeniumRun, open_xenium
from shards.errors import BadInput
from tests.pairing.handmade import LURES, Bundle, counted
from tests.pairing.test_counts import backwards

# Away from a border by more than this the raster says what the polygons do.
BORDER_UM = 1.5 * PIXEL_UM


def he_table(outlines_px: npt.NDArray[np.object_], mpp: float) -> pa.Table:
    centres_px = shapely.get_coordinates(shapely.centroid(outlines_px))
    return pa.table(
        {
            "nucleus_id": np.arange(1, len(outlines_px) + 1),
            "x_px": centres_px[:, 0],
            "y_px": centres_px[:, 1],
            "area_um2": shapely.area(outlines_px) * mpp**2,
            "polygon_px": pa.array(shapely.to_wkb(outlines_px).tolist(), pa.binary()),
        }
    )


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pairing.label_tiles.TILE_PX", 256)


class Counted:
    """The cells artifact of H&E nuclei of a run, read back."""

    def __init__(
        self, folder: Path, run: XeniumRun, he: HeSide, map_tasks: Any = map,
        withdrawal: Withdrawal | None = None, **config: Any,
    ) -> None:  # fmt: skip
        out, kept = folder / "out", folder / "kept"
        out.mkdir(parents=True)
        kept.mkdir()
        options = CellsConfig(unit="he_nuclei", **config)
        self.summary = write_cells(out, kept, run, options, "human", he, withdrawal, map_tasks)
        self.files = {p.name: p.read_bytes() for p in out.iterdir()}
        self.cells = read_cells(out)
        self.counts = read_counts(out, len(run.genes())).toarray()


def bounds_by_polygons(
    run: XeniumRun, outlines_um: npt.NDArray[np.object_], expansion_um: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The least and the most counts of each nucleus: without and with what lies near a border."""
    least, most = np.zeros((2, len(outlines_um), len(run.genes())), np.int64)
    tree = shapely.STRtree(outlines_um)
    for batch in run.iter_transcripts():
        good = np.flatnonzero((batch.qv >= 20) & (batch.gene_index >= 0))
        points = shapely.points(batch.x_um[good].astype(float), batch.y_um[good].astype(float))
        reach_um = expansion_um + 3 * BORDER_UM
        point, near = tree.query(points, predicate="dwithin", distance=reach_um)
        pairs = pd.DataFrame(
            {"point": point, "nucleus": near, "gene": batch.gene_index[good[point]]}
        )
        pairs["away"] = shapely.distance(outlines_um[near], points[point])
        pairs["edge"] = shapely.distance(
            shapely.get_exterior_ring(outlines_um[near]), points[point]
        )
        pairs = pairs.sort_values(["point", "away", "nucleus"])
        first = pairs.groupby("point")["away"].transform("first")
        edge = pairs.groupby("point")["edge"].transform("min")
        rank = pairs.groupby("point").cumcount()
        second = pairs["point"].map(pairs[rank == 1].set_index("point")["away"]).fillna(np.inf)
        grown = (first < expansion_um - BORDER_UM) & (second - first > 2 * BORDER_UM)
        sure = (rank == 0) & (grown | ((first == 0) & (edge > BORDER_UM)))
        np.add.at(least, (pairs["nucleus"][sure], pairs["gene"][sure]), 1)
        decided = pairs["point"].isin(pairs["point"][sure])
        may = (pairs["away"] <= expansion_um + BORDER_UM) & (pairs["away"] <= first + 2 * BORDER_UM)
        may &= ~decided
        np.add.at(most, (pairs["nucleus"][may], pairs["gene"][may]), 1)
    return least, least + most


# ---------------------------------------------------------------- random nuclei


@st.composite
def sections(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "seed": draw(st.integers(0, 2**32 - 1)),
        "n_nuclei": draw(st.integers(1, 12)),
        "expansion_um": draw(st.sampled_from([0.0, 1.3, 5.0, 9.0])),
        "angle_rad": draw(st.floats(-3, 3)),
        "mirror": draw(st.booleans()),
        "tile_px": draw(st.sampled_from([64, 200])),
        "field": draw(st.booleans()),
    }


def made(folder: Path, section: dict[str, Any]) -> tuple[Path, HeSide, npt.NDArray[np.object_]]:
    """A bundle of transcripts around ellipses that do not overlap, and these on a slide."""
    rng = np.random.default_rng(section["seed"])
    place = rng.permutation(16)[: section["n_nuclei"]]
    centres = np.stack([place % 4, place // 4], axis=1) * 11.0 - 4 + rng.uniform(-2, 2, (1, 2))
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radii = rng.uniform(2, 5, (len(place), 2, 1))
    ring = np.stack([np.cos(angle), np.sin(angle)])[None] * radii
    outlines_um = shapely.polygons(centres[:, None] + ring.transpose(0, 2, 1))
    bundle = Bundle(folder / "outs")
    n = 400
    bundle.transcripts = pd.DataFrame(
        {
            "cell_id": "UNASSIGNED",
            "feature_name": np.array(LURES, object)[rng.integers(0, len(LURES), n)],
            "x_location": rng.uniform(-20, 60, n).astype(np.float32),
            "y_location": rng.uniform(-20, 60, n).astype(np.float32),
            "qv": rng.choice(np.array([12, 20, 40], np.float32), n),
        }
    )
    bundle.row_group = 60
    affine = Affine.similarity(3.1, section["angle_rad"], (500.0, 80.0), mirror=section["mirror"])
    shift = 3 * rng.normal(size=(6, 6, 2)) if section["field"] else None
    warp = Warp(affine, (-40.0, -40.0), 25.0, shift)
    # Corners are carried, as sides between them bend by far less than a pixel.
    fine = shapely.segmentize(outlines_um, 0.5)
    outlines_px = shapely.transform(fine, warp)
    he = HeSide(he_table(outlines_px, 1 / 3.1), warp, 1 / 3.1, pd.Series(dtype=float))
    return bundle.write(), he, fine


@settings(max_examples=12, deadline=None)
@given(section=sections())
def test_counts_are_those_in_the_expanded_polygons(section: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        path, he, outlines_um = made(folder, section)
        config = {"expansion_um": section["expansion_um"], "neighbors_k": 2}
        patch.setattr("pairing.label_tiles.TILE_PX", 500)
        with open_xenium(path) as run:
            whole = Counted(folder / "whole", run, he, **config)
            patch.setattr("pairing.label_tiles.TILE_PX", section["tile_px"])
            patch.setattr("pairing.label_tiles._HELD_TILES", 1)
            patch.setattr("pairing.xenium.transcripts.SPAN_ROWS", 100)
            tiled = Counted(folder / "tiled", run, he, backwards, **config)
            least, most = bounds_by_polygons(run, outlines_um, section["expansion_um"])
    assert tiled.files == whole.files
    assert (least <= whole.counts).all()
    assert (whole.counts <= most).all()
    qc = whole.summary["counts"]
    assert (qc["source"], qc["n_transcripts"], qc["matrix_mismatches"]) == ("lookup", 400, None)
    assert qc["n_low_quality"] + qc["n_unassigned"] + qc["n_counts"] == 400
    np.testing.assert_allclose(
        whole.cells[["x_um", "y_um"]], shapely.get_coordinates(shapely.centroid(outlines_um)),
        atol=0.2,
    )  # fmt: skip
    grown = shapely.area(shapely.buffer(outlines_um, section["expansion_um"]))
    assert (whole.cells["cell_area_um2"] <= grown + 0.06 * grown + 2).all()
    if section["n_nuclei"] == 1:
        np.testing.assert_allclose(whole.cells["cell_area_um2"], grown, rtol=0.06)


@pytest.mark.usefixtures("small_tiles")
def test_a_table_of_h_and_e_nuclei_alone(tmp_path: Path) -> None:
    section = {
        "seed": 1, "n_nuclei": 9, "expansion_um": 5.0, "angle_rad": 0.4, "mirror": True,
        "field": False,
    }  # fmt: skip
    path, he, _ = made(tmp_path, section)
    with open_xenium(path) as run:
        found = Counted(tmp_path / "found", run, he)
    cells = found.cells
    assert cells["cell_id"].tolist() == [f"he-{i}" for i in range(1, 10)]
    assert cells["he_nucleus_id"].tolist() == list(range(1, 10))
    assert (cells[["he_iou", "he_distance_um", "n_nuclei"]] == [1, 0, 1]).all(axis=None)
    assert (cells["center"] == "nucleus").all()
    assert cells["n_counts"].tolist() == found.counts.sum(axis=1).tolist()
    assert found.summary["unit"] == "he_nuclei"
    assert found.summary["n_matched"] == found.summary["n_he_nuclei"] == 9
    assert found.summary["match"] is None


@pytest.mark.usefixtures("small_tiles")
def test_withdrawn_donors_by_polygons(tmp_path: Path) -> None:
    section = {
        "seed": 3, "n_nuclei": 12, "expansion_um": 5.0, "angle_rad": 0.0, "mirror": False,
        "field": False,
    }  # fmt: skip
    path, he, _ = made(tmp_path, section)
    middle = float(np.mean(he.nuclei["x_px"]))
    sides = {"D1": shapely.box(-1e4, -1e4, middle, 1e4), "D2": shapely.box(middle, -1e4, 1e4, 1e4)}
    features = [
        {"type": "Feature", "properties": {"donor": d}, "geometry": shapely.geometry.mapping(side)}
        for d, side in sides.items()
    ]
    donors = tmp_path / "donors.geojson"
    donors.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    with open_xenium(path) as run:
        whole = Counted(tmp_path / "whole", run, he)
        withdrawal = Withdrawal(donors, ("D2",), he.px_from_xenium_um, 0)
        without = Counted(tmp_path / "without", run, he, withdrawal=withdrawal)
    stays = np.asarray(he.nuclei["x_px"]) < middle
    assert 0 < stays.sum() < 12
    pd.testing.assert_frame_equal(without.cells, whole.cells[stays].reset_index(drop=True))
    np.testing.assert_array_equal(without.counts, whole.counts[stays])
    gone = whole.counts[~stays].sum()
    qc, of_all = without.summary["counts"], whole.summary["counts"]
    assert of_all["n_counts"] - qc["n_counts"] == gone > 0
    assert qc["n_unassigned"] == of_all["n_unassigned"]


def test_a_run_without_h_and_e_nuclei_is_refused(tmp_path: Path) -> None:
    he = HeSide(he_table(np.zeros(0, object), 1.0), Warp(Affine.scale(1.0)), 1.0, pd.Series())
    with (
        open_xenium(Bundle(tmp_path / "outs").write()) as run,
        pytest.raises(BadInput, match="at least one, to count for"),
    ):
        Counted(tmp_path / "found", run, he)


@pytest.mark.usefixtures("small_tiles")
def test_a_registration_that_folds_over_is_refused(tmp_path: Path) -> None:
    shift = 40 * np.random.default_rng(1).normal(size=(12, 12, 2))
    folded = Warp(Affine.scale(1.0), (-20.0, -20.0), 5.0, shift)
    outlines = np.array([shapely.box(12, 12, 18, 18)], object)
    he = HeSide(he_table(outlines, 1.0), folded, 1.0, pd.Series(dtype=float))
    with (
        open_xenium(Bundle(tmp_path / "outs").write()) as run,
        pytest.raises(BadInput, match="folds over"),
    ):
        Counted(tmp_path / "found", run, he)


def test_a_nucleus_has_the_error_of_the_cell_next_to_it() -> None:
    places = pd.DataFrame(
        {
            "cell_id": ["a", "b", "c"], "x_px": [0.0, 100, np.nan], "y_px": [0.0, 0, np.nan],
            "error_um": [0.5, np.nan, 3.0],
        }
    )  # fmt: skip
    he = pa.table({"nucleus_id": [4, 7], "x_px": [10.0, 95.0], "y_px": [5.0, -300.0]})
    errors = he_cell_errors(he, places)
    assert errors.index.tolist() == ["he-4", "he-7"]
    np.testing.assert_array_equal(errors.to_numpy(), [0.5, np.nan])
    assert he_cell_errors(he, places[:0]).isna().all()


# ---------------------------------------------------------------- the simulator's truth


@pytest.fixture(scope="module")
def truth(simulated: Path) -> tuple[HeSide, npt.NDArray[np.object_], pd.Series]:
    """The nuclei of the slide as they are, in pixels and in µm, and the cell of each."""
    table = pq.read_table(simulated / "truth" / "he_nuclei.parquet").to_pandas()
    transform = json.loads((simulated / "truth" / "transform.json").read_text())
    um_from_px = Affine.of(transform["xenium_um_from_he_px"])
    mpp = float(np.sqrt(um_from_px.area_scale))
    outlines_px = np.array(
        [shapely.Polygon(np.stack([x, y], axis=1))
         for x, y in zip(table["outline_x_px"], table["outline_y_px"], strict=True)], object
    )  # fmt: skip
    he = HeSide(he_table(outlines_px, mpp), Warp(um_from_px.inverse), mpp, pd.Series(dtype=float))
    return he, shapely.transform(outlines_px, um_from_px), table["cell_id"]


@pytest.mark.parametrize("expansion_um", [0.0, 5.0])
def test_simulated_nuclei_have_the_transcripts_that_lie_in_them(
    expansion_um: float, simulated: Path, truth: Any, tmp_path: Path
) -> None:
    he, outlines_um, cell_id = truth
    with open_xenium(simulated / "outs") as run:
        found = Counted(tmp_path / "found", run, he, expansion_um=expansion_um)
        least, most = bounds_by_polygons(run, outlines_um, expansion_um)
        cells, matrix = run.read_cells(), run.read_matrix()
    assert (least <= found.counts).all()
    assert (found.counts <= most).all()
    assert least.sum() > 0.7 * found.counts.sum() > 1000
    # Most of what a nucleus has, grown by as much, is what the instrument gave to its cell.
    assert matrix is not None
    known = cell_id.notna().to_numpy()
    row = pd.Index(cells["cell_id"]).get_indexer(cell_id[known])
    shared = np.minimum(found.counts[known], matrix[row].toarray()).sum()
    assert shared > 0.8 * found.counts[known].sum()


# ---------------------------------------------------------------- a real store


@pytest.mark.usefixtures("small_tiles")
def test_real_nuclei_grown_by_5_um_agree_with_the_instrument(
    shared_data: Path, tmp_path: Path
) -> None:
    """The store's own cells are its nuclei grown by 5 µm."""
    with open_xenium(shared_data / "xenium" / "mouse_ileum_tiny_nucleus_expansion.zarr") as run:
        nuclei = run.read_nuclei()
        outlines = nuclei["polygon"].to_numpy()
        he = HeSide(he_table(outlines, 1.0), Warp(Affine.scale(1.0)), 1.0, pd.Series(dtype=float))
        found = Counted(tmp_path / "found", run, he)
        own = counted(run)[nuclei["cell_index"]]
        areas = run.read_cells()["cell_area_um2"].to_numpy()[nuclei["cell_index"]]
    assert own.sum() == 433
    print(found.counts.sum(), np.minimum(found.counts, own).sum())
    assert np.minimum(found.counts, own).sum() >= 420
    assert found.counts.sum() <= 1.05 * 433
    np.testing.assert_allclose(found.cells["cell_area_um2"], areas, rtol=0.1)
