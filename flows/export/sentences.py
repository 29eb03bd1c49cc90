"""Gene sentences: the genes of a cell by falling count, as text for a text encoder."""

from __future__ import annotations

import re
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shards.schema import Panel

TOP_K: Final = 50  # of OmiCLIP (Nat Methods 22:1568, 2025)

# Cytosolic ribosomal proteins by HGNC and MGI symbols (RPL10A, RPLP0, RPS4Y1, RPSA, Rpl22l1), and
# genes of the mitochondrial genome (MT-CO1, mt-Nd1): most counted in any cell, and telling little
# of it. Whole symbols, so that the kinases RPS6KA1 … and MTOR stay.
HOUSEKEEPING: Final = r"RP[LS](P?\d+|A)(AL|[AXL]|[LY]?\d)?|MT-.+"
_HOUSEKEEPING = re.compile(HOUSEKEEPING, re.IGNORECASE)


class Sentences:
    """Makes the sentences of one panel."""

    def __init__(self, panel: Panel, top_k: int) -> None:
        symbols = [gene.symbol for gene in panel.genes]
        self._symbols = np.array(symbols, dtype=object)
        self._said = np.array([_HOUSEKEEPING.fullmatch(s) is None for s in symbols], dtype=bool)
        self._top_k = top_k

    def of(self, counts: npt.NDArray[np.unsignedinteger[Any]]) -> str:
        """The symbols of a cell's most counted genes, parted by spaces; "" where it has none.

        `counts` is (2, n) as in the shards: ascending places on the panel, raw counts. Housekeeping
        genes are left out; of genes with the same count the first on the panel comes first.
        """
        genes, values = counts[:, self._said[counts[0]]].astype(np.int64)
        most = np.argsort(-values, kind="stable")[: self._top_k]
        return " ".join(self._symbols[genes[most]])
