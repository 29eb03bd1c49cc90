"""What is wrong with a run, told in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile

from pairing.xenium import open_xenium
from shards.errors import BadInput
from tests.pairing.handmade import CELL_IDS, CONTROLS, LURES, Bundle, read_all, zipped


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle(tmp_path / "outs")


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
        changed("cells", "cell_id", [CELL_IDS[0]] * 3),
        r"(?s)of its own.*'aaaaaaab-1' more than",
    ),
    "no cells": (lambda b: setattr(b, "cells", b.cells[:0]), "at least one cell"),
    "no transcripts": (
        lambda b: setattr(b, "transcripts", b.transcripts[:0]),
        "at least one transcript",
    ),
    "a cell nowhere": (
        changed("cells", "x_centroid", [2.0, np.nan, 22]),
        r"(?s)x_um.*finite number.*nan in row 1",
    ),
    "transcripts nowhere": (
        changed("transcripts", "y_location", np.r_[[0.0], [np.nan] * 2, np.ones(N - 3)]),
        r"(?s)column y_location.*nan in row 1 and in 1 later rows",
    ),
    "transcripts without a position": (
        changed("transcripts", "y_location", pd.array([1.0] * (N - 2) + [None] * 2, "Float64")),
        r"(?s)column y_location.*2 empty rows",
    ),
    "transcripts infinitely far": (
        changed("transcripts", "x_location", np.r_[np.ones(N - 1), [np.inf]]),
        rf"(?s)column x_location.*inf in row {N - 1}",
    ),
    "transcripts of no quality": (
        changed("transcripts", "qv", np.r_[np.ones(N - 1), [np.nan]]),
        r"(?s)column qv.*nan in row",
    ),
    "a vertex nowhere": (changed("nuclei", "vertex_x", np.nan), r"(?s)vertex_x.*nan in row 0"),
    "a ring without a label": (
        changed("nuclei", "label_id", [1.0] * 5 + [np.nan] * 10),
        r"(?s)column label_id.*nan in row 5",
    ),
    "positions as text": (
        changed("transcripts", "x_location", ["1.0"] * N),
        r"(?s)column x_location.*floating-point.*string",
    ),
    "areas as text": (changed("cells", "cell_area", ["large"] * 3), r"(?s)cells\.parquet.*large"),
    "no area": (dropped("cells", "cell_area"), r"(?s)cells\.parquet.*none called cell_area"),
    "no vertices": (dropped("nuclei", "vertex_y"), r"(?s)nucleus_boundaries.*called vertex_y"),
    "names that are no text": (
        changed("transcripts", "feature_name", [b"\xff\xfe"] * N),
        r"(?s)transcripts\.parquet.*UTF8",
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


@pytest.mark.parametrize("fault", ["no cells", "no transcripts", "transcripts nowhere"])
def test_the_same_in_csv(fault: str, bundle: Bundle) -> None:
    change, words = FAULTS[fault]
    change(bundle)
    bundle.as_csv = True
    if fault == "transcripts nowhere":
        words = "2 empty rows"  # in csv nothing tells NaN from an empty field
    with pytest.raises(BadInput, match=words):
        read_all(bundle.write())


@pytest.mark.parametrize("column", ["qv", "feature_name", "x_location"])
def test_csv_without_a_column(column: str, bundle: Bundle) -> None:
    del bundle.transcripts[column]
    bundle.as_csv = True
    with pytest.raises(BadInput, match=rf"(?s)transcripts\.csv\.gz, column {column}.*no such"):
        read_all(bundle.write())


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("in_zip", [False, True])
def test_masks_of_another_size_than_the_image(in_zip: bool, bundle: Bundle) -> None:
    path = bundle.write()
    tifffile.imwrite(path / "morphology_focus.ome.tif", np.zeros((20, 31), np.uint16))
    masks = np.zeros((20, 30), np.uint32)
    values = np.array([1, 2, 3], np.uint32)
    bundle.write_masks(masks__0=masks, masks__1=masks, seg_mask_value=values)
    if in_zip:
        path = zipped(path.with_name("outs.zip"), path)
    words = r"(?s)cells\.zarr\.zip.*31 x 20 px.*30 x 20 px.*one run of"
    with open_xenium(path) as run, pytest.raises(BadInput, match=words):
        run.read_labels("cell")


def test_masks_on_two_grids(bundle: Bundle) -> None:
    path = bundle.write()
    nuclei, cells = np.zeros((20, 30), np.uint32), np.zeros((20, 31), np.uint32)
    bundle.write_masks(masks__0=nuclei, masks__1=cells)
    with open_xenium(path) as run, pytest.raises(BadInput, match="on one grid"):
        run.read_nuclei()


@pytest.mark.parametrize(
    ("owners", "words"),
    [
        ({}, "numbered from 1 in the order of the cells"),
        ({"seg_mask_value": np.array([1, 2, 2], np.uint32)}, "2 distinct"),
        ({"seg_mask_value": np.array([1, 2], np.uint32)}, "for each of 3 cells"),
        ({"polygon_sets__1__cell_index": np.array([0, 1, 3], np.uint32)}, "from 0 to 3"),
    ],
)
def test_masks_of_other_cells(owners: dict[str, Any], words: str, bundle: Bundle) -> None:
    """Labels that lie elsewhere than the cells of their number, or name cells there are not."""
    path = bundle.write()
    masks = np.zeros((20, 200), np.uint32)
    masks[5:15, 20:30], masks[5:15, 60:70], masks[5:15, 100:110] = 3, 1, 2
    bundle.write_masks(masks__0=masks, masks__1=masks, **owners)
    with open_xenium(path) as run, pytest.raises(BadInput, match=words):
        run.label_cell_index("cell")


def test_masks_without_masks(bundle: Bundle) -> None:
    path = bundle.write()
    bundle.write_masks(something=np.zeros(3))
    with open_xenium(path) as run, pytest.raises(BadInput, match=r"cells\.zarr\.zip"):
        run.read_labels("cell")


# ---------------------------------------------------------------- contradictions


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


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", '"R&D"', "null", "\x00\xff"])
def test_a_manifest_that_is_none(text: str, bundle: Bundle) -> None:
    path = bundle.write()
    (path / "experiment.xenium").write_text(text or " ")
    with pytest.raises(BadInput, match=r"(?s)experiment\.xenium.*a JSON object"), open_xenium(path):
        pass


def test_a_manifest_with_a_byte_order_mark(bundle: Bundle) -> None:
    path = bundle.write()
    (path / "experiment.xenium").write_text(json.dumps(bundle.experiment), encoding="utf-8-sig")
    read_all(path)
