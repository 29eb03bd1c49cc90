"""Unions of panels on disk: a row for each gene, what each panel measures, and what is odd."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shards.artifact import write_atomically
from shards.check import describe, validate
from shards.dataset import publish_dataset, read_dataset, read_panels
from shards.schema import Dataset, Gene, Panel
from shards.unions import PanelUnion, names_that_differ, union_path, unions_of
from tests.shards.tiny import write_tiny_dataset


def panel(species: str, *genes: tuple[str, str | None]) -> Panel:
    return Panel.of(species, [Gene(symbol=s, ensembl=e) for s, e in genes])


SMALL = panel("human", ("A", "ENSG00000000001.5"), ("B", "ENSG00000000002"), ("C", None))
LARGE = panel("human", ("C", None), ("A2", "ENSG00000000001"), ("D", "ENSG00000000004"))
MOUSE = panel("mouse", ("A", None), ("B", "ENSMUSG00000000001"))


def test_counts_go_to_their_rows_and_what_no_place_names_is_unmeasured() -> None:
    union = PanelUnion.of([SMALL, LARGE])
    assert [(g.symbol, g.ensembl, g.also) for g in union.genes] == [
        ("A", "ENSG00000000001", ("A2",)),
        ("B", "ENSG00000000002", ()),
        ("C", None, ()),
        ("D", "ENSG00000000004", ()),
    ]
    assert union.places == {SMALL.panel_id: (0, 1, 2), LARGE.panel_id: (2, 0, 3)}
    dense = np.full(len(union.genes), np.nan)
    dense[list(union.places[LARGE.panel_id])] = [7, 1, 4]
    np.testing.assert_array_equal(dense, [1, np.nan, 7, 4])


def test_species_never_mix_and_a_panel_more_moves_no_gene() -> None:
    unions = unions_of([SMALL, MOUSE, LARGE])
    assert list(unions) == ["human", "mouse"]
    assert [gene.symbol for gene in unions["mouse"].genes] == ["A", "B"]
    alone = PanelUnion.of([SMALL])
    assert unions["human"].places[SMALL.panel_id] == alone.places[SMALL.panel_id]
    assert union_path(unions["human"]) != union_path(alone)
    with pytest.raises(ValueError, match="too many values"):
        PanelUnion.of([SMALL, MOUSE])


def test_names_that_differ_are_told() -> None:
    other = panel("human", ("B", "ENSG00000000009"), ("C", "ENSG00000000003"))
    isoforms = panel("human", ("X", "ENSG00000000007"), ("X2", "ENSG00000000007.2"))
    assert names_that_differ([SMALL, LARGE, MOUSE, other, isoforms]) == [
        "human: B is ENSG00000000002 and ENSG00000000009: genes of their own",
        "human: ENSG00000000001 is A and A2: one gene, renamed",
        "human: one panel lists ENSG00000000007 as X and X2: one gene, counts add up",
    ]
    assert names_that_differ([SMALL, SMALL, MOUSE]) == []
    hostile = panel("human", ("A\nERROR", "ENSG00000000001"))
    assert names_that_differ([SMALL, hostile]) == [
        "human: ENSG00000000001 is A and 'A\\nERROR': one gene, renamed"
    ]


def with_unions(root: Path) -> tuple[Dataset, dict[str, str]]:
    dataset, _ = read_dataset(root)
    unions = unions_of(read_panels(dataset, root).values())
    for union in unions.values():
        write_atomically(root / union_path(union), union.model_dump_json(indent=1).encode())
    paths = {species: union_path(union) for species, union in unions.items()}
    published = Dataset.of(
        dataset.name, dataset.runs, dataset.panels, dataset.donors, dataset.shards, unions=paths
    )
    publish_dataset(root, published)
    return published, paths


def test_check_makes_the_unions_again(tmp_path: Path) -> None:
    root = write_tiny_dataset(tmp_path, {"D1": "train"}, n_per_donor=3)
    _, paths = with_unions(root)
    assert validate(root) == []
    assert describe(root)["unions"] == {"human": 40}
    path = root / paths["human"]
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"GENE7", b"GENE8"))
    assert validate(root) == [
        f"{paths['human']}: not the union of its panels; remove it if it is there, and run "
        "`cellpair curate` again"
    ]
    path.unlink()
    assert "no such file" in validate(root)[0]


def test_check_finds_a_union_of_other_panels(tmp_path: Path) -> None:
    root = write_tiny_dataset(tmp_path, {"D1": "train"}, n_per_donor=3)
    dataset, _ = with_unions(root)
    other = {"human": "panels/union-human-0123456789abcdef0123.json"}
    wrong = Dataset.of(
        dataset.name, dataset.runs, dataset.panels, dataset.donors, dataset.shards, unions=other
    )
    publish_dataset(root, wrong)
    assert any("unions are" in fault for fault in validate(root))
