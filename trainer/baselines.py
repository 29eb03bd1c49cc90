"""What a model must beat: a ridge from stain and nucleus size to expression.

Features of a patch are mean and standard deviation of its three optical-density channels, and the
area of its H&E nucleus with a mark where it has none; the target is the expression of each gene.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from shards.errors import BadInput
from shards.stream import Stream
from shards.vocabulary import Vocabulary
from trainer.batch import dense_counts
from trainer.data import Loader
from trainer.genes import expression
from trainer.retrieval import Embedding

ALPHA: Final = 1.0  # on standardised features
_BATCH_SIZE = 256

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Cells:
    """Plain features and expression of every sample of a stream."""

    stain_N6: Matrix
    area_um2_N: Matrix  # NaN where the cell has no H&E nucleus
    expression_NG: Matrix


def ridge_embeddings(train: Stream, test: Stream) -> tuple[Embedding, Embedding]:
    """Predicted and true expression of the test samples, centred on the train mean, unit length.

    Over the genes that every panel of both streams measures; BadInput where there are none.
    """
    vocabulary = Vocabulary.union([*train.panels, *test.panels])
    loaders = Loader(train, vocabulary), Loader(test, vocabulary)
    everywhere_G = torch.stack([loader.measured_PG.all(dim=0) for loader in loaders]).all(dim=0)
    if not everywhere_G.any():
        raise BadInput(
            "the panels of the dataset",
            expected="genes that train and held-out runs both measure",
            found="none",
            remedy="evaluate runs whose panels overlap",
        )
    fitted_on, held_out = (_cells(loader, everywhere_G.numpy()) for loader in loaders)
    mean_area = float(np.nanmean(fitted_on.area_um2_N)) if _has_area(fitted_on) else 0.0
    fitted_x, held_out_x = _features(fitted_on, mean_area), _features(held_out, mean_area)

    center, spread = fitted_x.mean(axis=0), fitted_x.std(axis=0)
    spread[spread == 0] = 1.0  # a feature that never varies says nothing
    mean_expression_G = fitted_on.expression_NG.mean(axis=0)
    x = (fitted_x - center) / spread
    y = fitted_on.expression_NG - mean_expression_G
    slope_FG = np.linalg.solve(x.T @ x + ALPHA * np.eye(x.shape[1]), x.T @ y)

    predicted_NG = (held_out_x - center) / spread @ slope_FG
    return _unit(predicted_NG), _unit(held_out.expression_NG - mean_expression_G)


def _cells(loader: Loader, genes_G: npt.NDArray[np.bool_]) -> _Cells:
    areas = loader.stream.table(["nucleus"])["nucleus"].to_pylist()
    stain, expressed = [], []
    for batch in loader.once(_BATCH_SIZE):
        density_BHWC = -torch.log((batch.image_BHWC.float() + 1) / 256)
        spread_B3, mean_B3 = torch.std_mean(density_BHWC, dim=(1, 2))
        stain.append(torch.cat([mean_B3, spread_B3], dim=1).numpy())
        counts_BG = dense_counts(batch.to(torch.device("cpu")), loader.places, len(genes_G))
        expressed.append(expression(counts_BG[:, torch.from_numpy(genes_G)]).numpy())
    return _Cells(
        np.concatenate(stain).astype(np.float64),
        np.array([np.nan if a is None else a["area_um2"] for a in areas]),
        np.concatenate(expressed).astype(np.float64),
    )


def _has_area(cells: _Cells) -> bool:
    return bool(np.isfinite(cells.area_um2_N).any())


def _features(cells: _Cells, mean_area_um2: float) -> Matrix:
    missing_N = np.isnan(cells.area_um2_N)
    area_N = np.where(missing_N, mean_area_um2, cells.area_um2_N)
    return np.column_stack([cells.stain_N6, area_N, missing_N])


def _unit(rows: Matrix) -> Embedding:
    length_N1 = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(length_N1 == 0, 1, length_N1)).astype(np.float32)
