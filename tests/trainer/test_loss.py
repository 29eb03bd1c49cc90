"""The losses of pairs against the same sums written out pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tests.trainer.ranks import KINDS, Kind, loss_config
from trainer.distributed import World
from trainer.loss import PairLoss

ALONE = World(torch.device("cpu"))
Rows = list[list[float]]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def by_hand_info_nce(image: Rows, gene: Rows, sample: list[int], t: float, _: float) -> float:
    total = 0.0
    for query, key in ((image, gene), (gene, image)):
        for i, row in enumerate(query):
            seen = [j for j in range(len(key)) if j == i or sample[j] != sample[i]]
            over = sum(math.exp(dot(row, key[j]) / t) for j in seen)
            total -= math.log(math.exp(dot(row, key[i]) / t) / over)
    return total / 2 / len(image)


def by_hand_siglip(image: Rows, gene: Rows, sample: list[int], t: float, b: float) -> float:
    total = 0.0
    for i, j in product(range(len(image)), repeat=2):
        logit = dot(image[i], gene[j]) / t + b
        if i == j:
            total -= math.log(1 / (1 + math.exp(-logit)))
        elif sample[i] != sample[j]:
            total -= math.log(1 / (1 + math.exp(logit)))
    return total / len(image)


def by_hand_soft_targets(image: Rows, gene: Rows, _: list[int], t: float, __: float) -> float:
    n = range(len(image))
    logits = [[dot(gene[i], image[j]) / t for j in n] for i in n]
    similar = [
        [math.exp((dot(image[i], image[j]) + dot(gene[i], gene[j])) / 2 / t) for j in n] for i in n
    ]
    target = [[similar[i][j] / sum(similar[i]) for j in n] for i in n]
    total = 0.0
    for i, j in product(n, repeat=2):
        of_row = math.exp(logits[i][j]) / sum(math.exp(logits[i][k]) for k in n)
        of_column = math.exp(logits[i][j]) / sum(math.exp(logits[k][j]) for k in n)
        total -= target[i][j] * (math.log(of_row) + math.log(of_column)) / 2
    return total / len(image)


BY_HAND: dict[Kind, Callable[[Rows, Rows, list[int], float, float], float]] = {
    "info_nce": by_hand_info_nce,
    "siglip": by_hand_siglip,
    "soft_targets": by_hand_soft_targets,
}


def turned(*degrees: float) -> Rows:
    return [[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees]


def value(loss: PairLoss, image: Rows, gene: Rows, sample: list[int]) -> float:
    z_image, z_gene, weight = torch.tensor(image), torch.tensor(gene), torch.ones(len(image))
    return loss(z_image, z_gene, weight, torch.tensor(sample), ALONE).item()


def test_two_orthogonal_pairs() -> None:
    def of(kind: Kind) -> float:
        axes = [[1.0, 0.0], [0.0, 1.0]]
        return value(PairLoss(loss_config(kind, temperature=0.5)), axes, axes, [0, 1])

    # One logit of 1 / t = 2 and one of 0.
    assert of("info_nce") == pytest.approx(math.log(1 + math.exp(-2)))
    # Logits of 2 - 1.5 that should be high, and of -1.5 that should be low.
    assert of("siglip") == pytest.approx(math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-1.5)))
    # Targets and predictions are the same: their entropy.
    p = 1 / (1 + math.exp(-2))
    assert of("soft_targets") == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sample", [[0, 1, 2], [5, 3, 5], [4, 4, 4]])
def test_three_pairs_written_out(kind: Kind, sample: list[int]) -> None:
    """Repeats of a sample are no negatives; soft targets keep them, knowing them by their looks."""
    image, gene = turned(0, 50, 200), turned(20, 10, 290)
    found = value(PairLoss(loss_config(kind)), image, gene, sample)
    assert found == pytest.approx(BY_HAND[kind](image, gene, sample, 0.3, -1.5), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    angles=st.lists(
        st.tuples(st.floats(0, 360, width=32), st.floats(0, 360, width=32), st.integers(0, 3)),
        min_size=1,
        max_size=6,
    ),
    junk=st.lists(
        st.tuples(st.integers(0, 6), st.sampled_from([0.0, 1.0, -3e4, 1e30, math.inf, math.nan])),
        min_size=1,
        max_size=4,
    ),
)
def test_padding_never_matters(
    kind: Kind, angles: list[tuple[float, float, int]], junk: list[tuple[int, float]]
) -> None:
    image, gene = turned(*(a for a, _, _ in angles)), turned(*(b for _, b, _ in angles))
    sample, weight = [s for _, _, s in angles], [1.0] * len(angles)
    for place, held in junk:
        for rows in (image, gene):
            rows.insert(place, [held, -held])
        sample.insert(place, -1 if held else 0)
        weight.insert(place, 0.0)
    real = [i for i, w in enumerate(weight) if w]

    results = []
    for some in (list(range(len(weight))), real):
        z_image, z_gene = (torch.tensor([r[i] for i in some]) for r in (image, gene))
        z_image.requires_grad_()
        z_gene.requires_grad_()
        loss = PairLoss(loss_config(kind))
        part = loss(
            z_image,
            z_gene,
            torch.tensor([weight[i] for i in some]),
            torch.tensor([sample[i] for i in some]),
            ALONE,
        )
        part.backward()
        assert z_image.grad is not None
        assert z_gene.grad is not None
        assert loss.log_temperature.grad is not None
        results.append((part, z_image.grad, z_gene.grad, loss.log_temperature.grad))
    (padded, *padded_grads, padded_t), (alone, *grads, t) = results
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded_t, t, rtol=1e-4, atol=1e-5)
    padding = [i for i, w in enumerate(weight) if not w]
    for with_padding, without in zip(padded_grads, grads, strict=True):
        torch.testing.assert_close(with_padding[real], without, rtol=1e-4, atol=1e-5)
        assert with_padding[padding].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_padding_is_no_loss(kind: Kind) -> None:
    z_BD = torch.randn(3, 4, requires_grad=True)
    loss = PairLoss(loss_config(kind))
    part = loss(z_BD, z_BD, torch.zeros(3), torch.arange(3), ALONE)
    part.backward()
    assert part == 0
    assert z_BD.grad is not None
    assert z_BD.grad.abs().max() == 0
    assert all(p.grad is not None and p.grad == 0 for p in loss.parameters())


def test_the_gradient_flows_through_the_soft_targets() -> None:
    torch.manual_seed(0)
    cell, image = (functional.normalize(torch.randn(5, 3), dim=1) for _ in range(2))
    loss = PairLoss(loss_config("soft_targets"))
    log_t = torch.tensor(math.log(0.3), requires_grad=True)
    for z in (cell, image):
        z.requires_grad_()
    found = torch.autograd.grad(
        loss(image, cell, torch.ones(5), torch.arange(5), ALONE),
        [cell, image, loss.log_temperature],
    )
    t = log_t.exp()
    logits = cell @ image.T / t
    target = ((image @ image.T + cell @ cell.T) / 2 / t).softmax(dim=-1)
    of_rows = -(target * logits.log_softmax(dim=-1)).sum(dim=1)
    of_columns = -(target.T * logits.T.log_softmax(dim=-1)).sum(dim=1)
    want = torch.autograd.grad(((of_rows + of_columns) / 2).mean(), [cell, image, log_t])
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_siglip_holds_no_matrix_of_all_pairs() -> None:
    torch.manual_seed(0)
    n = 2500
    z_image, z_gene = (functional.normalize(torch.randn(n, 4), dim=1) for _ in range(2))
    loss = PairLoss(loss_config("siglip"))
    assert loss.bias is not None
    wanted = [z_image.requires_grad_(), z_gene.requires_grad_(), loss.log_temperature, loss.bias]
    held: list[int] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        held.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        part = loss(z_image, z_gene, torch.ones(n), torch.arange(n), ALONE)
    assert sum(held) < 100 * n
    found = torch.autograd.grad(part, wanted)
    logits = z_image.double() @ z_gene.double().T / loss.temperature.double() + loss.bias
    signs = 2 * torch.eye(n) - 1
    whole = -functional.logsigmoid(signs * logits).sum() / n
    assert part.item() == pytest.approx(whole.item(), rel=1e-5)
    for a, b in zip(found, torch.autograd.grad(whole, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_temperature_stays_inside_its_bounds_and_comes_back() -> None:
    loss = PairLoss(loss_config("info_nce", temperature=0.1, low=0.1))
    with torch.no_grad():
        loss.log_temperature -= 3
    assert loss.temperature.item() == pytest.approx(0.1)
    image, gene = torch.eye(2), torch.eye(2).flip(0)  # wrong pairs: a higher one is better
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.01)
    loss(image, gene, torch.ones(2), torch.arange(2), ALONE).backward()
    optimizer.step()
    assert 0.1 < loss.temperature.item() < 0.2


def test_only_siglip_learns_a_bias() -> None:
    learned = {
        kind: [n for n, _ in PairLoss(loss_config(kind)).named_parameters()] for kind in KINDS
    }
    assert learned == {
        "info_nce": ["log_temperature"],
        "siglip": ["log_temperature", "bias"],
        "soft_targets": ["log_temperature"],
    }
