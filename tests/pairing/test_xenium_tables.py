"""Small bundles by hand: genes and controls, values, nuclei."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pairing.xenium import open_xenium
from pairing.xenium.tables import genes_of
from tests.pairing.handmade import CELL_IDS, CONTROLS, LURES, Bundle, counted


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle(tmp_path / "outs")


KNOWN_BY = ["is_gene", "codeword_category", "feature type", "descriptor", "prefix"]


@pytest.mark.parametrize("known_by", KNOWN_BY)
def test_genes_are_told_from_controls(known_by: str, bundle: Bundle) -> None:
    """By each of the five sources alone, the earlier ones missing."""
    position = KNOWN_BY.index(known_by)
    if position > 0:
        del bundle.transcripts["is_gene"]
    if position > 1:
        del bundle.transcripts["codeword_category"]
    if position > 2:
        bundle.features = None
    if position == 3:
        bundle.panel = dict.fromkeys(LURES, "gene") | dict.fromkeys(CONTROLS, "control")
    with open_xenium(bundle.write()) as run:
        (batch,) = run.iter_transcripts()
        genes = [gene.symbol for gene in run.genes()]
        assert bool(run.notes) == (position > 3)
    assert sorted(genes) == sorted(LURES)
    assert [genes[i] for i in batch.gene_index[: len(LURES)]] == LURES
    assert (batch.gene_index[len(LURES) :] == -1).all()
    told = [batch.category_names[c] for c in batch.category]
    assert told == ["gene"] * len(LURES) + [category for category, _ in CONTROLS.values()]


def test_is_gene_outweighs_the_category(bundle: Bundle) -> None:
    bundle.transcripts.loc[0, "is_gene"] = False
    with open_xenium(bundle.write()) as run:
        (batch,) = run.iter_transcripts()
    assert (batch.category_names[batch.category[0]], batch.gene_index[0]) == ("other", -1)


def test_protein_is_no_gene(bundle: Bundle) -> None:
    assert bundle.features is not None
    bundle.features["CD3E protein"] = ("CD3E", "Protein Expression")
    with open_xenium(bundle.write()) as run:
        assert [gene.symbol for gene in run.genes()] == LURES
        matrix = run.read_matrix()
        assert matrix is not None
        np.testing.assert_array_equal(matrix.toarray(), counted(run))


def test_values_come_through(bundle: Bundle) -> None:
    with open_xenium(bundle.write()) as run:
        (batch,) = run.iter_transcripts()
        assert run.provenance == {"software": "R&D"}
        assert run.species == "human"
        cells = run.read_cells()
        assert run.read_cell_polygons() == [None, None, None]
    assert batch.cell_index.tolist() == [0, 2, -1] + [1] * (len(batch.qv) - 3)
    np.testing.assert_array_equal(batch.x_um, bundle.transcripts["x_location"])
    np.testing.assert_array_equal(batch.y_um, bundle.transcripts["y_location"])
    np.testing.assert_array_equal(batch.qv, bundle.transcripts["qv"])
    np.testing.assert_array_equal(batch.overlaps_nucleus, bundle.transcripts["overlaps_nucleus"])
    kinds = [getattr(batch, name).dtype for name in ("cell_index", "gene_index", "x_um", "qv")]
    assert kinds == [np.int32, np.int32, np.float32, np.float32]
    assert cells["nucleus_area_um2"].isna().tolist() == [False, True, True]  # 0 is none, too


def test_nuclei_of_one_cell_stay_apart(bundle: Bundle) -> None:
    with open_xenium(bundle.write()) as run:
        nuclei = run.read_nuclei()
    assert nuclei["cell_index"].tolist() == [0, 0, -1]
    assert nuclei["area_um2"].tolist() == [16, 16, 16]
    assert nuclei[["x_um", "y_um"]].to_numpy().tolist() == [[2, 2], [8, 8], [2, 2]]


def test_rings_in_pieces_and_rings_that_enclose_nothing(bundle: Bundle) -> None:
    line = pd.DataFrame(
        {"cell_id": CELL_IDS[1], "vertex_x": [10.0, 14, 10], "vertex_y": [0.0, 4, 0], "label_id": 4}
    )
    bow = np.array([[20, 0], [24, 4], [24, 0], [20, 2], [20, 0]])
    crossed = pd.DataFrame(
        {"cell_id": CELL_IDS[2], "vertex_x": bow[:, 0], "vertex_y": bow[:, 1], "label_id": 5}
    )
    # The rows of label 1 are taken apart by all the others.
    first = bundle.nuclei["label_id"] == 1
    pieces = [bundle.nuclei[first][:2], bundle.nuclei[~first], line, crossed]
    bundle.nuclei = pd.concat([*pieces, bundle.nuclei[first][2:]])
    with open_xenium(bundle.write()) as run:
        nuclei = run.read_nuclei().set_index("label_id")
    assert nuclei.loc[1, "area_um2"] == 16
    assert nuclei.loc[4, "polygon"].is_empty
    assert (nuclei.loc[4, "area_um2"], nuclei.loc[4, "x_um"]) == (0, pytest.approx(34 / 3))
    assert nuclei.loc[5, "polygon"].is_valid
    assert 0 < nuclei.loc[5, "area_um2"] < 16


def test_ensembl_ids_lose_their_versions() -> None:
    told = {
        "ENSG00000141510.18": "ENSG00000141510",
        "ENSMUSG00000059552": "ENSMUSG00000059552",
        "ENSG00000182378.14_PAR_Y": None,  # a gene of its own, which no other bundle names so
        "custom.1": None,
        "": None,
    }
    genes = genes_of(Path("outs"), [f"G{i}" for i in range(len(told))], told)
    assert [gene.ensembl for gene in genes] == list(told.values())
