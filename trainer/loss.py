"""What pulls pairs together, with negatives from all ranks.

Each rank computes its part of one global loss: its own rows against the columns of all ranks. The
parts of all ranks add up to what one device would compute on all rows, and so do the gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainer.config import LossConfig
from trainer.distributed import World

_SIGLIP_COLUMNS: Final = 1024  # at a time: rows of a rank × these, not × the global batch


class PairLoss(nn.Module):
    """One of three losses of pairs, with its learned temperature and, for SigLIP, bias."""

    bias: nn.Parameter | None

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.kind = config.kind
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))
        self._log_bounds = math.log(config.temperature_min), math.log(config.temperature_max)
        siglip = config.kind == "siglip"
        self.bias = nn.Parameter(torch.tensor(config.siglip_bias)) if siglip else None

    @property
    def temperature(self) -> torch.Tensor:
        """Scalar, inside its bounds."""
        return self.log_temperature.clamp(*self._log_bounds).exp()

    def forward(
        self,
        z_image_BD: torch.Tensor,
        z_gene_BD: torch.Tensor,
        weight_B: torch.Tensor,
        sample_B: torch.Tensor,
        world: World,
    ) -> torch.Tensor:
        """This rank's part of the loss, a scalar, normalised by the weight of all ranks' rows.

        `z_image_BD` and `z_gene_BD` are float32 of unit length, B the same on all ranks. Rows of
        `weight_B` 0 are padding: neither query nor candidate, whatever they hold. `sample_B` names,
        in int64, the sample of each row: rows of the same one are no negatives of each other.
        Without a row that counts, the loss is 0.
        """
        # A step may carry the parameter past its bound, where clamping alone has no gradient to
        # bring it back; CLIP clips it likewise.
        with torch.no_grad():
            self.log_temperature.clamp_(*self._log_bounds)
        pairs = _gathered(z_image_BD, z_gene_BD, weight_B, sample_B, world)
        if self.kind == "info_nce":
            return _info_nce(pairs, self.temperature)
        if self.bias is not None:
            return _siglip(pairs, self.temperature, self.bias)
        return _soft_targets(pairs, self.temperature, world)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The B rows of a rank beside the N columns of all ranks; padding is zeros in both."""

    image_BD: torch.Tensor
    gene_BD: torch.Tensor
    image_ND: torch.Tensor
    gene_ND: torch.Tensor
    share_B: torch.Tensor  # of the weight of all ranks
    padding_N: torch.Tensor
    sample_B: torch.Tensor
    sample_N: torch.Tensor
    own_B: torch.Tensor  # the column of each row's own pair

    def is_own(self, columns: slice) -> torch.Tensor:
        """(B, columns)"""
        column_N = torch.arange(len(self.padding_N), device=self.own_B.device)
        return self.own_B[:, None] == column_N[columns]

    def hidden(self, columns: slice, *, repeats: bool) -> torch.Tensor:
        """(B, columns): no candidates of the row; its own pair never is one of them.

        Padding sees its own pair too, or its softmax would run over nothing. `repeats`: other rows
        of the same sample are hidden.
        """
        hidden_BC = self.padding_N[columns].expand(len(self.own_B), -1)
        if repeats:
            hidden_BC = hidden_BC | (self.sample_B[:, None] == self.sample_N[columns])
        return hidden_BC & ~self.is_own(columns)


def _gathered(
    z_image_BD: torch.Tensor,
    z_gene_BD: torch.Tensor,
    weight_B: torch.Tensor,
    sample_B: torch.Tensor,
    world: World,
) -> _Pairs:
    padding_B1 = weight_B[:, None] == 0
    # Both in one tensor: one exchange forward and one backward, in an order that cannot differ.
    z_B2D = torch.stack([z_image_BD, z_gene_BD], dim=1).masked_fill(padding_B1[:, None], 0)
    z_N2D = world.gather(z_B2D)
    weight_N = world.gather(weight_B)
    # Where nothing counts, each share is 0 of a tiny total, not 0 / 0.
    total = weight_N.sum().clamp_min(torch.finfo(weight_N.dtype).tiny)
    n_rows = len(weight_B)
    return _Pairs(
        image_BD=z_B2D[:, 0],
        gene_BD=z_B2D[:, 1],
        image_ND=z_N2D[:, 0],
        gene_ND=z_N2D[:, 1],
        share_B=weight_B / total,
        padding_N=weight_N == 0,
        sample_B=sample_B,
        sample_N=world.gather(sample_B),
        own_B=world.rank * n_rows + torch.arange(n_rows, device=weight_B.device),
    )


def _info_nce(pairs: _Pairs, temperature: torch.Tensor) -> torch.Tensor:
    """Mean of both directions' cross-entropy, the own pair the class: CLIP, arXiv 2103.00020."""
    hidden_BN = pairs.hidden(slice(None), repeats=True)
    both_B = torch.zeros_like(pairs.share_B)
    for query_BD, key_ND in ((pairs.image_BD, pairs.gene_ND), (pairs.gene_BD, pairs.image_ND)):
        logits_BN = (query_BD @ key_ND.T / temperature).masked_fill(hidden_BN, -torch.inf)
        both_B = both_B + functional.cross_entropy(logits_BN, pairs.own_B, reduction="none")
    return pairs.share_B @ both_B / 2


def _siglip(pairs: _Pairs, temperature: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """-Σ log sigmoid(±(image · gene / t + b)) over all pairs of a row: SigLIP, arXiv 2303.15343.

    + for a row's own pair, - for the others. Columns come in chunks that are computed again in the
    backward pass, so that no (B, N) matrix is ever held.
    """

    def chunk(gene_CD: torch.Tensor, columns: slice) -> torch.Tensor:
        logits_BC = pairs.image_BD @ gene_CD.T / temperature + bias
        signed_BC = torch.where(pairs.is_own(columns), logits_BC, -logits_BC)
        hidden_BC = pairs.hidden(columns, repeats=True)
        per_row_B = -functional.logsigmoid(signed_BC).masked_fill(hidden_BC, 0).sum(dim=1)
        return pairs.share_B @ per_row_B

    part = pairs.share_B.new_zeros(())
    for start in range(0, len(pairs.gene_ND), _SIGLIP_COLUMNS):
        columns = slice(start, start + _SIGLIP_COLUMNS)
        part = part + checkpoint(
            chunk,
            pairs.gene_ND[columns],
            columns,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return part


def _soft_targets(pairs: _Pairs, temperature: torch.Tensor, world: World) -> torch.Tensor:
    """PAST's loss (arXiv 2507.06418, as BLEEP's): similar pairs are each other's targets.

    With cells C and images I: T = softmax((I Iᵀ + C Cᵀ) / 2t) by rows, logits L = C Iᵀ / t, and the
    mean over rows of (CE(L, T) + CE(Lᵀ, Tᵀ)) / 2; gradients flow through T too. Other rows of the
    same sample stay candidates: T gives them the share that is theirs.
    """
    hidden_BN = pairs.hidden(slice(None), repeats=False)
    similarity_BN = (pairs.image_BD @ pairs.image_ND.T + pairs.gene_BD @ pairs.gene_ND.T) / 2
    similarity_BN = (similarity_BN / temperature).masked_fill(hidden_BN, -torch.inf)
    norm_B = similarity_BN.logsumexp(dim=1)
    # The similarity is symmetric, so that a column of T is this rank's row by the others' norms.
    target_BN = (similarity_BN - norm_B[:, None]).exp()
    transposed_BN = (similarity_BN - world.gather(norm_B)).exp()
    cross_B = torch.zeros_like(pairs.share_B)
    for query_BD, key_ND, wanted_BN in (
        (pairs.gene_BD, pairs.image_ND, target_BN),
        (pairs.image_BD, pairs.gene_ND, transposed_BN),
    ):
        # Hidden logits stay finite, for 0 of the target times -inf would be no number.
        logits_BN = query_BD @ key_ND.T / temperature
        norm_B1 = logits_BN.masked_fill(hidden_BN, -torch.inf).logsumexp(dim=1, keepdim=True)
        cross_B = cross_B + (wanted_BN * (norm_B1 - logits_BN)).sum(dim=1)
    return pairs.share_B @ cross_B / 2
