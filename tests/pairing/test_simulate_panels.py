"""Simulated panels of other sizes and of mouse: one gene is one gene in all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from pairing.simulate import PanelParams, SimulationParams, SlideParams, simulate
from pairing.simulate.biology import ExpressionModel, draw_model
from pairing.simulate.panel import MARKERS, MIN_GENES, N_GENES, features, genes
from pairing.xenium import open_xenium

EVEN = np.full(len(MARKERS), 1 / len(MARKERS))


@pytest.mark.parametrize("n_genes", [MIN_GENES, 313, N_GENES, 377, 5006])
def test_a_panel_has_as_many_genes_as_it_is_asked_for(n_genes: int) -> None:
    human, mouse = genes(n_genes), genes(n_genes, "mouse")
    assert len(set(human)) == len(set(mouse)) == n_genes
    assert list(human) == sorted(human)
    assert {symbol for words in MARKERS.values() for symbol in words.split()} <= set(human)
    id_of = {f.name: f.id for f in features(5006)}
    assert all(id_of[f.name] == f.id for f in features(n_genes) if f.kind is None)
    assert mouse[0] == "Acta2"
    assert features(n_genes, "mouse")[0].id == id_of["ACTA2"].replace("ENSG", "ENSMUSG")


def test_a_gene_is_of_the_same_biology_in_every_panel() -> None:
    models = [draw_model(np.random.default_rng(1), EVEN, n) for n in (313, 377, 5006)]
    small, medium, large = models
    for model in (medium, large):
        columns = [list(model.genes).index(symbol) for symbol in small.genes]
        for name in ("base", "marker", "state_slope", "niche_slope", "phase", "donor"):
            assert np.array_equal(getattr(model, name)[..., columns], getattr(small, name))
    invented = np.char.startswith(large.genes, "SIMG")
    assert invented.sum() == 5006 - N_GENES
    assert 0.3 < large.ambient[invented].sum() < 0.7


def test_a_mouse_run_is_read_as_one(tmp_path: Path) -> None:
    panel = PanelParams(n_genes=313, species="mouse")
    params = SimulationParams(n_cells=40, panel=panel, slide=SlideParams(mpp=1.0))
    simulate(tmp_path / "run", params)
    with open_xenium(tmp_path / "run" / "outs") as run:
        assert run.species == "mouse"
        assert [gene.symbol for gene in run.genes()] == list(genes(313, "mouse"))
        assert all(g.ensembl and g.ensembl.startswith("ENSMUSG") for g in run.genes())
    model = ExpressionModel.read(tmp_path / "run" / "truth" / "expression" / "D1.npz")
    assert list(model.genes) == list(genes(313, "mouse"))


def test_a_panel_without_markers_is_refused() -> None:
    with pytest.raises(ValidationError):
        PanelParams(n_genes=MIN_GENES - 1)
