"""What a person says of the cells of a run by file: donors by polygons or csv, labels by csv."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from scipy.spatial import cKDTree
from shapely.errors import ShapelyError
from shapely.geometry import shape

from pairing.geometry import Points
from shards.errors import BadInput
from shards.schema import is_one_line

GEOJSON_SUFFIXES = (".geojson", ".json")
CSV_SUFFIX = ".csv"

# One str or None a cell, in the order of the run's cells.
CellTexts = npt.NDArray[np.object_]
Outline = shapely.Polygon | shapely.MultiPolygon

_GEOJSON_REMEDY = (
    "export the annotations as a GeoJSON FeatureCollection of polygons, each with its donor in the "
    "property `donor`, or in QuPath as its name or its classification"
)
_FRAMES = (
    "draw the polygons at the full resolution (level 0) of the image that the patches are cut "
    "from: neither µm, nor pixels of another image or of a smaller copy"
)


def donors_of_cells(
    path: Path, cell_ids: Sequence[str], centres_px: Points
) -> tuple[CellTexts, tuple[str, ...]]:
    """The donor of each cell, None where it has none; and all donors that the file names, sorted.

    `path` is a GeoJSON of polygons in level-0 pixels of the image that patches are cut from, or
    a csv with the columns cell_id and donor. `centres_px` is (n, 2) in those pixels. A centre on
    the very outline of a polygon is outside. Raises BadInput on a file that is neither, on
    unknown ids, on a cell of two donors, and where no cell has a donor.
    """
    if path.suffix.lower() == CSV_SUFFIX:
        found = _texts_by_id(path, cell_ids, ("donor",))
        return found, tuple(sorted({donor for donor in found if donor is not None}))
    regions = read_regions(path)
    donors = tuple(sorted({donor for donor, _ in regions}))
    return _donors_by_region(path, regions, donors, cell_ids, centres_px), donors


def area_of(
    path: Path, donors: Collection[str], cell_ids: Sequence[str], centres_px: Points
) -> Callable[[Points], npt.NDArray[np.bool_]]:
    """Tells which places (n, 2) in the image are of one of these donors.

    Those inside one of their polygons; where the file is a csv, those whose nearest cell is theirs.
    Files, frames and errors as `donors_of_cells`.
    """
    if path.suffix.lower() == CSV_SUFFIX:
        of_cell, _ = donors_of_cells(path, cell_ids, centres_px)
        is_theirs = np.array([donor in donors for donor in of_cell], bool)
        cells = cKDTree(centres_px)
        return lambda places_px: np.asarray(is_theirs[cells.query(places_px)[1]], bool)
    area = shapely.union_all([outline for donor, outline in read_regions(path) if donor in donors])
    shapely.prepare(area)
    return lambda places_px: np.asarray(shapely.contains_xy(area, *places_px.T), bool)


def donors_named(path: Path) -> tuple[str, ...]:
    """All donors that a file of donors names, sorted; files and errors as `donors_of_cells`."""
    if path.suffix.lower() == CSV_SUFFIX:
        return tuple(sorted({donor for donor in _read_texts(path, ("donor",)).values() if donor}))
    return tuple(sorted({donor for donor, _ in read_regions(path)}))


def labels_of_cells(path: Path, cell_ids: Sequence[str]) -> CellTexts:
    """The label of each cell of a csv with the columns cell_id and label, or group.

    Xenium Explorer calls it `group`; where both are there, `label` is taken. None where the csv
    does not name the cell. Raises BadInput on a file that is no such csv, on unknown ids, and on
    a cell with two labels.
    """
    return _texts_by_id(path, cell_ids, ("label", "group"))


def read_regions(path: Path) -> list[tuple[str, Outline]]:
    """Donor and outline of every feature of a GeoJSON: Polygons and MultiPolygons, in its order.

    The donor is the first that is given of the properties `donor`, `name` and
    `classification.name`: QuPath's name is of one annotation, its classification of a kind.
    """
    regions = []
    for number, feature in enumerate(_features(path), start=1):
        where = f"{path}, feature {number}"
        properties = feature.get("properties") if isinstance(feature, dict) else None
        donor = _donor_of(properties) if isinstance(properties, dict) else None
        if donor is None:
            raise BadInput(
                where,
                expected="a donor, as text in `donor`, `name` or `classification.name`",
                found="no such property" if properties else "no properties",
                remedy=_GEOJSON_REMEDY,
            )
        if not is_one_line(donor):
            raise _broken_name(where, donor)
        regions.append((donor, _outline(f"{where} ({donor})", feature.get("geometry"))))
    if not regions:
        raise BadInput(path, expected="at least one feature", found="none", remedy=_GEOJSON_REMEDY)
    return regions


def _features(path: Path) -> list[Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadInput(
            path, expected="a GeoJSON file", found=str(error), remedy=_GEOJSON_REMEDY
        ) from error
    features = document.get("features") if isinstance(document, dict) else document
    # Not asked for a FeatureCollection, QuPath writes a bare list, or one feature alone.
    if isinstance(document, dict) and document.get("type") == "Feature":
        features = [document]
    if not isinstance(features, list):
        kind = document.get("type") if isinstance(document, dict) else type(document).__name__
        raise BadInput(
            path, expected="a FeatureCollection", found=f"{kind}", remedy=_GEOJSON_REMEDY
        )
    return features


def _broken_name(where: str, name: str) -> BadInput:
    return BadInput(
        where,
        expected="a name on one line",
        found=repr(name)[:100],
        remedy="remove line breaks and other control characters from it",
    )


def _donor_of(properties: dict[str, Any]) -> str | None:
    classification = properties.get("classification")
    given = (
        properties.get("donor"),
        properties.get("name"),
        classification.get("name") if isinstance(classification, dict) else None,
    )
    for value in given:
        # A donor that is a number in the file is its digits: bool is a number to Python.
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    return None


def _outline(where: str, geometry: Any) -> Outline:
    try:
        outline = shape(geometry)
    except (ShapelyError, AttributeError, KeyError, TypeError, ValueError, IndexError):
        found = f"{geometry!r:.80}"
    else:
        if not isinstance(outline, Outline):
            found = f"a {outline.geom_type}"
        elif outline.is_empty:
            found = "an empty one"
        elif not outline.is_valid:
            found = shapely.is_valid_reason(outline)
        else:
            shapely.prepare(outline)
            return outline
    raise BadInput(
        where,
        expected="a Polygon or a MultiPolygon whose outline does not cross itself",
        found=found,
        remedy="draw it again, or remove it",
    )


def _donors_by_region(
    path: Path,
    regions: list[tuple[str, Outline]],
    donors: tuple[str, ...],
    cell_ids: Sequence[str],
    centres_px: Points,
) -> CellTexts:
    code = np.full(len(cell_ids), -1)
    x, y = centres_px.T
    for donor, outline in regions:
        x0, y0, x1, y1 = outline.bounds
        near = np.flatnonzero((x > x0) & (x < x1) & (y > y0) & (y < y1))
        inside = near[shapely.contains_xy(outline, x[near], y[near])]
        own = donors.index(donor)
        for row in inside[(code[inside] >= 0) & (code[inside] != own)]:
            raise BadInput(
                path,
                expected="one donor for every cell",
                found=f"cell {cell_ids[row]} at ({x[row]:.1f}, {y[row]:.1f}) px in polygons of "
                f"{donors[code[row]]} and of {donor}",
                remedy="draw the polygons of different donors apart",
            )
        code[inside] = own
    if not (code >= 0).any():
        corners_px = np.array([outline.bounds for _, outline in regions]).reshape(-1, 2)
        raise BadInput(
            path,
            expected="cells in the polygons",
            found=f"none of {len(code)}: the polygons span {_span(corners_px)}, "
            f"the cells {_span(centres_px)}",
            remedy=_FRAMES,
        )
    # The last place is that of code -1.
    texts: CellTexts = np.array([*donors, None], dtype=object)[code]
    return texts


def _span(points_px: Points) -> str:
    if not len(points_px):
        return "nothing"
    (x0, y0), (x1, y1) = points_px.min(axis=0), points_px.max(axis=0)
    return f"x {x0:.0f} to {x1:.0f} and y {y0:.0f} to {y1:.0f} px"


def _texts_by_id(path: Path, cell_ids: Sequence[str], columns: tuple[str, ...]) -> CellTexts:
    texts = _read_texts(path, columns)
    known = set(cell_ids)
    unknown = [cell_id for cell_id in texts if cell_id not in known]
    if unknown:
        raise BadInput(
            path,
            expected=f"ids of cells of the run, such as {next(iter(cell_ids), 'none')}",
            found=f"{len(unknown)} of {len(texts)} ids that the run does not have, such as "
            f"{', '.join(unknown[:3])}",
            remedy="give the csv that belongs to this bundle, ids kept as text",
        )
    if not any(texts.values()):
        raise BadInput(
            path,
            expected=f"at least one cell with a {columns[0]}",
            found="none",
            remedy="fill it, or leave the option out",
        )
    return np.array([texts.get(cell_id) or None for cell_id in cell_ids], dtype=object)


def _read_texts(path: Path, columns: tuple[str, ...]) -> dict[str, str]:
    """Column of a csv by cell_id; an empty text where the field is empty.

    Lines that start with # before the header are comments, as Xenium Explorer writes them.
    """
    remedy = f"give a csv in UTF-8, parted by commas, with the header cell_id,{columns[0]}"
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            rows = csv.reader(f)
            header = _header(rows)
            column = next((name for name in columns if name in header), None)
            if "cell_id" not in header or column is None:
                raise BadInput(
                    path,
                    expected=f"the columns cell_id and {' or '.join(columns)}",
                    found=_words_for(header),
                    remedy=remedy,
                )
            return _rows_to_texts(path, rows, header, column)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(path, expected="a csv file", found=str(error), remedy=remedy) from error


def _header(rows: Iterator[list[str]]) -> list[str]:
    for row in rows:
        if any(cell.strip() for cell in row) and not row[0].startswith("#"):
            return [cell.strip() for cell in row]
    return []


def _words_for(header: list[str]) -> str:
    if not header:
        return "an empty file"
    line = ",".join(header)
    for sign, name in ((";", "semicolons"), ("\t", "tabs")):
        if sign in line:
            return f"a first line parted by {name}: {line[:100]!r}"
    return f"the first line {line[:100]!r}"


def _rows_to_texts(path: Path, rows: Any, header: list[str], column: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        where = f"{path}, line {rows.line_num}"
        named = dict(zip(header, (cell.strip() for cell in row), strict=False))
        if len(row) != len(header) or not named["cell_id"]:
            raise BadInput(
                where,
                expected=f"a cell id and {len(header)} fields, as the header has",
                found=",".join(row)[:100],
                remedy="mend or remove the line",
            )
        cell_id, text = named["cell_id"], named[column]
        if not is_one_line(text):
            raise _broken_name(where, text)
        if texts.setdefault(cell_id, text) != text:
            raise BadInput(
                where,
                expected=f"one {column} for every cell",
                found=f"cell {cell_id} with {texts[cell_id]!r} and with {text!r}",
                remedy="remove one of the lines",
            )
    return texts
