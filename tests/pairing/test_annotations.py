"""Donors and labels of cells by file: points in polygons as brute force says, words for faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from pairing.annotations import area_of, donors_of_cells, labels_of_cells, read_regions
from shards.errors import BadInput

IDS = ["1", "2", "aaab-1", "3"]
CENTRES_PX = np.array([[5.0, 5.0], [15.0, 5.0], [25.0, 5.0], [99.0, 99.0]])


def feature(donor: str, geometry: shapely.Geometry) -> dict[str, Any]:
    return {
        "type": "Feature",
        "properties": {"donor": donor},
        "geometry": shapely.geometry.mapping(geometry),
    }


def write(folder: Path, *features: Any, name: str = "cores.geojson") -> Path:
    path = folder / name
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def write_text(folder: Path, text: str, name: str = "cells.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def donors(path: Path) -> list[str | None]:
    return donors_of_cells(path, IDS, CENTRES_PX)[0].tolist()


def test_a_cell_has_the_donor_of_the_polygon_that_its_centre_is_in(tmp_path: Path) -> None:
    two_cores = shapely.MultiPolygon([shapely.box(0, 0, 10, 10), shapely.box(20, 0, 30, 10)])
    path = write(
        tmp_path,
        feature("B", two_cores),
        feature("A ü", shapely.box(10, 0, 20, 10)),
        feature("empty core", shapely.box(50, 50, 60, 60)),
    )
    found, named = donors_of_cells(path, IDS, CENTRES_PX)
    assert found.tolist() == ["B", "A ü", "B", None]
    assert named == ("A ü", "B", "empty core")


@pytest.mark.parametrize(
    ("properties", "donor"),
    [
        ({"donor": "D", "name": "N", "classification": {"name": "C"}}, "D"),
        ({"name": "N", "classification": {"name": "C"}}, "N"),
        ({"name": None, "classification": {"name": "C", "color": [1, 2, 3]}}, "C"),
        ({"donor": " ", "name": " N "}, "N"),
        ({"donor": 7}, "7"),
    ],
)
def test_the_donor_is_the_first_property_that_is_given(
    tmp_path: Path, properties: dict[str, Any], donor: str
) -> None:
    core = feature("", shapely.box(0, 0, 10, 10)) | {"properties": properties}
    assert [name for name, _ in read_regions(write(tmp_path, core))] == [donor]


def test_features_without_a_collection_are_read(tmp_path: Path) -> None:
    core = feature("A", shapely.box(0, 0, 10, 10))
    for document in (core, [core]):
        path = write_text(tmp_path, "\ufeff" + json.dumps(document), "cores.json")
        assert donors(path) == ["A", None, None, None]


def test_holes_and_outlines_are_outside(tmp_path: Path) -> None:
    ring = shapely.box(0, 0, 30, 15).difference(shapely.box(10, 1, 20, 9))
    path = write(tmp_path, feature("A", ring), feature("B", shapely.box(10, 1, 15, 9)))
    # The second centre lies on the outline of B, in the hole of A.
    assert donors(path) == ["A", None, "A", None]


# Whole numbers and halves, so that many points lie on outlines and on corners.
places = st.integers(0, 40).map(lambda n: n / 2)
triangles = st.lists(st.tuples(places, places), min_size=3, max_size=3, unique=True).map(
    shapely.Polygon
)
points = npst.arrays(np.float64, st.tuples(st.integers(1, 40), st.just(2)), elements=places)


@given(st.lists(st.tuples(st.sampled_from("ABC"), triangles), min_size=1, max_size=5), points)
def test_points_in_polygons_are_those_of_brute_force(
    tmp_path_factory: pytest.TempPathFactory,
    regions: list[tuple[str, shapely.Polygon]],
    centres_px: np.ndarray,
) -> None:
    regions = [(donor, polygon) for donor, polygon in regions if polygon.area]
    want = [
        {donor for donor, polygon in regions if polygon.contains(shapely.Point(*centre))}
        for centre in centres_px
    ]
    path = write(tmp_path_factory.mktemp("cores"), *(feature(*region) for region in regions))
    ids = [f"cell {i}" for i in range(len(centres_px))]
    if max(map(len, want)) == 1:
        found, named = donors_of_cells(path, ids, centres_px)
        assert [set() if donor is None else {donor} for donor in found] == want
        assert named == tuple(sorted({donor for donor, _ in regions}))
    else:
        with pytest.raises(BadInput) as caught:
            donors_of_cells(path, ids, centres_px)
        several = [i for i, donors in zip(ids, want, strict=True) if len(donors) > 1]
        if several:
            assert any(f"cell {i} at" in caught.value.found for i in several)


INSIDE = shapely.box(0, 0, 10, 10)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (
            [feature("A", INSIDE), feature("B", shapely.box(4, 4, 6, 6))],
            "cell 1 at (5.0, 5.0) px in polygons of A and of B",
        ),
        (
            [feature("A", shapely.box(1000, 2000, 1100, 2100))],
            "none of 4: the polygons span x 1000 to 1100 and y 2000 to 2100 px, "
            "the cells x 5 to 99 and y 5 to 99 px",
        ),
        ([feature("", INSIDE)], "feature 1\n  expected: a donor, as text"),
        ([feature("A", INSIDE) | {"properties": None}], "no properties"),
        ([feature("A", INSIDE) | {"properties": {"donor": True}}], "no such property"),
        (["A"], "no properties"),
        ([feature("A", INSIDE), feature("P", shapely.Point(1, 1))], "feature 2 (P)"),
        ([feature("A", shapely.LineString([(0, 0), (1, 1)]))], "a LineString"),
        ([feature("A", shapely.Polygon())], "an empty one"),
        ([feature("A", shapely.Polygon([(0, 0), (9, 9), (9, 0), (0, 9)]))], "Self-intersection"),
        ([feature("A", INSIDE) | {"geometry": None}], "found:    None"),
        ([feature("A", INSIDE) | {"geometry": {"type": "Polygon"}}], "{'type': 'Polygon'}"),
        ([], "at least one feature"),
    ],
)
def test_polygons_that_tell_no_donor(tmp_path: Path, features: list[Any], words: str) -> None:
    with pytest.raises(BadInput) as caught:
        donors(write(tmp_path, *features))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cell_id,donor\n1,A\n", "a GeoJSON file"),
        ('{"type": "Topology"}', "found:    Topology"),
        ("3", "found:    int"),
        ('{"type": "FeatureCollection"', "a GeoJSON file"),
    ],
)
def test_a_file_that_is_no_geojson(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        donors(write_text(tmp_path, text, "cores.geojson"))
    assert words in str(caught.value)


def test_ids_of_a_csv_are_text_and_its_columns_have_any_order(tmp_path: Path) -> None:
    text = '\ufeff# 12 cores\r\n"donor", note ,cell_id\r\nB,,aaab-1\r\n\r\nA ü,x,1\r\n'
    path = write_text(tmp_path, text)
    found, named = donors_of_cells(path, IDS, CENTRES_PX)
    assert found.tolist() == ["A ü", None, "B", None]
    assert named == ("A ü", "B")


def test_an_empty_field_is_no_donor_and_a_line_twice_is_one(tmp_path: Path) -> None:
    assert donors(write_text(tmp_path, "cell_id,donor\n1,\n2,B\n2,B\n")) == [None, "B", None, None]


@pytest.mark.parametrize(
    ("header", "label"), [("cell_id,group,color", "g"), ("cell_id,group,label", "l")]
)
def test_labels_are_of_label_else_of_group(tmp_path: Path, header: str, label: str) -> None:
    path = write_text(tmp_path, f"{header}\n2,g,l\n")
    assert labels_of_cells(path, IDS).tolist() == [None, label, None, None]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cell_id;donor\n1;A\n", "a first line parted by semicolons: 'cell_id;donor'"),
        ("cell_id\tdonor\n1\tA\n", "a first line parted by tabs"),
        ("cell_id,group\n1,A\n", "found:    the first line 'cell_id,group'"),
        ("cell,donor\n1,A\n", "the columns cell_id and donor"),
        ("1,A\n", "the first line '1,A'"),
        ("", "an empty file"),
        ("cell_id,donor\n", "at least one cell with a donor"),
        ("cell_id,donor\n1,\n", "at least one cell with a donor"),
        ("cell_id,donor\n1,A,B\n", "line 2"),
        ("cell_id,donor\n\n1\n", "line 3"),
        ("cell_id,donor\n,A\n", "line 2"),
        ("cell_id,donor\n1,A\n1,B\n", "cell 1 with 'A' and with 'B'"),
        ("cell_id,donor\n1,A\n01,B\n9,B\n", "2 of 3 ids that the run does not have, such as 01, 9"),
    ],
)
def test_a_csv_that_tells_no_donors(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        donors(write_text(tmp_path, text))
    assert words in str(caught.value)


def test_a_csv_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cells.csv"
    path.write_bytes("cell_id,donor\n1,Köln\n".encode("latin-1"))
    with pytest.raises(BadInput, match="in UTF-8"):
        donors(path)


def test_places_are_of_the_donor_of_the_nearest_cell(tmp_path: Path) -> None:
    """One donor is called as Python calls nobody; a cell that the file leaves out is nobody's."""
    path = tmp_path / "donors.csv"
    path.write_text("cell_id,donor\na,D1\nb,None\n")
    centres_px = np.array([[0.0, 0.0], [10.0, 0.0], [20.0, 0.0]])
    is_theirs = area_of(path, ("None",), ["a", "b", "c"], centres_px)
    places_px = np.array([[4.0, 9.0], [6.0, -9.0], [14.0, 1.0], [16.0, 1.0], [99.0, 0.0]])
    assert is_theirs(places_px).tolist() == [False, True, True, False, False]
