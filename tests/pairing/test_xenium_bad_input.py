"""What is wrong with a run, told in words."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile

from pairing.counts import count_by_cell
from pairing.simulate import SimulationParams, simulate
from pairing.simulate.params import BundleParams
from pairing.xenium import open_xenium
from shards.errors import BadInput
from tests.pairing.handmade import CELL_IDS, CONTROLS, LURES, Bundle, zipped


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


def read_all(path: Path) -> None:
    with open_xenium(path) as run:
        count_by_cell(run, 20)
        run.read_cells()
        run.read_nuclei()
        run.read_cell_polygons()
        run.read_control_counts()
        for kind in ("cell", "nucleus"):
            labels = run.read_labels(kind)
            if labels is not None:
                labels[:]
                run.label_cell_index(kind)


# ---------------------------------------------------------------- bundles that are not whole


@pytest.mark.parametrize(
    "name",
    [
        "transcripts.parquet.part", "morphology.ome.tif.filepart", "cells.zarr.zip.crdownload",
        ".transcripts.parquet.k3Jd9a", "morphology_focus/ch0000_dapi.ome.tif.partial",
    ],
)  # fmt: skip
@pytest.mark.parametrize("in_zip", [False, True])
def test_a_bundle_that_is_still_being_copied(name: str, in_zip: bool, bundle: Bundle) -> None:
    path = bundle.write()
    (path / name).write_bytes(b"x")
    if in_zip:
        path = zipped(path.with_name("outs.zip"), path)
    words = rf"(?s)copied whole.*{re.escape(name)}, the name of.*wait until"
    with pytest.raises(BadInput, match=words), open_xenium(path):
        pass


def test_names_that_only_look_unfinished(bundle: Bundle) -> None:
    path = bundle.write()
    for name in (".end-of-run", ".DS_Store", "._cells.parquet.part", "notes.part2.txt"):
        (path / name).write_text("x")
    read_all(path)


@pytest.mark.parametrize(
    "name", ["experiment.xenium", "cells.parquet", "transcripts.parquet", "cell_feature_matrix.h5"]
)
@pytest.mark.parametrize("in_zip", [False, True])
def test_files_without_content(name: str, in_zip: bool, bundle: Bundle) -> None:
    path = bundle.write()
    (path / name).write_bytes(b"")
    if in_zip:
        path = zipped(path.with_name("outs.zip"), path)
    with pytest.raises(BadInput, match=rf"(?s){re.escape(name)}\n.*0 bytes.*wait until"):
        read_all(path)


@pytest.mark.parametrize("stem", ["cells", "transcripts"])
def test_files_that_are_needed(stem: str, bundle: Bundle) -> None:
    bundle.features = None
    path = bundle.write()
    (path / f"{stem}.parquet").unlink()
    with pytest.raises(BadInput, match=stem):
        read_all(path)


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that has every kind of file."""
    run = tmp_path_factory.mktemp("old") / "run"
    simulate(run, SimulationParams(n_cells=30, bundle=BundleParams(layout="xoa-1.3")))
    return run / "outs"


CUT = {
    "transcripts.parquet": [],
    "cells.parquet": [],
    "nucleus_boundaries.parquet": [],
    "cell_boundaries.parquet": [],
    "cells.zarr.zip": [],
    "gene_panel.json": ["cell_feature_matrix.h5", "cell_feature_matrix/matrix.mtx.gz"],
    "cell_feature_matrix.h5": [],
    "cell_feature_matrix/matrix.mtx.gz": ["cell_feature_matrix.h5"],
    "cell_feature_matrix/features.tsv.gz": ["cell_feature_matrix.h5"],
    "cell_feature_matrix/barcodes.tsv.gz": ["cell_feature_matrix.h5"],
    "transcripts.csv.gz": ["transcripts.parquet"],
    "cells.csv.gz": ["cells.parquet"],
    "nucleus_boundaries.csv.gz": ["nucleus_boundaries.parquet"],
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_files_that_are_cut_off(name: str, share: float, old_run: Path, tmp_path: Path) -> None:
    """Without what would be read in its place, each is refused by name wherever it ends."""
    path = tmp_path / "outs"
    shutil.copytree(old_run, path)
    for other in CUT[name]:
        (path / other).unlink()
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: max(1, int(share * len(content)))])
    with pytest.raises(BadInput, match=re.escape(name)):
        read_all(path)


def test_a_zip_that_is_cut_off(bundle: Bundle, tmp_path: Path) -> None:
    path = zipped(tmp_path / "outs.zip", bundle.write())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match="without its end"), open_xenium(path):
        pass


def test_a_zip_that_is_damaged(bundle: Bundle, tmp_path: Path) -> None:
    path = zipped(tmp_path / "outs.zip", bundle.write())
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        first = file.getinfo("transcripts.parquet").header_offset
    content[first + 200] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"(?s)transcripts\.parquet.*a member that unpacks"):
        read_all(path)


def test_a_zip_packed_in_a_way_that_is_not_read(bundle: Bundle, tmp_path: Path) -> None:
    path = zipped(tmp_path / "outs.zip", bundle.write())
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        central = file.start_dir
    # Method 9, deflate64, of the first member in the directory and in its own header.
    content[central + 10] = content[8] = 9
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"(?s)compression method.*unpack it and give the folder"):
        read_all(path)


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
