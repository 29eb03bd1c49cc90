"""What is wrong with a run, told in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pairing.xenium import open_xenium
from shards.errors import BadInput
from tests.pairing.handmade import CELL_IDS, CONTROLS, LURES, Bundle


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


def read_all(path: Path) -> None:
    with open_xenium(path) as run:
        run.read_cells()
        list(run.iter_transcripts())
        run.read_nuclei()


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
    (path / "experiment.xenium").write_text("{")
    with pytest.raises(BadInput, match="JSON"), open_xenium(path):
        pass
