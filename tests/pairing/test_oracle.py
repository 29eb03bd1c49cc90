"""The oracle: a proper likelihood, and the best of what could be known of a cell."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import factorial
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.special import gammaln
from scipy.stats import dirichlet_multinomial

from pairing.simulate.biology import PHASES, TYPES, ExpressionModel, draw_depth, draw_model
from pairing.simulate.molecules import CellStates, TissueBlock, draw_block
from pairing.simulate.oracle import log_likelihood, pointwise_mutual_information
from pairing.simulate.panel import features
from pairing.simulate.section import PIXEL_UM
from shards.errors import BadInput

FEATURES = features()
SHARE = np.array([0.3, 0.1, 0.15, 0.08, 0.15, 0.06, 0.06, 0.07, 0.03])
BATCH = 64
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Drawn:
    """A simulated section as its truth has it, and the instrument's counts of good genes."""

    truth: Path
    counts: sparse.csr_matrix
    ids: list[str]
    model: ExpressionModel
    made_by: sparse.csr_matrix


def _crowd(rng: np.random.Generator, n: int) -> tuple[TissueBlock, npt.NDArray[np.bool_]]:
    """n touching cells of which the instrument saw nine of ten, in file order."""
    margin, side = 60, round(np.sqrt(n * 250) / PIXEL_UM)
    points = margin + rng.uniform(60, side - 60, (n, 2))
    for _ in range(25):
        _, near = cKDTree(points).query(points, k=2)
        apart = points - points[near[:, 1]]
        gap = np.hypot(*apart.T)[:, None]
        points += apart / gap * np.clip(50 - gap, 0, 4)
        points = points.clip(margin + 60, margin + side - 60)
    x, y = np.meshgrid(*2 * [np.arange(side + 2 * margin) + 0.5])
    seen = rng.random(n) < 0.9

    def labels(rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        away, owner = cKDTree(points[rows]).query(
            np.stack([x, y], axis=-1), distance_upper_bound=38
        )
        return np.where(np.isfinite(away), owner + 1, 0).astype(np.int32), away < 15

    maker, maker_in_nucleus = labels(np.arange(n))
    cell, in_nucleus = labels(np.flatnonzero(seen))
    block = TissueBlock(
        x0_px=0, y0_px=0, maker=maker, cell=cell, nucleus=np.where(in_nucleus, cell, 0),
        maker_in_nucleus=maker_in_nucleus, on_tissue=maker > 0, owned=np.arange(n),
        core=(margin, margin, margin + side, margin + side),
    )  # fmt: skip
    return block, seen


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    rng = np.random.default_rng(12)
    n = 700
    block, seen = _crowd(rng, n)
    donor = np.zeros(n, np.int64)
    cells = CellStates(
        type_index=rng.choice(len(TYPES), n, p=SHARE),
        state=rng.random(n),
        niche=rng.beta(1.5, 3, n),
        phase=rng.choice(3, n, p=[0.97, 0.015, 0.015]),
        donor=donor,
        depth=draw_depth(rng, n, donor),
    )
    model = draw_model(rng, SHARE)
    t, made_by = draw_block(rng, block, cells, [model], FEATURES)
    good = (t.qv >= 20) & (t.cell >= 0) & (t.feature < len(model.genes))
    made = good & (made_by >= 0)
    n_seen = int(seen.sum())

    def tally(
        kept: npt.NDArray[np.bool_], column: npt.NDArray[np.int64], n_columns: int
    ) -> sparse.csr_matrix:
        entries = (np.ones(int(kept.sum()), np.int32), (t.cell[kept], column[kept]))
        return sparse.coo_matrix(entries, shape=(n_seen, n_columns)).tocsr()

    spill = tally(made, made_by, n)
    truth = tmp_path_factory.mktemp("truth")
    tissue = pd.DataFrame(
        {
            "donor": "D1",
            "type": np.array(TYPES)[cells.type_index],
            "state": cells.state,
            "niche": cells.niche,
            "phase": np.array(PHASES)[cells.phase],
        }
    )
    ids = [f"cell-{i}" for i in range(n_seen)]
    tissue.to_parquet(truth / "tissue_cells.parquet")
    tissue[seen].assign(cell_id=ids).to_parquet(truth / "cells.parquet")
    (truth / "expression").mkdir()
    model.write(truth / "expression" / "D1.npz")
    sparse.save_npz(truth / "spill.npz", spill)
    return Drawn(truth, tally(good, t.feature, len(model.genes)), ids, model, spill)


def _recall_at_5(score: F64) -> tuple[float, float]:
    """In batches: (cell for given counts, counts for a given cell)."""
    batches = np.random.default_rng(0).permutation(len(score))
    batches = batches[: len(score) // BATCH * BATCH].reshape(-1, BATCH)
    hits = []
    for batch in batches:
        s = score[np.ix_(batch, batch)]
        own = np.diag(s)
        hits.append([(s > own[:, None]).sum(1) < 5, (s > own).sum(0) < 5])
    by_direction = np.mean(hits, axis=(0, 2))
    return float(by_direction[0]), float(by_direction[1])


def test_cells_are_told_by_their_counts(drawn: Drawn) -> None:
    totals = np.asarray(drawn.counts.sum(axis=1)).ravel()
    assert 80 < np.median(totals) < 180
    score = pointwise_mutual_information(
        drawn.truth, drawn.counts, drawn.model.genes.tolist(), drawn.ids
    )
    # By chance 5 of 64 are.
    assert min(_recall_at_5(score)) > 0.75
    assert np.diag(score).mean() > 1.5
    # A shuffled pair is told apart from a true one, and says nothing more on average.
    assert np.diag(np.roll(score, 1, axis=1)).mean() < 0


def test_cells_of_a_simulated_run_are_told_by_their_counts(simulated: Path) -> None:
    with h5py.File(simulated / "outs" / "cell_feature_matrix.h5") as file:
        matrix = file["matrix"]
        parts = [matrix[k][:] for k in ("data", "indices", "indptr")]
        counts = sparse.csr_matrix(tuple(parts), shape=matrix["shape"][:][::-1])
        ids = matrix["barcodes"].asstr()[:].tolist()
        names = matrix["features/name"].asstr()[:]
        is_gene = matrix["features/feature_type"].asstr()[:] == "Gene Expression"
    score = pointwise_mutual_information(
        simulated / "truth", counts[:, is_gene], names[is_gene].tolist(), ids
    )
    assert min(_recall_at_5(score)) > 0.7


@pytest.mark.parametrize(
    ("what", "wrong"),
    [
        ("spread", lambda m: replace(m, concentration=np.array(1e9))),
        ("state", lambda m: replace(m, state_slope=0 * m.state_slope)),
        ("niche", lambda m: replace(m, niche_slope=0 * m.niche_slope)),
        ("type", lambda m: replace(m, marker=0 * m.marker)),
        ("donor", lambda m: replace(m, donor=m.donor[::-1])),
    ],
)
def test_the_true_model_beats_a_wrong_one(
    drawn: Drawn, tmp_path: Path, what: str, wrong: Callable[[ExpressionModel], ExpressionModel]
) -> None:
    genes = drawn.model.genes.tolist()
    for name in ("cells.parquet", "tissue_cells.parquet", "spill.npz"):
        (tmp_path / name).symlink_to(drawn.truth / name)
    (tmp_path / "expression").mkdir()
    wrong(drawn.model).write(tmp_path / "expression" / "D1.npz")
    right, other = (
        np.diag(log_likelihood(truth, drawn.counts, genes, drawn.ids)).mean()
        for truth in (drawn.truth, tmp_path)
    )
    assert right > other + 0.2, what


def test_knowing_the_neighbours_helps(drawn: Drawn, tmp_path: Path) -> None:
    genes = drawn.model.genes.tolist()
    for name in ("cells.parquet", "tissue_cells.parquet", "expression"):
        (tmp_path / name).symlink_to(drawn.truth / name)
    sparse.save_npz(tmp_path / "spill.npz", 0 * drawn.made_by)
    with_them, without = (
        pointwise_mutual_information(truth, drawn.counts, genes, drawn.ids)
        for truth in (drawn.truth, tmp_path)
    )
    assert np.diag(with_them).mean() > np.diag(without).mean() + 0.1
    assert min(_recall_at_5(with_them)) > max(_recall_at_5(without))


def test_it_is_a_likelihood_over_any_selection_of_genes(drawn: Drawn) -> None:
    """All ways of three counts over four genes have probabilities that sum to one."""
    genes = ["NANOG", "ACTB", "MKI67", "CD3E"]
    ways = [w for w in itertools.product(range(4), repeat=4) if sum(w) == 3]
    log_p = log_likelihood(drawn.truth, sparse.csr_matrix(np.array(ways)), genes, drawn.ids[:7])
    coefficient = [6 / np.prod([factorial(k) for k in way]) for way in ways]
    np.testing.assert_allclose(coefficient @ np.exp(log_p), 1)


def test_it_is_that_of_a_dirichlet_multinomial(drawn: Drawn, tmp_path: Path) -> None:
    """Of a cell that nothing is known of but itself."""
    for name in ("cells.parquet", "tissue_cells.parquet"):
        (tmp_path / name).symlink_to(drawn.truth / name)
    plain = replace(drawn.model, ambient_share=np.array(0.0))
    (tmp_path / "expression").mkdir()
    plain.write(tmp_path / "expression" / "D1.npz")
    sparse.save_npz(tmp_path / "spill.npz", 0 * drawn.made_by)
    cell = pd.read_parquet(drawn.truth / "cells.parquet").iloc[5]
    profile = plain.profile(
        np.array([TYPES.index(cell.type)]), np.array([cell.state]), np.array([cell.niche]),
        np.array([PHASES.index(cell.phase)]),
    )[0]  # fmt: skip
    counts = drawn.counts[:20].toarray()
    alpha = float(plain.concentration) * profile
    expected = [dirichlet_multinomial.logpmf(c, alpha, c.sum()) for c in counts]
    ours = log_likelihood(
        tmp_path, sparse.csr_matrix(counts), plain.genes.tolist(), [cell.cell_id]
    )[:, 0]
    # Theirs has the coefficient, which is the same for every cell.
    coefficient = [gammaln(c.sum() + 1) - gammaln(c + 1).sum() for c in counts]
    np.testing.assert_allclose(ours + coefficient, expected, rtol=1e-9)


def test_the_marginal_depends_on_the_counts_alone(drawn: Drawn) -> None:
    counts, genes = drawn.counts[:30], drawn.model.genes.tolist()
    score = pointwise_mutual_information(drawn.truth, counts, genes, drawn.ids[:9])
    given = log_likelihood(drawn.truth, counts, genes, drawn.ids[:9])
    assert score.shape == given.shape == (30, 9)
    np.testing.assert_allclose(np.ptp(given - score, axis=1), 0, atol=1e-9)
    # Nothing is learnt from a cell without counts, and no order of genes or cells matters.
    none = pointwise_mutual_information(drawn.truth, 0 * counts, genes, drawn.ids[:9])
    np.testing.assert_allclose(none, 0, atol=1e-9)
    turned = pointwise_mutual_information(
        drawn.truth, counts[:, ::-1], genes[::-1], drawn.ids[8::-1]
    )
    np.testing.assert_allclose(turned[:, ::-1], score)


def test_each_cell_is_scored_by_its_own_donor(drawn: Drawn, tmp_path: Path) -> None:
    """Cells of a second donor, with the first one's model under another name, change nothing."""
    for name in ("cells.parquet", "tissue_cells.parquet"):
        cells = pd.read_parquet(drawn.truth / name)
        cells["donor"] = np.where(cells["state"] > 0.5, "D2", "D1")
        cells.to_parquet(tmp_path / name)
    sparse.save_npz(tmp_path / "spill.npz", drawn.made_by)
    (tmp_path / "expression").mkdir()
    arguments = drawn.counts[:20], drawn.model.genes.tolist(), drawn.ids
    for second in (drawn.model, draw_model(np.random.default_rng(77), SHARE)):
        drawn.model.write(tmp_path / "expression" / "D1.npz")
        second.write(tmp_path / "expression" / "D2.npz")
        same = np.isclose(
            log_likelihood(tmp_path, *arguments), log_likelihood(drawn.truth, *arguments)
        ).all(axis=0)
        # Of the other model are the cells of the second donor, and what they spill into.
        theirs = pd.read_parquet(tmp_path / "cells.parquet")["donor"] == "D2"
        assert same[~theirs].any()
        assert same[theirs].all() == (second is drawn.model)
        assert same.all() == (second is drawn.model)


def test_what_the_truth_lacks_is_refused(drawn: Drawn) -> None:
    genes = drawn.model.genes.tolist()
    with pytest.raises(BadInput, match="NOTAGENE"):
        log_likelihood(drawn.truth, drawn.counts, [*genes[:-1], "NOTAGENE"], drawn.ids)
    with pytest.raises(BadInput, match="not-a-cell"):
        pointwise_mutual_information(drawn.truth, drawn.counts, genes, ["not-a-cell"])
