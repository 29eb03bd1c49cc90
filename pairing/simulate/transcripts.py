"""Decoded transcripts: where they lie, which cell they were given to, how sure the call is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt
from scipy import sparse

from pairing.simulate.expression import (
    COUNTS_LOG_SPREAD,
    COUNTS_PER_CELL,
    ExpressionModel,
)
from pairing.simulate.panel import Feature
from pairing.simulate.render import Labels
from pairing.simulate.tissue import Tissue

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

GOOD_SHARE = 0.82  # of gene transcripts with qv ≥ 20
QV_MIN = 20.0
NUCLEAR_SHARE = 0.4
STRAY_SHARE = 0.14  # gene transcripts outside cells, per transcript in cells
FOV_UM = 500.0
# Positions and distances are stored in steps of 1/64 µm, after each was given to a cell.
STEP_UM = 1 / 64


@dataclass(frozen=True, slots=True)
class Transcripts:
    """n transcripts in file order; positions and distances already in steps of STEP_UM."""

    cell: I64  # row of the cell, -1 unassigned
    feature: I64  # row of the matrix
    codeword: I64
    x_um: F64
    y_um: F64
    z_um: F64
    qv: F64
    in_nucleus: npt.NDArray[np.bool_]
    nucleus_distance_um: F64
    fov: I64  # row-major number of the field of view
    n_fov_columns: int

    def matrix(self, n_cells: int, n_features: int) -> sparse.csr_matrix:
        """Counts (cells × features) of the transcripts of good quality, by their own cell."""
        kept = (self.cell >= 0) & (self.qv >= QV_MIN)
        ones = np.ones(int(kept.sum()), np.int32)
        where = (self.cell[kept], self.feature[kept])
        return sparse.coo_matrix((ones, where), shape=(n_cells, n_features)).tocsr()


def draw_transcripts(
    tissue: Tissue,
    labels: Labels,
    pixel_um: float,
    model: ExpressionModel,
    features: tuple[Feature, ...],
    rng: np.random.Generator,
) -> Transcripts:
    """All transcripts of a section, from its labels in the morphology frame.

    Raises ValueError where a cell covers no pixel at all.
    """
    own_cell, own_gene = _draw_own(tissue, model, rng)
    n_own = len(own_cell)
    pixels = _pixels_in_cells(own_cell, labels, rng)
    on_tissue = _on_tissue(tissue, labels.cell.shape, pixel_um)
    stray = _pixels_outside(labels, on_tissue, round(STRAY_SHARE * n_own), rng)
    stray_gene = rng.choice(len(model.ambient), len(stray), p=model.ambient)
    control, control_pixels = _draw_controls(features, on_tissue, n_own, rng)
    feature = np.concatenate([own_gene, stray_gene, control])
    where = np.concatenate([pixels, stray, control_pixels])

    width = labels.cell.shape[1]
    inner = rng.uniform(0, 1, (len(where), 2))
    good_share = np.array([f.kind.good_share if f.kind else GOOD_SHARE for f in features])
    to_nucleus_px = cv2.distanceTransform(
        (labels.nucleus == 0).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5
    )
    x_um = _in_steps((where % width + inner[:, 0]) * pixel_um)
    y_um = _in_steps((where // width + inner[:, 1]) * pixel_um)
    n_fov_columns = int(np.ceil(tissue.width_um / FOV_UM))
    drawn = Transcripts(
        # Decided before the position is stored in steps: a few on an edge step over it.
        cell=labels.cell.ravel()[where].astype(np.int64) - 1,
        feature=feature,
        codeword=_draw_codewords(feature, features, rng),
        x_um=x_um,
        y_um=y_um,
        z_um=_in_steps(rng.normal(16, 2.5, len(where)).clip(5, 28)),
        qv=_draw_qv(good_share[feature], rng),
        in_nucleus=labels.nucleus.ravel()[where] > 0,
        nucleus_distance_um=_in_steps(to_nucleus_px.ravel()[where] * pixel_um),
        fov=(y_um // FOV_UM * n_fov_columns + x_um // FOV_UM).astype(np.int64),
        n_fov_columns=n_fov_columns,
    )
    return _in_file_order(drawn, rng)


def _draw_own(tissue: Tissue, model: ExpressionModel, rng: np.random.Generator) -> tuple[I64, I64]:
    """(cell, gene) of every transcript that a cell made."""
    cells = tissue.cells
    n = len(cells.state)
    median = COUNTS_PER_CELL / GOOD_SHARE
    total = rng.poisson(median * np.exp(COUNTS_LOG_SPREAD * rng.standard_normal(n)))
    counts = rng.multinomial(total, model.profile(cells.type_index, cells.state))
    cell, gene = np.nonzero(counts)
    times = counts[cell, gene]
    return np.repeat(cell, times), np.repeat(gene, times)


def _pixels_in_cells(cell: I64, labels: Labels, rng: np.random.Generator) -> I64:
    """A random pixel (flat index) of each transcript's cell, of its nucleus more often."""
    n_cells = int(labels.cell.max())
    area = np.flatnonzero(labels.cell)
    in_nucleus = labels.nucleus.ravel()[area] > 0
    owner = labels.cell.ravel()[area] - 1
    anywhere, nuclear = (
        _grouped(area, owner, n_cells),
        _grouped(area[in_nucleus], owner[in_nucleus], n_cells),
    )
    if cell.max() >= n_cells or (anywhere[2][cell] == 0).any():
        raise ValueError("a cell covers no pixel of the morphology image")
    use_nucleus = (rng.random(len(cell)) < NUCLEAR_SHARE) & (nuclear[2][cell] > 0)
    draw = rng.random(len(cell))
    picked = np.empty(len(cell), np.int64)
    for (pixels, start, size), chosen in ((nuclear, use_nucleus), (anywhere, ~use_nucleus)):
        c = cell[chosen]
        picked[chosen] = pixels[start[c] + (draw[chosen] * size[c]).astype(np.int64)]
    return picked


def _grouped(pixels: I64, owner: npt.NDArray[np.int32], n: int) -> tuple[I64, I64, I64]:
    """(pixels by owner, start of each owner's, number of each owner's)."""
    size = np.bincount(owner, minlength=n)
    order = np.argsort(owner, kind="stable")
    return pixels[order], np.concatenate([[0], np.cumsum(size)[:-1]]), size


def _pixels_outside(labels: Labels, on_tissue: Mask, n: int, rng: np.random.Generator) -> I64:
    """Pixels outside cells: nearly all on tissue, a few on glass."""
    free = labels.cell == 0
    n_glass = rng.binomial(n, 0.03)
    return np.concatenate(
        [
            rng.choice(np.flatnonzero(free & on_tissue), n - n_glass),
            rng.choice(np.flatnonzero(free & ~on_tissue), n_glass),
        ]
    )


def _draw_controls(
    features: tuple[Feature, ...], on_tissue: Mask, n_own: int, rng: np.random.Generator
) -> tuple[I64, I64]:
    """(feature, pixel) of controls, anywhere on the tissue; every kind is there at least once."""
    drawn = []
    for kind in dict.fromkeys(f.kind for f in features if f.kind):
        rows = np.array([i for i, f in enumerate(features) if f.kind == kind])
        drawn.append(rng.choice(rows, max(1, rng.poisson(kind.share * n_own))))
    feature = np.concatenate(drawn)
    return feature, rng.choice(np.flatnonzero(on_tissue), len(feature))


def _on_tissue(tissue: Tissue, shape: tuple[int, ...], pixel_um: float) -> Mask:
    """(Y, X) which pixels lie on tissue, by the map on a grid of 2 µm."""
    step = 2.0
    x = np.arange(step / 2, tissue.width_um + step, step)
    y = np.arange(step / 2, tissue.height_um + step, step)
    layers = tissue.tissue_map.layers(x, y)
    inside = (layers.tissue > 0.5) & (layers.lumen < 0.5)
    row, column = (((np.arange(n) + 0.5) * (pixel_um / step)).astype(int) for n in shape)
    return np.asarray(inside[np.ix_(row, column)])


def _draw_codewords(feature: I64, features: tuple[Feature, ...], rng: np.random.Generator) -> I64:
    first = np.array([f.codewords[0] for f in features])
    n = np.array([len(f.codewords) for f in features])
    return np.asarray(first[feature] + (rng.random(len(feature)) * n[feature]).astype(np.int64))


def _draw_qv(good_share: F64, rng: np.random.Generator) -> F64:
    """Phred values in steps of a quarter, as the instrument gives them: most are exactly 40."""
    n = len(good_share)
    good = rng.random(n) < good_share
    high = np.where(rng.random(n) < 0.8, 40.0, rng.uniform(QV_MIN, 40, n))
    low = np.where(rng.random(n) < 0.4, 0.0, (rng.exponential(5, n)).clip(0, QV_MIN - 0.25))
    return np.asarray(np.floor(np.where(good, high, low) * 4) / 4)


def _in_steps(value_um: npt.NDArray[np.floating]) -> F64:
    return np.asarray(np.rint(value_um / STEP_UM) * STEP_UM, dtype=np.float64)


def _in_file_order(t: Transcripts, rng: np.random.Generator) -> Transcripts:
    """By field of view, then by codeword, not by place."""
    order = np.lexsort((rng.random(len(t.cell)), t.codeword, t.fov))
    columns = [name for name in Transcripts.__slots__ if name != "n_fov_columns"]
    return replace(t, **{name: getattr(t, name)[order] for name in columns})
