"""What a segmentation finds and writes, what it goes on from, and what it says of bad slides."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from skimage.measure import label

from flows.cluster import Runtime
from flows.info import describe_path
from flows.segment import segment_slide
from pairing.simulate.tile import labelled_tile
from pairing.slide import open_slide
from segmentation.blocks import plan_blocks
from segmentation.collect import read_masks
from segmentation.config import SegmentationConfig
from segmentation.maps import InTurn
from segmentation.outlines import NUCLEI_SCHEMA, outlines_of
from segmentation.segment import Segmented, plan_slide, run_windows
from segmentation.windows import GroupFacts, WindowGrid
from shards.artifact import Items
from shards.errors import BadInput
from tests.pairing.slides import spoil
from tests.segmentation.slides import run

MPP, SIZE_PX, SEED = 0.25, 1000, 900_010


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated picture, 250 µm wide, at twice the network's pixels."""
    path = tmp_path_factory.mktemp("bilder mit ä") / "he.png"
    Image.fromarray(labelled_tile(SEED, SIZE_PX, MPP)[0]).save(path)
    return path


@pytest.fixture(scope="module")
def segmented(
    picture: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Segmented, pa.Table]:
    folder = tmp_path_factory.mktemp("nuclei")
    done, table, _ = run(folder, picture, mpp=MPP, block_px=256)
    return folder, done, table


def polygons_of(table: pa.Table) -> np.ndarray:
    return shapely.from_wkb(table["polygon_px"].to_pylist())


# ---------------------------------------------------------------- the table


def test_the_table_is_sound(segmented: tuple[Path, Segmented, pa.Table]) -> None:
    _, done, nuclei = segmented
    assert nuclei.schema == NUCLEI_SCHEMA
    assert len(nuclei) == done.facts.n_nuclei > 200
    assert nuclei["nucleus_id"].to_pylist() == list(range(1, len(nuclei) + 1))
    y_px, x_px = nuclei["y_px"].to_numpy(), nuclei["x_px"].to_numpy()
    assert (np.diff(y_px) >= 0).all()
    assert min(x_px.min(), y_px.min()) > 0
    assert max(x_px.max(), y_px.max()) < SIZE_PX
    polygons = polygons_of(nuclei)
    assert shapely.is_valid(polygons).all()
    assert (shapely.get_type_id(polygons) == shapely.GeometryType.POLYGON).all()
    area_um2 = nuclei["area_um2"].to_numpy()
    np.testing.assert_allclose(shapely.area(polygons) * MPP**2, area_um2, rtol=1e-9)
    assert 15 < np.median(area_um2) < 80
    for column in ("score", "eccentricity"):
        assert (nuclei[column].to_numpy() >= 0).all()
        assert (nuclei[column].to_numpy() <= 1).all()
    assert (nuclei["haematoxylin"].to_numpy() > 0).mean() > 0.99
    centroid = shapely.get_coordinates(shapely.centroid(polygons))
    # Half a pixel of the network is one of the slide.
    assert np.median(np.linalg.norm(centroid - np.column_stack([x_px, y_px]), axis=1)) < 0.5


def test_nuclei_lie_where_the_truth_is(segmented: tuple[Path, Segmented, pa.Table]) -> None:
    _, labels = labelled_tile(SEED, SIZE_PX, MPP)
    nuclei = segmented[2]
    x, y = (nuclei[name].to_numpy().astype(int) for name in ("x_px", "y_px"))
    assert (labels[y, x] > 0).mean() > 0.85


def test_figures_are_those_of_the_masks(segmented: tuple[Path, Segmented, pa.Table]) -> None:
    """By scikit-image's own measures, of every mask."""
    from skimage.measure import regionprops

    folder, done, nuclei = segmented
    rows = {row["nucleus_id"]: row for row in nuclei.to_pylist()}
    n_masks = 0
    for block in done.blocks:
        for mask in read_masks(folder / "kept", block):
            row, (measured,) = rows[mask.nucleus_id], regionprops(mask.mask_YX.astype(int))
            y, x = measured.centroid
            assert row["x_px"] == pytest.approx(2 * (x + mask.left_px + 0.5))
            assert row["y_px"] == pytest.approx(2 * (y + mask.top_px + 0.5))
            moments = measured.moments_central / measured.area
            # A pixel is a square, not a point: 1 / 12 more along each axis.
            spread = np.array([[moments[2, 0], moments[1, 1]], [moments[1, 1], moments[0, 2]]])
            small, large = np.linalg.eigvalsh(spread + np.eye(2) / 12)
            assert row["eccentricity"] == pytest.approx(np.sqrt(1 - small / large), abs=1e-6)
            outline = shapely.from_wkb(row["polygon_px"])
            filled = ndimage.binary_fill_holes(mask.mask_YX, np.ones((3, 3)))
            ys, xs = (2 * v for v in np.nonzero(filled))
            left, top = 2 * mask.left_px + xs, 2 * mask.top_px + ys
            pixels = shapely.union_all(shapely.box(left, top, left + 2, top + 2))
            # 0.25 pixels of the network are half a pixel of the slide.
            points = shapely.points(shapely.get_coordinates(shapely.segmentize(outline, 0.1)))
            assert shapely.distance(points, pixels.boundary).max() <= 0.5 + 1e-9
            n_masks += 1
    assert n_masks == len(nuclei)


def test_edges_are_flagged(segmented: tuple[Path, Segmented, pa.Table]) -> None:
    nuclei = segmented[2]
    bounds = shapely.bounds(polygons_of(nuclei))
    at_edge = (bounds[:, :2] < 1).any(axis=1) | (bounds[:, 2:] > SIZE_PX - 1).any(axis=1)
    assert at_edge.sum() > 5
    assert [f == ["edge"] for f in nuclei["flags"].to_pylist()] == at_edge.tolist()


masks = st.integers(0, 100_000).map(
    lambda seed: ndimage.gaussian_filter(np.random.default_rng(seed).random((24, 24)), 2) > 0.5
)


@given(masks)
def test_an_outline_keeps_within_a_quarter_of_a_pixel_of_its_mask(mask: np.ndarray) -> None:
    pieces = label(mask, connectivity=1)
    if not pieces.any():
        return
    piece = pieces == np.bincount(pieces[pieces > 0]).argmax()
    (outline,) = outlines_of([piece], np.array([[7, -3]]))
    assert outline.is_valid
    # Pixels that touch at a corner don't close a hole.
    filled = ndimage.binary_fill_holes(piece, np.ones((3, 3)))
    ys, xs = np.nonzero(filled)
    pixels = shapely.union_all(shapely.box(xs + 7, ys - 3, xs + 8, ys - 2))
    points = shapely.points(shapely.get_coordinates(shapely.segmentize(outline, 0.05)))
    assert shapely.distance(points, pixels.boundary).max() <= 0.25 + 1e-9
    # Corners are cut inside and out: an eighth of a pixel each.
    assert abs(outline.area - filled.sum()) <= 0.125 * len(shapely.get_coordinates(outline))


# ---------------------------------------------------------------- blocks and what is kept


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(50, 1500))
def test_blocks_cover_the_slide_once(width: int, height: int, block_px: int) -> None:
    grid = WindowGrid.over((width, height), 0.5, 512, 64)
    cores = [block.core for block in plan_blocks(grid, block_px)]
    assert sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in cores) == width * height
    assert len({block.name for block in plan_blocks(grid, block_px)}) == len(cores)


class Watched(InTurn):
    """Notes what it is given, and stops after `n` of all."""

    def __init__(self, n: int | None = None) -> None:
        self.n = n
        self.done: list[Any] = []

    def __call__(self, fn: Callable[[Any], Any], items: Items[Any], /) -> Iterator[Any]:
        for item in items:
            if len(self.done) == self.n:
                raise KeyboardInterrupt
            if item != "cpu":  # a question for the device
                self.done.append(item)
            yield fn(item)

    on_gpu = __call__


def test_it_goes_on_with_what_is_missing(
    picture: Path, segmented: tuple[Path, Segmented, pa.Table], tmp_path: Path
) -> None:
    stopped, went_on = Watched(3), Watched()
    how = {"mpp": MPP, "block_px": 256}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, picture, maps=stopped, **how)
    assert not (tmp_path / "nuclei.parquet").exists()
    _, table, _ = run(tmp_path, picture, maps=went_on, **how)
    assert table.equals(segmented[2])
    assert len(stopped.done) == 3
    assert not set(map(str, stopped.done)) & set(map(str, went_on.done))
    nothing_left = Watched()
    run(tmp_path, picture, maps=nothing_left, **how)
    assert nothing_left.done == []


def test_windows_of_another_kind_of_device_are_run_again(
    picture: Path, segmented: tuple[Path, Segmented, pa.Table], tmp_path: Path
) -> None:
    how = {"mpp": MPP, "block_px": 256}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, picture, maps=Watched(3), **how)  # the windows, and two blocks
    kept = tmp_path / "kept"
    (facts,) = kept.glob("windows-*.json")
    facts.write_text(GroupFacts(device="cuda bfloat16", damage=()).model_dump_json())
    outputs = np.load(facts.with_suffix(".npy"))
    np.save(facts.with_suffix(".npy"), np.zeros_like(outputs))
    watched = Watched()
    _, table, _ = run(tmp_path, picture, maps=watched, **how)
    assert table.equals(segmented[2])
    assert len(watched.done) == 1 + 4  # the group, and all blocks


def test_windows_are_run_again_for_blocks_of_another_size(
    picture: Path, segmented: tuple[Path, Segmented, pa.Table], tmp_path: Path
) -> None:
    """Their outputs are gone with the blocks that waited for them."""
    run(tmp_path, picture, mpp=MPP, block_px=256)
    assert not list((tmp_path / "kept").glob("windows-*.npy"))
    _, table, _ = run(tmp_path, picture, mpp=MPP, block_px=300)
    assert table.equals(segmented[2])


def test_workers_of_two_kinds_are_refused(picture: Path, tmp_path: Path) -> None:
    class Mixed(InTurn):
        def on_gpu(self, fn: Callable[[Any], Any], items: Items[Any], /) -> Iterable[Any]:
            for result in map(fn, items):
                if isinstance(result, list):
                    yield [(g, f.model_copy(update={"device": "cuda bfloat16"})) for g, f in result]
                else:
                    yield result

    with pytest.raises(BadInput, match=r"one kind of device[\s\S]*cpu float32, cuda bfloat16"):
        run(tmp_path, picture, mpp=MPP, maps=Mixed())


def test_other_weights_on_a_worker_are_refused(picture: Path, tmp_path: Path) -> None:
    plan = plan_slide(tmp_path, picture, SegmentationConfig(), MPP, "cpu")
    elsewhere = replace(plan, weights_sha256="0" * 64)
    with pytest.raises(BadInput, match="the weights of the planner"):
        run_windows(elsewhere, tuple(plan.grid.groups()))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- slides of every kind


def test_a_slide_of_glass_has_no_nuclei(tmp_path: Path) -> None:
    slide = tmp_path / "glass.png"
    Image.fromarray(np.full((600, 900, 3), 243, np.uint8)).save(slide)
    done, table, _ = run(tmp_path, slide)
    assert table.schema == NUCLEI_SCHEMA
    assert len(table) == done.facts.n_nuclei == done.facts.n_windows == 0
    out = tmp_path / "out"
    runtime = Runtime(workers=1, device="cpu")
    how: dict[str, Any] = {"mpp": MPP, "model": "compact", "labels": True, "runtime": runtime}
    assert segment_slide(slide, out, **how) == 0
    assert json.loads((out / "nuclei.geojson").read_text())["features"] == []
    assert not tifffile.imread(out / "labels.ome.tif").any()
    assert "<b>0</b>" in (out / "index.html").read_text()


@pytest.mark.parametrize("shape", [(700, 1), (1, 700), (1, 1)])
def test_a_slide_of_one_pixel_across_is_segmented(tmp_path: Path, shape: tuple[int, int]) -> None:
    slide = tmp_path / "thin.png"
    Image.fromarray(np.full((*shape, 3), (150, 80, 160), np.uint8)).save(slide)
    _, table, _ = run(tmp_path, slide)
    assert table.schema == NUCLEI_SCHEMA


def test_a_picture_without_a_pixel_size_is_refused(picture: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--mpp"):
        run(tmp_path, picture, mpp=None)


def test_nuclei_at_damaged_tiles_are_flagged(tmp_path: Path) -> None:
    rgb, _ = labelled_tile(900_011, 768, 0.5)
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    path = tmp_path / "he.ome.tif"
    how: dict[str, Any] = {"tile": (128, 128), "compression": "deflate", "photometric": "rgb"}
    tifffile.imwrite(path, rgb, ome=True, metadata={"axes": "YXS", **sizes}, **how)
    _, sound, _ = run(tmp_path / "sound", path, mpp=None)
    spoil(path, 2 * 6 + 3)  # row 2, column 3
    done, table, _ = run(tmp_path / "damaged", path, mpp=None)
    box = (384, 256, 512, 384)
    assert {d.kind for d in done.facts.damage} == {"undecodable"}
    flagged = np.array([("damaged_tile" in f) for f in table["flags"].to_pylist()])
    near = shapely.dwithin(polygons_of(table), shapely.box(*box), 4)
    assert np.array_equal(flagged, near)
    assert 0 < flagged.sum() < 60
    inside = shapely.within(polygons_of(sound), shapely.box(*box)).sum()
    assert inside > 10
    assert shapely.within(polygons_of(table), shapely.box(*box).buffer(-4)).sum() == 0
    assert not any("damaged_tile" in f for f in sound["flags"].to_pylist())


# ---------------------------------------------------------------- the command


def test_segment_writes_table_geojson_labels_overview_and_page(
    picture: Path, segmented: tuple[Path, Segmented, pa.Table], tmp_path: Path
) -> None:
    out = tmp_path / "out ä"
    n_nuclei = segment_slide(
        picture, out, mpp=MPP, model="compact", labels=True,
        runtime=Runtime(workers=1, device="cpu"),
    )  # fmt: skip
    nuclei = pq.read_table(out / "nuclei.parquet")
    assert nuclei.equals(segmented[2])
    assert {p.name for p in out.iterdir()} == {
        "nuclei.parquet", "segmentation.json", "nuclei.geojson", "labels.zarr", "labels.ome.tif",
        "overview.png", "index.html", ".made-from",
    }  # fmt: skip

    collection = json.loads((out / "nuclei.geojson").read_text())
    assert collection["type"] == "FeatureCollection"
    measured = [feature["properties"]["measurements"] for feature in collection["features"]]
    assert [m["nucleus_id"] for m in measured] == list(range(1, n_nuclei + 1))
    for feature, polygon in zip(collection["features"], polygons_of(nuclei), strict=True):
        assert feature["properties"]["objectType"] == "detection"
        read = shapely.geometry.shape(feature["geometry"])
        assert read.is_valid
        assert read.area == pytest.approx(polygon.area, rel=0.02)

    group = zarr.open_group(out / "labels.zarr", mode="r")
    (multiscale,) = group.attrs["ome"]["multiscales"]
    scale = multiscale["datasets"][0]["coordinateTransformations"][0]["scale"]
    assert scale == [0.5, 0.5]
    assert group["0"].metadata.dimension_names == ("y", "x")
    image = np.asarray(group["0"])
    assert image.shape == (500, 500)
    ids, n_px = np.unique(image[image > 0], return_counts=True)
    assert ids.tolist() == nuclei["nucleus_id"].to_pylist()
    area_um2 = nuclei["area_um2"].to_numpy()
    # Outlines cut corners, and fill holes.
    np.testing.assert_allclose(n_px * 0.25, area_um2, rtol=0.1, atol=2)
    x, y = (nuclei[name].to_numpy() / 2 for name in ("x_px", "y_px"))
    assert (image[y.astype(int), x.astype(int)] == ids).mean() > 0.97

    with tifffile.TiffFile(out / "labels.ome.tif") as tiff:
        assert np.array_equal(tiff.asarray(), image)
        assert 'PhysicalSizeX="0.5"' in str(tiff.ome_metadata)
    with Image.open(out / "overview.png") as overview:
        assert overview.width > 1200
    page = (out / "index.html").read_text()
    assert f"<b>{n_nuclei:,}</b>" in page
    assert "nuclei per mm² looked at" in page


@pytest.mark.slow
def test_the_label_image_has_a_pyramid_across_blocks_and_chunks(tmp_path: Path) -> None:
    """A slide of several chunks: each level is every second pixel of the one before."""
    rgb, _ = labelled_tile(900_012, 300, 0.5)
    slide = tmp_path / "he.png"
    Image.fromarray(np.tile(rgb, (2, 8, 1))).save(slide)
    out = tmp_path / "out"
    segment_slide(
        slide, out, mpp=0.5, model="compact", labels=False, runtime=Runtime(workers=2, device="cpu")
    )
    group = zarr.open_group(out / "labels.zarr", mode="r")
    levels = [np.asarray(group[str(i)]) for i in range(len(list(group.array_keys())))]
    assert [level.shape for level in levels] == [(600, 2400), (300, 1200), (150, 600)]
    for fine, coarse in pairwise(levels):
        assert np.array_equal(fine[::2, ::2], coarse)
    nuclei = pq.read_table(out / "nuclei.parquet")
    assert np.unique(levels[0][levels[0] > 0]).tolist() == nuclei["nucleus_id"].to_pylist()


def test_a_finished_folder_is_neither_made_again_nor_given_to_another_slide(tmp_path: Path) -> None:
    runtime = Runtime(workers=1, device="cpu")
    how = partial(segment_slide, mpp=0.5, model="compact", runtime=runtime)
    pictures = []
    for seed in (900_013, 900_014):
        pictures.append(tmp_path / f"{seed}.png")
        Image.fromarray(labelled_tile(seed, 200, 0.5)[0]).save(pictures[-1])
    out = tmp_path / "out"
    n_nuclei = how(pictures[0], out, labels=False)
    made = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    told = describe_path(out)
    assert (told["kind"], told["n_nuclei"], told["slide_mpp"]) == ("nuclei", n_nuclei, 0.5)
    assert how(pictures[0], out, labels=True) == n_nuclei
    assert {p: p.stat().st_mtime_ns for p in made} == made
    assert np.array_equal(
        tifffile.imread(out / "labels.ome.tif"),
        np.asarray(zarr.open_array(out / "labels.zarr" / "0", mode="r")),
    )
    with pytest.raises(BadInput, match="give another --out"):
        how(pictures[1], out, labels=False)
    with pytest.raises(BadInput, match="give another --out"):
        segment_slide(pictures[0], out, mpp=0.4, model="compact", labels=False, runtime=runtime)
    assert {p: p.stat().st_mtime_ns for p in made} == made


def test_a_pixel_size_that_no_slide_has_is_refused(picture: Path, tmp_path: Path) -> None:
    for mpp in (250.0, 0.01):
        with pytest.raises(BadInput, match=r"0\.05 to 2 µm a pixel"):
            run(tmp_path, picture, mpp=mpp)


def test_a_file_in_place_of_the_folder_is_refused(picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("")
    with pytest.raises(BadInput, match="another --out"):
        segment_slide(
            picture, out, mpp=MPP, model="compact", labels=False, runtime=Runtime(workers=1)
        )


def test_a_real_slide_region(shared_data: Path, tmp_path: Path) -> None:
    with open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        mpp = slide.mpp
        Image.fromarray(slide.read((400, 2000, 900, 2500))).save(tmp_path / "region.png")
    _, table, _ = run(tmp_path, tmp_path / "region.png", mpp=mpp)
    assert 60 < len(table) < 400
    assert shapely.is_valid(polygons_of(table)).all()


@pytest.mark.slow
def test_a_real_slide(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "slides" / "CMU-1-Small-Region.svs"
    runtime = Runtime(workers=2, device="cpu")
    n_nuclei = segment_slide(
        path, tmp_path, mpp=None, model="compact", labels=True, runtime=runtime
    )
    assert 800 < n_nuclei < 4000
    json.loads((tmp_path / "nuclei.geojson").read_text())
