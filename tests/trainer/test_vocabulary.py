"""The union of panels: which genes are the same."""

from __future__ import annotations

from shards.schema import Gene, Panel
from trainer.vocabulary import Vocabulary


def _panel(species: str, *genes: tuple[str, str | None]) -> Panel:
    return Panel.of(species, [Gene(symbol=s, ensembl=e) for s, e in genes])


def test_union_of_panels_knows_a_gene_by_ensembl_then_by_symbol() -> None:
    first = _panel("human", ("A", "E1"), ("B", "E2"), ("C", None))
    second = _panel("human", ("A-renamed", "E1"), ("B", None), ("C", "E3"), ("B", "E9"))
    third = _panel("mouse", ("A", None))
    union = Vocabulary.union([first, second, third])
    assert [(g.species, g.symbol, g.ensembl) for g in union.genes] == [
        ("human", "A", "E1"),
        ("human", "B", "E2"),
        ("human", "C", None),
        ("human", "B", "E9"),
        ("mouse", "A", None),
    ]
    index, unknown = Vocabulary.union([first]).places(second)
    assert index.tolist() == [0, 1, 2, -1]
    assert unknown == ["B"]
