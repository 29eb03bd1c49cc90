"""What the device makes of sparse counts, against a slow and plain reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import BadInput
from shards.schema import Gene, Panel
from shards.vocabulary import Vocabulary
from trainer.batch import (
    Batch,
    GenePlaces,
    Neighbors,
    dense_counts,
    dense_neighbors,
)

CPU = torch.device("cpu")
N_GENES = 6

# Of two panels: the place of each gene in a vocabulary of six; two genes may mean the same one.
_places = st.lists(
    st.lists(st.integers(-1, N_GENES - 1), min_size=5, max_size=5), min_size=2, max_size=2
)
_entries = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 4), st.integers(1, 70_000)),
    max_size=30,
)


def _batch(entries: list[tuple[int, int, int, int]], panels: list[int]) -> Batch:
    row, ordinal, gene, count = (
        torch.from_numpy(np.array([e[i] for e in entries], dtype=dtype))
        for i, dtype in enumerate((np.int32, np.uint32, np.uint32, np.uint32))
    )
    return Batch(
        index_B=np.arange(4),
        image_BHWC=torch.zeros(4, 2, 2, 3, dtype=torch.uint8),
        row_N=row,
        gene_N=gene,
        count_N=count,
        panel_B=torch.tensor(panels),
        weight_B=torch.ones(4),
        neighbors=Neighbors(row, ordinal, gene, count),
    )


@settings(max_examples=60, deadline=None)
@given(entries=_entries, places=_places, panels=st.lists(st.integers(0, 1), min_size=4, max_size=4))
def test_dense_counts_and_neighbors_are_those_of_a_loop(
    entries: list[tuple[int, int, int, int]], places: list[list[int]], panels: list[int]
) -> None:
    k = 3
    counts = np.zeros((4, N_GENES))
    around = np.zeros((4, k, N_GENES))
    present = np.zeros((4, k), dtype=bool)
    for row, ordinal, gene, count in entries:
        place = places[panels[row]][gene]
        if place >= 0:
            counts[row, place] += count
        if ordinal < k:
            present[row, ordinal] = True
            if place >= 0:
                around[row, ordinal, place] += count
    batch = _batch(entries, panels).to(CPU)
    known = GenePlaces(
        torch.tensor(places), torch.ones(2, N_GENES, dtype=torch.bool), torch.zeros(2)
    )
    np.testing.assert_array_equal(dense_counts(batch, known, N_GENES).numpy(), counts)
    found_BKG, present_BK = dense_neighbors(batch, known, N_GENES, k)
    np.testing.assert_array_equal(found_BKG.numpy(), around)
    np.testing.assert_array_equal(present_BK.numpy(), present)


def test_a_batch_read_without_neighbors_has_none_to_give() -> None:
    batch = Batch(**{f: getattr(_batch([], [0] * 4), f) for f in _FIELDS}).to(CPU)
    known = GenePlaces(torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, N_GENES), torch.zeros(1))
    with pytest.raises(ValueError, match="without neighbours"):
        dense_neighbors(batch, known, N_GENES, 2)


_FIELDS = ("index_B", "image_BHWC", "row_N", "gene_N", "count_N", "panel_B", "weight_B")


def test_on_its_device_a_batch_is_of_types_to_compute_with() -> None:
    batch = _batch([(0, 0, 1, 3), (2, 1, 4, 70_000)], [0] * 4).to(CPU)
    assert batch.neighbors is not None
    assert batch.image_BHWC.dtype == torch.uint8
    assert {t.dtype for t in (batch.row_N, batch.gene_N, batch.neighbors.ordinal_M)} == {
        torch.int64
    }
    assert batch.count_N.dtype == batch.neighbors.count_M.dtype == torch.float32
    assert batch.count_N.tolist() == [3, 70_000]


def test_places_of_panels_of_different_widths() -> None:
    def panel(*symbols: str) -> Panel:
        return Panel.of("human", [Gene(symbol=s, ensembl=None) for s in symbols])

    vocabulary = Vocabulary.union([panel("A", "B", "C")])
    places = GenePlaces.of(vocabulary, [panel("C", "X", "A", "Y"), panel("B")])
    assert places.places_PG.tolist() == [[2, -1, 0, -1], [1, -1, -1, -1]]
    assert places.measured_PG.tolist() == [[True, False, True], [False, True, False]]
    with pytest.raises(BadInput, match="genes that the model knows"):
        GenePlaces.of(vocabulary, [panel("X")])
