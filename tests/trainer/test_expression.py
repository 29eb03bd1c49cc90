"""The expression head against the likelihoods that torch.distributions has."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch.distributions import Distribution, NegativeBinomial, Poisson

from trainer.expression import ExpressionHead

Family = Literal["negative_binomial", "poisson"]
FAMILIES: tuple[Family, ...] = ("negative_binomial", "poisson")


def head_of(family: Family, n_genes: int, seed: int) -> ExpressionHead:
    torch.manual_seed(seed)
    head = ExpressionHead(3, n_genes, family)
    if head.log_dispersion_G is not None:
        torch.nn.init.normal_(head.log_dispersion_G, std=2.0)
    return head


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_mean_of_the_log_probabilities(family: Family, seed: int) -> None:
    head = head_of(family, 20, seed)
    features_BF = torch.randn(6, 3)
    measured_BG = torch.rand(6, 20) < 0.7
    counts_BG = torch.randint(0, 40, (6, 20)) * measured_BG.float()
    mask_BG = measured_BG & (torch.rand(6, 20) < 0.5)
    mask_BG[4] = False
    counts_BG[5] = 0
    found_B = head(features_BF, counts_BG, measured_BG, mask_BG)

    for b in range(6):
        m = measured_BG[b]
        share = head.share(features_BF[b])[m].double().softmax(dim=0)
        mean = share * counts_BG[b].sum() + 1e-300  # the cell without transcripts
        law: Distribution = Poisson(mean)
        if head.log_dispersion_G is not None:
            log_theta = head.log_dispersion_G[m].double()
            law = NegativeBinomial(log_theta.exp(), logits=mean.log() - log_theta)
        log_p = law.log_prob(counts_BG[b, m].double())[mask_BG[b, m]]
        want = -log_p.mean() if len(log_p) else torch.tensor(0.0)
        assert found_B[b].item() == pytest.approx(want.item(), rel=1e-5, abs=1e-6)
    assert found_B.shape == (6,)
    assert found_B.dtype == torch.float32
    assert (found_B[4:] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_extremes_have_finite_values_and_gradients(family: Family) -> None:
    """Counts of 1e5, cells without any, shares of nothing and of all, panels without a gene."""
    head = ExpressionHead(3, 6, family)
    if head.log_dispersion_G is not None:
        with torch.no_grad():
            head.log_dispersion_G.copy_(torch.tensor([-20.0, -5, 0, 5, 20, 60]))
    counts_BG = torch.zeros(5, 6)
    counts_BG[0] = 1e5
    counts_BG[1, 0] = 1
    counts_BG[2, 5] = 1e5
    measured_BG = torch.ones(5, 6, dtype=torch.bool)
    measured_BG[3] = False
    for size in (0.0, 1.0, 300.0):
        features_BF = (torch.eye(3).repeat(2, 1)[:5] * size).requires_grad_()
        nll_B = head(features_BF, counts_BG, measured_BG, measured_BG)
        assert nll_B.isfinite().all()
        assert (nll_B[3:] == 0).all()
        nll_B.sum().backward()
        assert features_BF.grad is not None
        assert features_BF.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_large_counts_and_dispersions_keep_their_digits() -> None:
    """A large count at its mean has the density of a normal law there, of the same variance."""
    head = ExpressionHead(1, 2, "negative_binomial")
    poisson = ExpressionHead(1, 2, "poisson")
    assert head.log_dispersion_G is not None
    torch.nn.init.constant_(head.log_dispersion_G, 20.0)
    features, counts = torch.zeros(1, 1), torch.full((1, 2), 1e5)
    everything = torch.ones(1, 2, dtype=torch.bool)
    variances = (1e5 * (1 + 1e5 / math.exp(20)), 1e5)
    for h, variance in zip((head, poisson), variances, strict=True):
        torch.nn.init.zeros_(h.share.bias)
        nll = h(features, counts, everything, everything).item()
        assert nll == pytest.approx(math.log(2 * math.pi * variance) / 2, abs=1e-5)


def test_learning_finds_the_shares_and_the_dispersion() -> None:
    torch.manual_seed(0)
    share_G, theta = torch.tensor([0.6, 0.3, 0.1]), 2.0
    mean_BG = share_G.expand(4000, 3) * 60
    counts_BG = NegativeBinomial(theta, logits=(mean_BG / theta).log()).sample()
    head = ExpressionHead(1, 3, "negative_binomial")
    assert head.log_dispersion_G is not None
    everything_BG = torch.ones(4000, 3, dtype=torch.bool)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        nll_B = head(torch.ones(4000, 1), counts_BG, everything_BG, everything_BG)
        nll_B.mean().backward()
        optimizer.step()
    found_G = head.share(torch.ones(1, 1)).softmax(dim=1)[0]
    torch.testing.assert_close(found_G, share_G, atol=0.05, rtol=0)
    # Knowing a cell's total takes out some of the spread: above the true 2.
    assert (head.log_dispersion_G.exp() > 1.5).all()
