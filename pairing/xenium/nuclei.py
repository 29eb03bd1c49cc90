"""The instrument's nuclei: from masks where a run has them, else from outlines alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from pairing.xenium.polygons import PolygonTable
from pairing.xenium.rasters import LabelMoments, LabelRaster, label_moments, labels_at


def nuclei_of_masks(
    labels: LabelRaster,
    row_of_label: npt.NDArray[np.int64],
    polygons: PolygonTable,
    pixel_size_um: float,
) -> pd.DataFrame:
    """`_nuclei_table` of every label of the nucleus mask, with its outline where there is one."""
    if not polygons.has_labels:
        polygons = _with_labels_under(polygons, labels, pixel_size_um)
    label_id = np.arange(1, len(row_of_label))
    moments = label_moments(labels)
    return _nuclei_table(label_id, row_of_label[1:], polygons, moments, pixel_size_um)


def nuclei_of_polygons(polygons: PolygonTable, owner: npt.NDArray[np.int64]) -> pd.DataFrame:
    """`_nuclei_table` of outlines alone; without labels they are numbered from 1 as they come."""
    if not polygons.has_labels:
        polygons = replace(polygons, label_id=np.arange(1, len(polygons) + 1))
    return _nuclei_table(polygons.label_id, owner, polygons, None, 1.0)


def _with_labels_under(
    polygons: PolygonTable, labels: LabelRaster, pixel_size_um: float
) -> PolygonTable:
    """Polygons with the label that a point well inside lies on, without those that lie on none.

    Of several on one label the first is kept.
    """
    point_um = polygons.mean_um.copy()
    drawn = np.array([p is not None for p in polygons.polygon], bool)
    inner = shapely.point_on_surface(polygons.polygon[drawn])
    point_um[drawn] = shapely.get_coordinates(inner)
    found = labels_at(labels, point_um / pixel_size_um)
    kept = (found > 0) & ~pd.Series(found).duplicated().to_numpy()
    return PolygonTable(
        label_id=found[kept],
        cell_id=polygons.cell_id[kept],
        polygon=polygons.polygon[kept],
        mean_um=polygons.mean_um[kept],
        closed=polygons.closed[kept],
    )


def _nuclei_table(
    label_id: npt.NDArray[np.int64],
    cell_index: npt.NDArray[np.int64],
    polygons: PolygonTable,
    moments: LabelMoments | None,
    pixel_size_um: float,
) -> pd.DataFrame:
    """Nuclei (label_id, cell_index, x_um, y_um, area_um2, polygon), one row a nucleus.

    Centroid and area are the mask's where `moments` has pixels of the label, else the polygon's
    (a ring that encloses nothing: the mean of its vertices, area 0, an empty polygon). Labels
    with neither pixels nor polygon are no nuclei.
    """
    nuclei = pd.DataFrame({"label_id": label_id, "cell_index": cell_index})
    known = pd.DataFrame(
        {
            "label_id": polygons.label_id,
            "x_um": polygons.mean_um[:, 0],
            "y_um": polygons.mean_um[:, 1],
            "polygon": polygons.polygon,
        }
    )
    nuclei = nuclei.merge(known, on="label_id", how="left", validate="one_to_one")
    shapes = np.array(
        [p if isinstance(p, shapely.Polygon) else shapely.Polygon() for p in nuclei["polygon"]],
        dtype=object,
    )
    nuclei["polygon"] = shapes
    drawn = ~shapely.is_empty(shapes)
    centroid = shapely.centroid(shapes[drawn])
    nuclei.loc[drawn, "x_um"] = shapely.get_x(centroid)
    nuclei.loc[drawn, "y_um"] = shapely.get_y(centroid)
    nuclei["area_um2"] = shapely.area(shapes)
    if moments is not None:
        label = nuclei["label_id"].to_numpy()
        held = label < len(moments.n_px)
        held[held] = moments.n_px[label[held]] > 0
        nuclei.loc[held, ["x_um", "y_um"]] = moments.centroid_px[label[held]] * pixel_size_um
        nuclei.loc[held, "area_um2"] = moments.n_px[label[held]] * pixel_size_um**2
    nuclei = nuclei[nuclei["x_um"].notna()].reset_index(drop=True)
    return nuclei[["label_id", "cell_index", "x_um", "y_um", "area_um2", "polygon"]]
