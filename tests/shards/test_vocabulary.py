"""The union of panels: which genes are the same, told apart and not mixed up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shards.schema import Gene, Panel
from shards.vocabulary import Vocabulary, VocabularyGene, without_version


def _panel(species: str, *genes: tuple[str, str | None]) -> Panel:
    return Panel.of(species, [Gene(symbol=s, ensembl=e) for s, e in genes])


def _rows(vocabulary: Vocabulary) -> list[tuple[str, str, str | None, tuple[str, ...]]]:
    return [(g.species, g.symbol, g.ensembl, g.also) for g in vocabulary.genes]


def test_union_of_panels_knows_a_gene_by_ensembl_then_by_symbol() -> None:
    first = _panel("human", ("A", "E1"), ("B", "E2"), ("C", None), ("D", None))
    second = _panel("human", ("A-renamed", "E1"), ("C", "E3"), ("B", "E9"))
    third = _panel("mouse", ("A", None))
    union = Vocabulary.union([first, second, third])
    assert _rows(union) == [
        ("human", "A", "E1", ("A-renamed",)),
        ("human", "B", "E2", ()),
        ("human", "C", "E3", ()),
        ("human", "D", None, ()),
        ("human", "B", "E9", ()),
        ("mouse", "A", None, ()),
    ]
    index, unknown = Vocabulary.union([first]).places(second)
    assert index.tolist() == [0, 2, -1]
    assert unknown == ["B"]


def test_a_symbol_of_two_ids_says_nothing_of_a_gene_without_one() -> None:
    panels = [
        _panel("human", ("B", "E2")),
        _panel("human", ("B", "E9")),
        _panel("human", ("B", None)),
    ]
    union = Vocabulary.union(panels)
    assert [gene.ensembl for gene in union.genes] == ["E2", "E9", None]
    assert [union.places(panel)[0].tolist() for panel in panels] == [[0], [1], [2]]


def test_versions_of_ids_are_no_other_genes() -> None:
    old = _panel("human", ("TP53", "ENSG00000141510.11"))
    new = _panel("human", ("TP53", "ENSG00000141510"), ("P53", "ENSG00000141510.18"))
    union = Vocabulary.union([old, new])
    assert _rows(union) == [("human", "TP53", "ENSG00000141510", ("P53",))]
    assert union.places(new)[0].tolist() == [0, 0]
    assert without_version(None) is None
    assert without_version("ENSMUSG00000059552.14") == "ENSMUSG00000059552"
    assert without_version("a.1") == "a.1"


def test_a_new_name_is_known_without_its_id_too() -> None:
    panels = [
        _panel("human", ("A", "E1")),
        _panel("human", ("A2", "E1")),
        _panel("human", ("A2", None)),
    ]
    for order in (panels, panels[::-1]):
        union = Vocabulary.union(order)
        assert len(union.genes) == 1
        assert all(union.places(panel)[0].tolist() == [0] for panel in panels)


def test_what_a_checkpoint_knows_keeps_its_place() -> None:
    known = (VocabularyGene(species="human", symbol="C", ensembl=None),)
    union = Vocabulary.union([_panel("human", ("B", "E2"), ("C", "E3"), ("D", "E4"))], known)
    assert [(g.symbol, g.ensembl) for g in union.genes] == [("C", None), ("B", "E2"), ("D", "E4")]


_GENES = st.lists(
    st.tuples(st.sampled_from("ABCD"), st.sampled_from([None, "E1", "E2", "E3"])),
    unique_by=lambda gene: gene[0],
    min_size=1,
)


@given(st.lists(st.tuples(st.sampled_from(["human", "mouse"]), _GENES), min_size=1, max_size=5))
def test_every_gene_of_every_panel_has_one_place_of_its_species(
    panels: list[tuple[str, list[tuple[str, str | None]]]],
) -> None:
    made = [_panel(species, *genes) for species, genes in panels]
    union = Vocabulary.union(made)
    for panel in made:
        index, unknown = union.places(panel)
        assert unknown == []
        for gene, place in zip(panel.genes, index.tolist(), strict=True):
            found = union.genes[place]
            assert found.species == panel.species
            assert gene.symbol in (found.symbol, *found.also)
            assert gene.ensembl in (None, found.ensembl)
    assert Vocabulary.union(made, union.genes) == union
