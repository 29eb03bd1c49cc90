"""InfoNCE against cases worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.loss import info_nce


def _unit(rows: list[list[float]]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def test_orthogonal_pairs() -> None:
    z = torch.eye(3)
    # Each softmax runs over one logit of 1/t and two of 0.
    want = math.log(math.exp(2.0) + 2) - 2.0
    found = info_nce(z, z, torch.tensor(0.5), torch.ones(3))
    assert found.item() == pytest.approx(want, rel=1e-6)


def test_both_directions_count_the_same() -> None:
    a, b = _unit([[1, 0], [1, 1], [0, 1]]), _unit([[1, 0.5], [0, 1], [1, -1]])
    t, w = torch.tensor(0.3), torch.ones(3)
    assert info_nce(a, b, t, w).item() == pytest.approx(info_nce(b, a, t, w).item(), rel=1e-6)
    logits = a @ b.T / t
    own = torch.arange(3)
    want = sum(torch.nn.functional.cross_entropy(x, own) for x in (logits, logits.T)) / 2
    assert info_nce(a, b, t, w).item() == pytest.approx(float(want), rel=1e-6)


def test_padding_is_no_query_no_candidate_and_has_no_gradient() -> None:
    torch.manual_seed(0)
    real_a, real_b = torch.randn(5, 8), torch.randn(5, 8)
    a = torch.cat([real_a, torch.randn(3, 8)]).requires_grad_()
    b = torch.cat([real_b, torch.randn(3, 8)]).requires_grad_()
    weight = torch.tensor([1.0] * 5 + [0.0] * 3)
    t = torch.tensor(0.7)
    padded = info_nce(a, b, t, weight)
    assert padded.item() == pytest.approx(
        info_nce(real_a, real_b, t, torch.ones(5)).item(), rel=1e-6
    )
    padded.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad[5:].abs().max() == 0
    assert b.grad[5:].abs().max() == 0
    assert a.grad[:5].abs().min() > 0
