"""The neighbour graph: who is there matters, in which order and beside what padding does not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from shards.errors import BadInput
from trainer.config import GraphConfig
from trainer.genes import GeneInput
from trainer.graph import GraphFusion, NeighborGraph

from .models import GRAPH, some_cells

N_GENES, N_FEATURES = 12, 16


def _graph(**changes: object) -> NeighborGraph:
    torch.manual_seed(0)
    return NeighborGraph(N_GENES, N_FEATURES, GraphConfig.model_validate(GRAPH | changes)).eval()


def _read(graph: NeighborGraph, cells: GeneInput, order: list[int]) -> torch.Tensor:
    assert cells.neighbor_counts_BKG is not None
    assert cells.present_BK is not None
    features: torch.Tensor = graph(
        cells.counts_BG,
        cells.measured_BG,
        cells.neighbor_counts_BKG[:, order],
        cells.present_BK[:, order],
    )
    return features


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(4)), seed=st.integers(0, 100))
def test_the_order_of_neighbours_does_not_matter(order: list[int], seed: int) -> None:
    cells = some_cells(6, N_GENES, k=4, seed=seed)
    graph = _graph()
    torch.testing.assert_close(_read(graph, cells, order), _read(graph, cells, [0, 1, 2, 3]))


def test_padding_does_not_matter_and_neighbours_do() -> None:
    cells = some_cells(8, N_GENES)
    assert cells.neighbor_counts_BKG is not None
    assert cells.present_BK is not None
    graph = _graph()
    features = _read(graph, cells, [0, 1, 2])
    strange_BKG = cells.neighbor_counts_BKG.masked_fill(~cells.present_BK[..., None], 99.0)
    given = cells.counts_BG, cells.measured_BG
    torch.testing.assert_close(graph(*given, strange_BKG, cells.present_BK), features)
    other = graph(*given, cells.neighbor_counts_BKG.flip(2), cells.present_BK)
    has_any_B = cells.present_BK.any(dim=1)
    assert ((other - features).abs().amax(dim=1) > 1e-4).equal(has_any_B)


def test_without_neighbours_the_cell_is_the_graph() -> None:
    cells = some_cells(4, N_GENES)
    graph = _graph()
    none = graph(
        cells.counts_BG, cells.measured_BG, torch.zeros(4, 0, N_GENES), torch.zeros(4, 0) > 0
    )
    absent = graph(
        cells.counts_BG, cells.measured_BG, torch.ones(4, 3, N_GENES), torch.zeros(4, 3) > 0
    )
    assert none.isfinite().all()
    torch.testing.assert_close(absent, none)


def test_attention_is_that_of_the_paper() -> None:
    graph = _graph(layers=1, heads=1)
    cells = some_cells(1, N_GENES, k=2, seed=3)
    assert cells.neighbor_counts_BKG is not None
    counts_NG = torch.cat([cells.counts_BG + 1, cells.neighbor_counts_BKG[0] + 1])
    x_NF = functional.elu(graph.node(graph.standardised(counts_NG, cells.measured_BG)))
    (layer,) = graph.layers
    weights = dict(layer.named_parameters())
    h_NF = x_NF @ weights["linear.weight"].T
    vector = torch.cat([weights["looks_Hd"][0], weights["seen_Hd"][0]])
    logits = torch.stack([vector @ torch.cat([h_NF[0], h_F]) for h_F in h_NF])
    want = functional.leaky_relu(logits, 0.2).softmax(dim=0) @ h_NF + weights["bias_F"]
    got = graph(
        counts_NG[:1], cells.measured_BG, counts_NG[None, 1:], torch.ones(1, 2, dtype=torch.bool)
    )
    torch.testing.assert_close(got[0], want)


def test_the_bias_decides_how_much_of_the_graph_is_taken() -> None:
    cell, graph, other = torch.randn(3, 5, N_FEATURES, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    deaf = GraphFusion(N_FEATURES, GraphConfig.model_validate(GRAPH | {"bias": -100.0}))
    hears = GraphFusion(N_FEATURES, GraphConfig.model_validate(GRAPH))
    hears.load_state_dict(deaf.state_dict())
    torch.testing.assert_close(deaf(cell, graph), deaf(cell, other))
    assert not torch.allclose(hears(cell, graph), hears(cell, other))


def test_half_precision_stays_finite() -> None:
    cells = some_cells(4, N_GENES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph_BF = _read(_graph(), cells, [0, 1, 2])
        fused = GraphFusion(N_FEATURES, GraphConfig.model_validate(GRAPH))(graph_BF, graph_BF)
    assert fused.isfinite().all()


@pytest.mark.parametrize("changes", [{"hidden": 9}, {"hidden": 12, "heads": 3}])
def test_heads_divide_both_widths(changes: dict[str, int]) -> None:
    with pytest.raises(BadInput, match=r"model\.graph\.heads"):
        _graph(**changes)
