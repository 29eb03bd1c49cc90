"""Expression predicted from an embedding, judged by the likelihood of the raw counts."""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import nn
from torch.nn import functional

Family = Literal["negative_binomial", "poisson"]

_EXACT: Final = 40.0  # log(1 + exp(x)) is x above this, in double precision


class ExpressionHead(nn.Module):
    """From features to each gene's share of a cell's transcripts.

    With ρ the softmax over the cell's measured genes and l its transcripts of them, a count x has
    the mean μ = l ρ, as in scVI (Lopez et al., Nature Methods 15:1053, 2018). Of `family`

        negative_binomial  log p(x) = log Γ(x + θ) - log Γ(θ) - log x! - θ log(1 + μ/θ)
                                      - x log(1 + θ/μ), with a dispersion θ learned for each gene
        poisson            log p(x) = x log μ - μ - log x!
    """

    log_dispersion_G: nn.Parameter | None

    def __init__(self, n_features: int, n_genes: int, family: Family) -> None:
        super().__init__()
        self.share = nn.Linear(n_features, n_genes)
        dispersed = family == "negative_binomial"
        self.log_dispersion_G = nn.Parameter(torch.zeros(n_genes)) if dispersed else None

    def forward(
        self,
        features_BF: torch.Tensor,
        counts_BG: torch.Tensor,
        measured_BG: torch.Tensor,
        mask_BG: torch.Tensor,
    ) -> torch.Tensor:
        """(B,) float32: mean of -log p over the genes of `mask_BG`; 0 where it holds none.

        `counts_BG` are raw, 0 where `measured_BG` (bool) is false; `mask_BG` (bool) lies within it.
        A cell without transcripts has no shares to tell: 0.
        """
        library_B1 = counts_BG.sum(dim=1, keepdim=True)
        mask_BG = mask_BG & (library_B1 > 0)
        logits_BG = self.share(features_BF).float()
        lowest = torch.finfo(logits_BG.dtype).min  # not -inf: a row may measure nothing
        log_share_BG = logits_BG.masked_fill(~measured_BG, lowest).log_softmax(dim=1)
        # Terms of the size of x log x cancel: in float32, a count of 1e5 leaves an error of 0.1.
        log_mean_BG = log_share_BG.double() + library_B1.double().log()
        nll_BG = self._nll(counts_BG.double(), log_mean_BG.masked_fill(~mask_BG, 0))
        nll_B = nll_BG.masked_fill(~mask_BG, 0).sum(dim=1) / mask_BG.sum(dim=1).clamp_min(1)
        return nll_B.float()

    def _nll(self, x_BG: torch.Tensor, log_mean_BG: torch.Tensor) -> torch.Tensor:
        log_factorial_BG = torch.lgamma(x_BG + 1)
        if self.log_dispersion_G is None:
            return log_mean_BG.exp() - x_BG * log_mean_BG + log_factorial_BG
        log_theta_G = self.log_dispersion_G.double()
        theta_G = log_theta_G.exp()
        log_odds_BG = log_mean_BG - log_theta_G
        return (
            torch.lgamma(theta_G)
            - torch.lgamma(x_BG + theta_G)
            + log_factorial_BG
            + theta_G * functional.softplus(log_odds_BG, threshold=_EXACT)
            + x_BG * functional.softplus(-log_odds_BG, threshold=_EXACT)
        )
