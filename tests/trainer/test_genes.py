"""Gene encoders: what they are given decides, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import BadInput
from trainer.config import RankConfig
from trainer.genes import GeneMLP, StandardisedExpression, expression
from trainer.rank import PADDING, RankTransformer

from .models import RANK, model_config, some_cells

N_GENES, N_SPECIES = 20, 2
Encoder = Callable[[], GeneMLP | RankTransformer]


@dataclass(frozen=True)
class Named:
    symbol: str
    ensembl: str | None


GENES = [Named("ACTB", "ENSG1"), Named("CD3E", "ENSG2"), Named("NOVEL", None), Named("X", "ENSG4")]


def _rank(n_genes: int = N_GENES, **changes: object) -> RankTransformer:
    torch.manual_seed(0)
    config = RankConfig.model_validate(RANK | changes)
    return RankTransformer(n_genes, N_SPECIES, config).eval()


def _mlp() -> GeneMLP:
    torch.manual_seed(0)
    return GeneMLP(N_GENES, model_config()).eval()


def _slow_tokens(
    counts: list[int], measured: list[float], mean: list[float], species: int, context: int
) -> list[int]:
    """As read from past.md: to 10,000 counts, over the mean, from high to low, cut and padded."""
    total = sum(c for c, m in zip(counts, measured, strict=True) if m)
    found = []
    for gene, (count, is_measured) in enumerate(zip(counts, measured, strict=True)):
        if is_measured and count > 0:
            found.append((-count / total * 10_000 / mean[gene], gene))
    genes = [3 + N_SPECIES + gene for _, gene in sorted(found)]
    n_ranked = min(context - 3, len(counts))
    return [1, 2, 3 + species, *(genes + [PADDING] * n_ranked)[:n_ranked]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tokens_are_those_of_a_slow_reading_of_the_recipe(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 15))
    # Powers of two: dividing by them is exact, so that ties are ties however one computes.
    mean = data.draw(st.lists(st.sampled_from([0.5, 1.0, 4.0]), min_size=n, max_size=n))
    counts = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    measured = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n))
    species = data.draw(st.integers(0, N_SPECIES - 1))
    context = data.draw(st.integers(4, 12))
    rank = _rank(n, context=context)
    rank.mean_G = torch.tensor(mean)
    tokens = rank.tokens(
        torch.tensor([counts]).float(), torch.tensor([measured]), torch.tensor([species])
    )
    assert tokens.tolist() == [_slow_tokens(counts, measured, mean, species, context)]


@pytest.mark.parametrize("encoder", [_rank, _mlp])
def test_a_gene_that_is_not_measured_does_not_matter(encoder: Encoder) -> None:
    tower = encoder()
    cells = some_cells(5, N_GENES)
    strange_BG = torch.where(cells.measured_BG > 0, cells.counts_BG, 1000.0)
    torch.testing.assert_close(
        tower(strange_BG, cells.measured_BG, cells.species_B),
        tower(cells.counts_BG, cells.measured_BG, cells.species_B),
    )


@pytest.mark.parametrize("encoder", [_rank, _mlp])
def test_what_is_fitted_leaves_out_what_is_not_measured(encoder: Encoder) -> None:
    cells = some_cells(40, N_GENES)
    strange_BG = torch.where(cells.measured_BG > 0, cells.counts_BG, 1000.0)
    one, other = encoder(), encoder()
    one.fit(cells.counts_BG, cells.measured_BG)
    other.fit(strange_BG, cells.measured_BG)
    buffers = dict(other.named_buffers())
    assert len(buffers) >= 1
    for name, buffer in one.named_buffers():
        torch.testing.assert_close(buffer, buffers[name])


def test_the_fitted_mean_is_that_of_the_cells_that_have_the_gene() -> None:
    rank = _rank(3)
    counts_SG = torch.tensor([[1.0, 1.0, 0.0], [0.0, 4.0, 0.0]])
    rank.fit(counts_SG, torch.ones(2, 3))
    assert rank.mean_G.tolist() == [5_000.0, 7_500.0, 1.0]


def test_standardised_expression_has_mean_0_and_spread_1_where_measured() -> None:
    cells = some_cells(400, N_GENES)
    standardised = StandardisedExpression(N_GENES)
    standardised.fit(cells.counts_BG, cells.measured_BG)
    x_BG = standardised(cells.counts_BG, cells.measured_BG)
    assert torch.equal(
        x_BG[cells.measured_BG == 0], torch.zeros(int((1 - cells.measured_BG).sum()))
    )
    n_G = cells.measured_BG.sum(dim=0)
    torch.testing.assert_close(x_BG.sum(dim=0) / n_G, torch.zeros(N_GENES), atol=1e-5, rtol=0)
    torch.testing.assert_close(x_BG.square().sum(dim=0) / n_G, torch.ones(N_GENES))


def test_padding_does_not_matter() -> None:
    long, short = _rank(N_GENES, context=30), _rank(N_GENES, context=12)
    state = long.state_dict()
    state["position_TF"] = state["position_TF"][: len(short.position_TF)]
    short.load_state_dict(state)
    counts_BG = torch.zeros(2, N_GENES)
    counts_BG[0, 3:9] = torch.arange(1.0, 7.0)  # 6 of 9 places
    counts_BG[1, 2:11] = 1.0  # all 9
    given = counts_BG, torch.ones(2, N_GENES), torch.tensor([0, 1])
    assert (long.tokens(*given) == PADDING).sum() == 14 + 11
    torch.testing.assert_close(short(*given), long(*given))


def test_a_row_is_the_same_in_any_batch_and_without_counts_it_is_finite() -> None:
    rank = _rank()
    cells = some_cells(6, N_GENES)
    features = rank(cells.counts_BG, cells.measured_BG, cells.species_B)
    assert torch.equal(features[-1], torch.zeros(16))
    for row in range(6):
        one = slice(row, row + 1)
        alone = rank(cells.counts_BG[one], cells.measured_BG[one], cells.species_B[one])
        torch.testing.assert_close(alone, features[one])
    rank.train()
    rank(cells.counts_BG, cells.measured_BG, cells.species_B).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rank.parameters())


def test_depth_does_not_matter_but_order_and_species_do() -> None:
    rank = _rank()
    counts_BG = torch.arange(1.0, N_GENES + 1)[None]
    measured_BG, species_B = torch.ones(1, N_GENES), torch.tensor([0])
    features = rank(counts_BG, measured_BG, species_B)
    assert torch.equal(rank(3 * counts_BG, measured_BG, species_B), features)
    assert not torch.allclose(rank(counts_BG.flip(1), measured_BG, species_B), features)
    assert not torch.allclose(rank(counts_BG, measured_BG, 1 - species_B), features)


def test_expression_is_log_counts_per_10k() -> None:
    x = expression(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
    torch.testing.assert_close(x[0].expm1(), torch.tensor([2_500.0, 7_500.0]))
    assert torch.equal(x[1], torch.zeros(2))


def _write(path: Path, **columns: list[object]) -> Path:
    table = pa.table(columns)
    if path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    else:
        pa.parquet.write_table(table, path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_means_are_matched_by_ensembl_id_then_by_symbol(tmp_path: Path, suffix: str) -> None:
    rank = _rank(4)
    path = _write(
        tmp_path / f"means{suffix}",
        symbol=["B_ACTIN", "NOVEL", "X", "ELSE"],
        ensembl=["ENSG1", "ENSG7", "ENSG9", "ENSG10"],
        mean=[2.0, 0.0, 5.0, 6.0],
    )
    # ENSG4 is not ENSG9, though both are called X; NOVEL's mean of 0 divides nothing.
    assert rank.set_means(GENES, path) == 2
    assert rank.mean_G.tolist() == [2.0, 1.0, 1.0, 1.0]
    only_symbols = _write(tmp_path / f"symbols{suffix}", symbol=["X", "CD3E"], mean=[3, 4])
    assert rank.set_means(GENES, only_symbols) == 2
    assert rank.mean_G.tolist() == [1.0, 4.0, 1.0, 3.0]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"symbol": ["Actb", "Cd3e"], "mean": [1.0, 2.0]}, "none of them"),
        ({"gene": ["ACTB"], "mean": [1.0]}, "columns mean and ensembl or symbol"),
        ({"symbol": ["ACTB"], "average": [1.0]}, "columns mean and ensembl or symbol"),
        ({"symbol": ["ACTB", "CD3E"], "mean": [1.0, -2.0]}, r"-2\.0 in row 1"),
        ({"symbol": ["ACTB"], "mean": ["high"]}, "numbers"),
        ({"symbol": ["ACTB", "CD3E"], "mean": [1.0, None]}, "nan in row 1"),
        ({"symbol": ["ACTB", "ACTB"], "mean": [1.0, 2.0]}, "2 of ACTB"),
    ],
)
def test_other_means_are_refused(
    tmp_path: Path, columns: dict[str, list[object]], told: str
) -> None:
    with pytest.raises(BadInput, match=told):
        _rank(4).set_means(GENES, _write(tmp_path / "means.parquet", **columns))


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "means.parquet"
    broken.write_text("symbol,mean\n")
    for path in (broken, tmp_path / "none.csv", tmp_path / "means.npy"):
        with pytest.raises(BadInput, match="means"):
            _rank(4).set_means(GENES, path)


def test_heads_divide_the_width() -> None:
    with pytest.raises(BadInput, match=r"model\.rank\.heads"):
        _rank(heads=3)
