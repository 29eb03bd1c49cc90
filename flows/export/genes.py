"""Panels of several runs joined into one list of genes, and what each of them measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from shards.schema import Gene, Panel


@dataclass(frozen=True, slots=True)
class JoinedGenes:
    """The union of panels of one species; `places[panel_id]` says where each panel's genes are.

    Genes are the same if their Ensembl ids are, or, where one has none, their symbols: the rule by
    which the trainer joins panels.
    """

    genes: tuple[Gene, ...]
    places: dict[str, npt.NDArray[np.int64]]

    @classmethod
    def of(cls, panels: Sequence[Panel]) -> JoinedGenes:
        genes: list[Gene] = []
        places = {}
        for panel in panels:
            by_ensembl = {gene.ensembl: i for i, gene in enumerate(genes) if gene.ensembl}
            by_symbol = {gene.symbol: i for i, gene in enumerate(genes)}
            place = []
            for gene in panel.genes:
                found = by_ensembl.get(gene.ensembl) if gene.ensembl else None
                same_symbol = by_symbol.get(gene.symbol)
                if (
                    found is None
                    and same_symbol is not None
                    and not (gene.ensembl and genes[same_symbol].ensembl)
                ):
                    found = same_symbol
                if found is None:
                    found = len(genes)
                    genes.append(gene)
                place.append(found)
            places[panel.panel_id] = np.array(place, np.int64)
        return cls(tuple(genes), places)

    def var(self) -> pd.DataFrame:
        """One row a gene: gene_symbol, ensembl, n_panels, measured_in_all.

        Rows are named by symbol, and by symbol and Ensembl id where several share the symbol.
        """
        measured = self.measured().to_numpy()
        n_of_symbol = Counter(gene.symbol for gene in self.genes)
        return pd.DataFrame(
            {
                "gene_symbol": [gene.symbol for gene in self.genes],
                "ensembl": [gene.ensembl or "" for gene in self.genes],
                "n_panels": measured.sum(axis=1),
                "measured_in_all": measured.all(axis=1),
            },
            index=[
                gene.symbol if n_of_symbol[gene.symbol] == 1 else f"{gene.symbol}-{gene.ensembl}"
                for gene in self.genes
            ],
        )

    def measured(self) -> pd.DataFrame:
        """(genes, panels) bool: a gene that a panel lacks is unmeasured there, not zero."""
        table = {}
        for panel_id, place in self.places.items():
            table[panel_id] = np.isin(np.arange(len(self.genes)), place)
        return pd.DataFrame(table)
