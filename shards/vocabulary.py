"""The union of gene panels: which genes are the same, and where a panel's genes are in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from shards.schema import Gene, Panel, Record

# What tells genes apart: species, then the Ensembl id, or the symbol where none is known.
_Key = tuple[str, str | None, str | None]
_VERSIONED = re.compile(r"(ENS[A-Z]*G\d{11})\.\d+")


class VocabularyGene(Record):
    """One gene of the union of panels; `also` are other symbols that its Ensembl id goes by."""

    species: str
    symbol: str
    ensembl: str | None
    also: tuple[str, ...] = ()


class Vocabulary(Record):
    """The genes of a union, in order; a model's input, which a checkpoint keeps."""

    genes: tuple[VocabularyGene, ...]

    @classmethod
    def union(cls, panels: Sequence[Panel], known: Sequence[VocabularyGene] = ()) -> Vocabulary:
        """The `known` genes, then every other gene of the panels as they first name it.

        Genes of one species are the same if their Ensembl ids are, whatever their versions and
        symbols. A gene without one is the gene of its symbol where all that have this symbol and an
        id have the same; where two ids share the symbol it is a gene of its own: nobody says which.
        """
        ids = _Ids()
        ids.learn(known)
        for panel in panels:
            ids.learn(_of(panel))
        genes = list(known)
        place = _places(ids, genes)
        for panel in panels:
            for gene in _of(panel):
                key = ids.key(gene)
                if key not in place:
                    place[key] = len(genes)
                    genes.append(gene.model_copy(update={"ensembl": key[1]}))
                same = genes[place[key]]
                if gene.symbol not in (same.symbol, *same.also):
                    also = (*same.also, gene.symbol)
                    genes[place[key]] = same.model_copy(update={"also": also})
        return cls(genes=tuple(genes))

    @property
    def species(self) -> tuple[str, ...]:
        """In the order in which the genes first name them."""
        return tuple(dict.fromkeys(gene.species for gene in self.genes))

    def places(self, panel: Panel) -> tuple[npt.NDArray[np.int64], list[str]]:
        """For each gene of the panel its place here, -1 if unknown; and the unknown symbols."""
        ids = _Ids()
        ids.learn(self.genes)
        ids.learn(_of(panel))
        place = _places(ids, self.genes)
        index = np.array([place.get(ids.key(gene), -1) for gene in _of(panel)], dtype=np.int64)
        unknown = [g.symbol for g, found in zip(panel.genes, index, strict=True) if found < 0]
        return index, unknown


def without_version(ensembl: str | None) -> str | None:
    """An Ensembl id without its version, as ENSG00000141510 of ENSG00000141510.18."""
    told = _VERSIONED.fullmatch(ensembl or "")
    return told[1] if told else ensembl


class _Ids:
    """The Ensembl ids that go with each symbol, as far as panels say."""

    def __init__(self) -> None:
        self._of_symbol: dict[tuple[str, str], set[str]] = {}

    def learn(self, genes: Iterable[VocabularyGene]) -> None:
        for gene in genes:
            if gene.ensembl is None:
                continue
            for symbol in (gene.symbol, *gene.also):
                self._of_symbol.setdefault((gene.species, symbol), set()).add(gene.ensembl)

    def key(self, gene: VocabularyGene) -> _Key:
        if gene.ensembl is not None:
            return gene.species, gene.ensembl, None
        ids = self._of_symbol.get((gene.species, gene.symbol), set())
        if len(ids) == 1:
            return gene.species, next(iter(ids)), None
        return gene.species, None, gene.symbol


def _places(ids: _Ids, genes: Sequence[VocabularyGene]) -> dict[_Key, int]:
    """Where each gene is; of several that are one the first."""
    return {ids.key(gene): i for i, gene in reversed(list(enumerate(genes)))}


def _of(panel: Panel) -> list[VocabularyGene]:
    return [_named(panel.species, gene) for gene in panel.genes]


def _named(species: str, gene: Gene) -> VocabularyGene:
    ensembl = without_version(gene.ensembl)
    return VocabularyGene(species=species, symbol=gene.symbol, ensembl=ensembl)
