"""Blocks, ownership, outlines and what is written, on simulated and real slides."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from PIL import Image

from pairing.simulate.tile import labelled_tile
from pairing.slide import open_slide
from segmentation.blocks import Block, plan_blocks
from segmentation.config import SegmentationConfig
from segmentation.outlines import NUCLEI_SCHEMA, nuclei_table
from segmentation.pictures import nuclei_geojson
from segmentation.segment import collect, segment, segment_slide_to
from shards.errors import BadInput

MPP = 0.25
SIZE_PX = 1100
ONE_BLOCK = SegmentationConfig(block_px=1024)
SMALL_BLOCKS = SegmentationConfig(block_px=192)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated picture, 275 µm wide, without a pixel size of its own."""
    path = tmp_path_factory.mktemp("bilder mit ä") / "he.png"
    Image.fromarray(labelled_tile(900_010, SIZE_PX, MPP)[0]).save(path)
    return path


@pytest.fixture(scope="module")
def nuclei(picture: Path) -> pa.Table:
    return segment(picture, SMALL_BLOCKS, mpp=MPP, device="cpu")


def polygons_of(table: pa.Table) -> np.ndarray:
    return shapely.from_wkb(table["polygon_px"].to_pylist())


def backwards(
    fn: Callable[[Block], tuple[int, pa.Table]], items: Iterable[Block]
) -> list[tuple[int, pa.Table]]:
    return [fn(item) for item in reversed(list(items))]


def test_table_is_sound(nuclei: pa.Table) -> None:
    assert nuclei.schema == NUCLEI_SCHEMA
    assert nuclei["nucleus_id"].to_pylist() == list(range(1, len(nuclei) + 1))
    polygons = polygons_of(nuclei)
    assert shapely.is_valid(polygons).all()
    assert (shapely.get_type_id(polygons) == shapely.GeometryType.POLYGON).all()
    area_um2 = nuclei["area_um2"].to_numpy()
    np.testing.assert_allclose(shapely.area(polygons) * MPP**2, area_um2, rtol=1e-9)
    assert 15 < np.median(area_um2) < 80
    for column in ("score", "eccentricity"):
        assert (nuclei[column].to_numpy() >= 0).all()
        assert (nuclei[column].to_numpy() <= 1).all()
    centroid = shapely.get_coordinates(shapely.centroid(polygons))
    xy = np.column_stack([nuclei["x_px"].to_numpy(), nuclei["y_px"].to_numpy()])
    # Half a pixel of the network is one of the slide; largest pieces may lie a little aside.
    assert np.median(np.linalg.norm(centroid - xy, axis=1)) < 0.5
    assert xy.min() > 0
    assert xy.max() < SIZE_PX


def test_nuclei_lie_where_the_truth_is(nuclei: pa.Table) -> None:
    _, labels = labelled_tile(900_010, SIZE_PX, MPP)
    x = nuclei["x_px"].to_numpy().astype(int)
    y = nuclei["y_px"].to_numpy().astype(int)
    assert (labels[y, x] > 0).mean() > 0.85


def test_a_rerun_gives_the_same_table_in_any_order_of_blocks(
    picture: Path, nuclei: pa.Table
) -> None:
    again = segment(picture, SMALL_BLOCKS, mpp=MPP, device="cpu", map_blocks=backwards)
    assert again.equals(nuclei)


def test_seams_neither_lose_nor_double_nuclei(picture: Path, nuclei: pa.Table) -> None:
    whole = segment(picture, ONE_BLOCK, mpp=MPP, device="cpu")
    assert len(whole) > 200
    assert abs(len(nuclei) - len(whole)) <= 0.01 * len(whole)
    polygons = polygons_of(nuclei)
    first, second = shapely.STRtree(polygons).query(polygons, predicate="intersects")
    first, second = first[first < second], second[first < second]
    shared = shapely.area(shapely.intersection(polygons[first], polygons[second]))
    union = shapely.area(polygons[first]) + shapely.area(polygons[second]) - shared
    assert (shared <= 0.5 * union).all()


def test_geojson_holds_every_outline(nuclei: pa.Table) -> None:
    collection = json.loads(nuclei_geojson(nuclei))
    assert collection["type"] == "FeatureCollection"
    assert len(collection["features"]) == len(nuclei)
    measured = [feature["properties"]["measurements"] for feature in collection["features"]]
    assert [m["nucleus_id"] for m in measured] == nuclei["nucleus_id"].to_pylist()
    for feature, polygon in zip(collection["features"], polygons_of(nuclei), strict=True):
        assert feature["properties"]["objectType"] == "detection"
        read = shapely.geometry.shape(feature["geometry"])
        assert read.is_valid
        assert read.area == pytest.approx(polygon.area, rel=0.02)


def test_segment_writes_table_geojson_and_picture(picture: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.jpg"
    with Image.open(picture) as whole:
        whole.crop((0, 0, 400, 300)).save(small, quality=95)
    out = tmp_path / "out"
    n_nuclei = segment_slide_to(out, small, mpp=MPP, device="cpu")
    assert pq.read_table(out / "nuclei.parquet").num_rows == n_nuclei > 20
    assert len(json.loads((out / "nuclei.geojson").read_text())["features"]) == n_nuclei
    with Image.open(out / "overview.png") as overview:
        assert overview.width > 1200


def test_a_picture_without_a_pixel_size_is_refused(picture: Path) -> None:
    with pytest.raises(BadInput, match="--mpp"):
        segment(picture, ONE_BLOCK, device="cpu")


def test_outline_of_a_known_mask() -> None:
    labels = np.zeros((64, 64), np.int32)
    labels[20:30, 30:50] = 7  # rows 20 … 29, columns 30 … 49
    labels[20:30, 0:8] = 9  # its centroid is in the halo
    block = Block(0, core=(100, 200, 132, 232), read=(84, 184, 148, 248))
    logit = np.where(labels > 0, np.log(4.0), -5).astype(np.float32)
    table = nuclei_table(labels, logit, block, mpp=0.5, slide_mpp=0.25)
    assert len(table) == 1
    row = table.to_pylist()[0]
    # Level-0 pixels are half as wide as the network's.
    assert (row["x_px"], row["y_px"]) == (2 * (84 + 40.0), 2 * (184 + 25.0))
    polygon = shapely.from_wkb(row["polygon_px"])
    assert polygon.bounds == pytest.approx((2 * 114, 2 * 204, 2 * 134, 2 * 214))
    assert row["area_um2"] == pytest.approx(200 * 0.25, rel=0.01)
    assert row["score"] == pytest.approx(0.8, abs=1e-6)


def test_outline_of_a_disc_has_the_area_of_its_mask() -> None:
    y, x = np.mgrid[:64, :64] + 0.5
    labels = ((x - 31) ** 2 + (y - 33) ** 2 < 8**2).astype(np.int32)
    block = Block(0, core=(0, 0, 64, 64), read=(0, 0, 64, 64))
    table = nuclei_table(labels, labels.astype(np.float32), block, mpp=1.0, slide_mpp=1.0)
    assert table["area_um2"][0].as_py() == pytest.approx(labels.sum(), rel=0.03)


def test_blocks_cover_tissue_and_leave_glass_out(tmp_path: Path) -> None:
    rgb = np.full((1000, 1500, 3), 243, np.uint8)
    rgb[700:900, 1100:1400] = (180, 90, 160)
    path = tmp_path / "slide.png"
    Image.fromarray(rgb).save(path)
    with open_slide(path, mpp=0.5) as slide:
        blocks = plan_blocks(slide, 0.5, 256, 64)
        assert plan_blocks(slide, 0.5, 2048, 64) == [
            Block(0, (0, 0, 1504, 1008), (-64, -64, 1568, 1072))
        ]
    assert [block.index for block in blocks] == list(range(len(blocks)))
    assert (0, 0, 256, 256) not in [block.core for block in blocks]
    covered = np.zeros((1008, 1504), int)
    for block in blocks:
        x0, y0, x1, y1 = block.core
        covered[y0:y1, x0:x1] += 1
    assert covered.max() == 1
    assert covered[700:900, 1100:1400].all()


@pytest.mark.parametrize("size_px", [256, 257, 263, 270, 300])
def test_tissue_at_the_border_is_covered(tmp_path: Path, size_px: int) -> None:
    path = tmp_path / "tissue.png"
    Image.fromarray(np.full((300, size_px, 3), (180, 90, 160), np.uint8)).save(path)
    with open_slide(path, mpp=0.5) as slide:
        blocks = plan_blocks(slide, 0.5, 128, 64)
    assert len(blocks) == 3 * -(-size_px // 128)
    assert size_px <= max(block.core[2] for block in blocks) < size_px + 16


def test_a_slide_of_glass_has_no_blocks_and_no_nuclei(tmp_path: Path) -> None:
    path = tmp_path / "glass.png"
    Image.fromarray(np.full((300, 300, 3), 240, np.uint8)).save(path)
    table = segment(path, ONE_BLOCK, mpp=0.5, device="cpu")
    assert table.schema == NUCLEI_SCHEMA
    assert len(table) == 0
    assert json.loads(nuclei_geojson(table))["features"] == []


def test_collect_keeps_a_nucleus_that_two_blocks_own_once() -> None:
    def table_of(*squares: tuple[float, float]) -> pa.Table:
        rows = [
            {
                "nucleus_id": i,
                "x_px": x + 5,
                "y_px": y + 5,
                "area_um2": 100.0,
                "eccentricity": 0.0,
                "score": 0.9,
                "polygon_px": shapely.to_wkb(shapely.box(x, y, x + 10, y + 10)),
            }
            for i, (x, y) in enumerate(squares, start=1)
        ]
        return pa.Table.from_pylist(rows, schema=NUCLEI_SCHEMA)

    left, right = table_of((0, 0), (90, 0)), table_of((91, 1), (97, 0), (200, 0))
    found = collect([(1, right), (0, left)])
    assert found["nucleus_id"].to_pylist() == [1, 2, 3, 4]
    assert found["x_px"].to_pylist() == [5, 95, 102, 205]


def test_a_real_slide_region(shared_data: Path, tmp_path: Path) -> None:
    with open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        mpp = slide.mpp
        Image.fromarray(slide.read((400, 2000, 900, 2500))).save(tmp_path / "region.png")
    table = segment(tmp_path / "region.png", ONE_BLOCK, mpp=mpp, device="cpu")
    assert 60 < len(table) < 400
    assert shapely.is_valid(polygons_of(table)).all()


@pytest.mark.slow
def test_a_real_slide(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "slides" / "CMU-1-Small-Region.svs"
    n_nuclei = segment_slide_to(tmp_path, path, device="cpu")
    assert 800 < n_nuclei < 4000
    json.loads((tmp_path / "nuclei.geojson").read_text())
