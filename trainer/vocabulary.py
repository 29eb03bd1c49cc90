"""The union of gene panels: the genes that a model knows, and where a panel's genes are in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shards.order import Indices
from shards.schema import Panel, Record


class VocabularyGene(Record):
    """One gene of the union of panels."""

    species: str
    symbol: str
    ensembl: str | None


class Vocabulary(Record):
    """The genes that a model knows, in the order of its input; a checkpoint keeps it."""

    genes: tuple[VocabularyGene, ...]

    @classmethod
    def union(cls, panels: Sequence[Panel], known: Sequence[VocabularyGene] = ()) -> Vocabulary:
        """The `known` genes, then every other gene of the panels as they first name it.

        Genes are the same if their Ensembl ids are, or, where one has none, species and symbol.
        """
        genes = list(known)
        for panel in panels:
            index, _ = _matched(genes, panel)
            for gene, found in zip(panel.genes, index, strict=True):
                if found < 0:
                    genes.append(
                        VocabularyGene(
                            species=panel.species, symbol=gene.symbol, ensembl=gene.ensembl
                        )
                    )
        return cls(genes=tuple(genes))

    @property
    def species(self) -> tuple[str, ...]:
        """In the order in which the genes first name them."""
        return tuple(dict.fromkeys(gene.species for gene in self.genes))

    def places(self, panel: Panel) -> tuple[Indices, list[str]]:
        """For each gene of the panel its place here, -1 if unknown; and the unknown symbols."""
        return _matched(self.genes, panel)


def _matched(genes: Sequence[VocabularyGene], panel: Panel) -> tuple[Indices, list[str]]:
    by_ensembl = {(g.species, g.ensembl): i for i, g in enumerate(genes) if g.ensembl}
    by_symbol = {(g.species, g.symbol): i for i, g in enumerate(genes)}
    index = np.full(len(panel.genes), -1, dtype=np.int64)
    unknown = []
    for i, gene in enumerate(panel.genes):
        place = by_ensembl.get((panel.species, gene.ensembl), -1) if gene.ensembl else -1
        same_symbol = by_symbol.get((panel.species, gene.symbol), -1)
        if place < 0 <= same_symbol and not (gene.ensembl and genes[same_symbol].ensembl):
            place = same_symbol
        index[i] = place
        if place < 0:
            unknown.append(gene.symbol)
    return index, unknown
