"""The panels of a dataset joined, one table a species, for readers that have no code of ours."""

from __future__ import annotations

from collections.abc import Iterable

from shards.schema import Panel, Record, digest
from shards.vocabulary import Vocabulary, without_version


class UnionGene(Record):
    """One gene of the union: as its first panel names it, and its other symbols."""

    symbol: str
    ensembl: str | None
    also: tuple[str, ...] = ()


class PanelUnion(Record):
    """`panels/union-<species>-<union_id>.json`: the genes that the panels of a species measure.

    `places[panel_id][i]` is the row here of gene i of that panel. A gene that none of a panel's
    places names is unmeasured by it, not zero. Places that come twice are of genes that a panel
    lists apart and that share an Ensembl id: their counts add up.
    """

    union_id: str
    species: str
    genes: tuple[UnionGene, ...]
    places: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, panels: Iterable[Panel]) -> PanelUnion:
        """Of panels of one species; one more at the end moves no gene of those before it."""
        ordered = tuple(panels)
        (species,) = {panel.species for panel in ordered}
        vocabulary = Vocabulary.union(ordered)
        genes = tuple(
            UnionGene(symbol=gene.symbol, ensembl=gene.ensembl, also=gene.also)
            for gene in vocabulary.genes
        )
        places = {panel.panel_id: tuple(vocabulary.places(panel)[0].tolist()) for panel in ordered}
        body = [species, [gene.model_dump() for gene in genes], places]
        return cls(union_id=digest(body), species=species, genes=genes, places=places)


def unions_of(panels: Iterable[Panel]) -> dict[str, PanelUnion]:
    """The union of the panels of each species, by species in the order of their names."""
    of_species: dict[str, list[Panel]] = {}
    for panel in panels:
        of_species.setdefault(panel.species, []).append(panel)
    return {species: PanelUnion.of(of_species[species]) for species in sorted(of_species)}


def union_path(union: PanelUnion) -> str:
    """Where a dataset keeps it, relative to its root; a species is any text."""
    slug = "".join(c if c.isascii() and c.isalnum() else "-" for c in union.species)[:24]
    return f"panels/union-{slug}-{union.union_id}.json"


def names_that_differ(panels: Iterable[Panel]) -> list[str]:
    """Genes that panels of one species do not name alike, a line for each, sorted.

    One Ensembl id under several symbols is one gene that was renamed; one symbol with several ids,
    or with an id here and two elsewhere, is several genes of one name. Within one panel an id under
    two symbols is one gene listed twice.
    """
    symbols: dict[tuple[str, str], set[str]] = {}
    ids: dict[tuple[str, str], set[str]] = {}
    twice: set[tuple[str, str, tuple[str, ...]]] = set()
    for panel in panels:
        here: dict[str, list[str]] = {}
        for gene in panel.genes:
            ensembl = without_version(gene.ensembl)
            if ensembl is not None:
                here.setdefault(ensembl, []).append(gene.symbol)
                symbols.setdefault((panel.species, ensembl), set()).add(gene.symbol)
                ids.setdefault((panel.species, gene.symbol), set()).add(ensembl)
        twice |= {(panel.species, e, tuple(sorted(s))) for e, s in here.items() if len(s) > 1}
    lines = [
        f"{species}: {ensembl} is {_listed(names)}: one gene, renamed"
        for (species, ensembl), names in symbols.items()
        if len(names) > 1 and (species, ensembl, tuple(sorted(names))) not in twice
    ]
    lines += [
        f"{species}: one panel lists {ensembl} as {_listed(names)}: one gene, counts add up"
        for species, ensembl, names in twice
    ]
    lines += [
        f"{species}: {_listed([symbol])} is {_listed(found)}: genes of their own"
        for (species, symbol), found in ids.items()
        if len(found) > 1
    ]
    return sorted(lines)


def _listed(names: Iterable[str]) -> str:
    # A symbol may hold anything; a line of a log is one line.
    return " and ".join(n if n.isprintable() else repr(n) for n in sorted(names))
