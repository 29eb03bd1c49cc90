"""The whole model, of every kind: what comes out, what is learned, what is not seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from shards.errors import BadInput
from trainer.config import OptimConfig
from trainer.distributed import World
from trainer.model import PairModel
from trainer.presets import PRESETS
from trainer.towers import ImageTower

from .models import loss_config, model_config, some_cells

N_GENES, N_SPECIES, B = 20, 2, 6
TERMS = {"image_expression": 1.0, "masked_genes": 1.0, "masked_share": 0.3}


def _model(preset: str = "small", **loss: Any) -> PairModel:
    torch.manual_seed(0)
    return PairModel(N_GENES, N_SPECIES, model_config(preset), loss_config(preset, **loss))


def _images() -> torch.Tensor:
    return torch.rand(B, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _masked() -> torch.Tensor:
    return torch.rand(B, N_GENES, generator=torch.Generator().manual_seed(1)) < 0.3


@pytest.mark.parametrize(
    ("preset", "kind"), [("small", "info_nce"), ("small", "siglip"), ("past", "soft_targets")]
)
def test_every_parameter_learns_where_all_terms_are_on(preset: str, kind: str) -> None:
    model = _model(preset, kind=kind, **TERMS)
    cells = some_cells(B, N_GENES)
    model.fit(cells.counts_BG, cells.measured_BG)
    embedded = model(_images(), cells, _masked())
    z_image_BD, z_gene_BD = embedded.z_image_BD, embedded.z_gene_BD
    for z_BD in (z_image_BD, z_gene_BD):
        assert z_BD.dtype == torch.float32
        torch.testing.assert_close(z_BD.norm(dim=1), torch.ones(B))
    alone = World(torch.device("cpu"))
    part = model.pair_loss(z_image_BD, z_gene_BD, torch.ones(B), torch.arange(B), alone)
    (part + embedded.image_expression_B.mean() + embedded.masked_genes_B.mean()).backward()
    still = set()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not parameter.grad.any():
            still.add(name)
    assert still == set()


def test_terms_that_are_off_cost_nothing_and_inputs_may_be_absent() -> None:
    model = _model()
    cells = some_cells(B, N_GENES)
    embedded = model(_images(), cells)
    assert embedded.image_expression_B is None
    assert embedded.masked_genes_B is None
    assert not any("expression" in name for name, _ in model.named_parameters())
    only_image, only_genes = model(_images(), None), model(None, cells)
    assert only_image.z_gene_BD is None
    assert only_genes.z_image_BD is None
    both_on = _model(**TERMS)
    assert both_on(_images(), None).image_expression_B is None
    assert both_on(None, cells).masked_genes_B is None


@pytest.mark.parametrize("preset", ["small", "past"])
def test_embedding_alone_equals_the_forward_pass(preset: str) -> None:
    model = _model(preset).eval()
    cells = some_cells(B, N_GENES)
    embedded = model(_images(), cells)
    torch.testing.assert_close(model.embed_image(_images()), embedded.z_image_BD)
    torch.testing.assert_close(model.embed_counts(cells), embedded.z_gene_BD)


@pytest.mark.parametrize("preset", ["small", "past"])
def test_masked_genes_are_hidden_from_the_encoder_and_scored_where_measured(preset: str) -> None:
    model = _model(preset, **TERMS).eval()
    cells, masked_BG = some_cells(B, N_GENES), _masked()
    assert cells.neighbor_counts_BKG is not None
    seen = model(None, cells, masked_BG)
    more = replace(
        cells,
        counts_BG=torch.where(masked_BG, cells.counts_BG + 7, cells.counts_BG),
        neighbor_counts_BKG=cells.neighbor_counts_BKG + 7 * masked_BG[:, None],
    )
    hidden = model(None, more, masked_BG)
    torch.testing.assert_close(hidden.z_gene_BD, seen.z_gene_BD)
    assert not torch.allclose(hidden.masked_genes_B, seen.masked_genes_B)
    unmeasured_BG = cells.measured_BG == 0
    nothing = model(None, cells, masked_BG & unmeasured_BG)
    assert torch.equal(nothing.masked_genes_B, torch.zeros(B))
    whole = model(None, cells, torch.zeros_like(masked_BG))
    torch.testing.assert_close(whole.z_gene_BD, model.embed_counts(cells))


@pytest.mark.parametrize("preset", ["small", "past"])
def test_unmeasured_counts_never_matter(preset: str) -> None:
    model = _model(preset, **TERMS).eval()
    cells = some_cells(B, N_GENES)
    strange_BG = torch.where(cells.measured_BG > 0, cells.counts_BG, 1000.0)
    plain, strange = (
        model(_images(), c, _masked()) for c in (cells, replace(cells, counts_BG=strange_BG))
    )
    for name in ("z_gene_BD", "image_expression_B", "masked_genes_B"):
        torch.testing.assert_close(getattr(strange, name), getattr(plain, name))


def test_a_graph_without_neighbours_given_is_refused() -> None:
    cells = replace(some_cells(B, N_GENES), neighbor_counts_BKG=None, present_BK=None)
    with pytest.raises(ValueError, match="takes neighbours"):
        _model("past")(None, cells)


def test_every_parameter_is_in_one_group_and_the_image_tower_has_its_own_rate() -> None:
    model = _model("past", **TERMS)
    optim = OptimConfig.model_validate(PRESETS["past"]["optim"])
    groups = model.parameter_groups(optim)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    image = {id(p) for p in model.image.parameters()}
    for group in groups:
        for p in group["params"]:
            assert group["lr_scale"] == (0.1 if id(p) in image else 1.0)
            assert group["weight_decay"] == (0.02 if p.ndim >= 2 else 0.0)
    torch.optim.AdamW(groups, lr=optim.lr)


def test_means_belong_to_ranks(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="only ranks"):
        _model().set_means([], tmp_path / "means.csv")


def test_activations_can_be_left_out_and_nothing_changes() -> None:
    image = ImageTower(model_config())
    plain = image(_images())
    plain.sum().backward()
    gradients = {name: p.grad for name, p in image.named_parameters()}
    image.zero_grad()
    image.checkpoint_activations()
    again = image(_images())
    again.sum().backward()
    torch.testing.assert_close(again, plain)
    for name, p in image.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name])


def test_a_network_sees_its_own_mean_and_spread_or_those_given() -> None:
    own = timm.get_pretrained_cfg("test_vit")
    assert own is not None
    assert ImageTower(model_config()).mean.flatten().tolist() == pytest.approx(own.mean)
    overlay = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    tower = ImageTower(model_config(image_options={"pretrained_cfg_overlay": overlay}))
    assert tower.mean.flatten().tolist() == pytest.approx(overlay["mean"])
    assert tower.std.flatten().tolist() == pytest.approx(overlay["std"])


def test_options_that_no_network_takes_are_refused() -> None:
    with pytest.raises(BadInput, match=r"model\.image_options[\s\S]*deepness"):
        ImageTower(model_config(image_options={"deepness": 3}))


def test_the_preset_past_is_as_large_as_the_model_that_it_copies() -> None:
    config = model_config("past", **PRESETS["past"]["model"])
    with torch.device("meta"):
        model = PairModel(20_340, 2, config, loss_config("past"))

    def millions(module: torch.nn.Module) -> float:
        return sum(p.numel() for p in module.parameters()) / 1e6

    assert millions(model.image) == pytest.approx(303.4, abs=0.1)
    blocks = sum(p.numel() for b in model.gene.blocks for p in b.parameters()) / 1e6
    assert blocks == pytest.approx(25.2, abs=0.1)
    assert millions(model.gene) - blocks == pytest.approx(10.6, abs=0.1)
