"""Decoded transcripts, block by block: who made each, where it lies, which cell it was given to.

A cell makes transcripts in its body; they diffuse, over its border too, and the instrument gives
each to the cell of its own label image at the place where it found it. What spills over into
neighbours, and what cells made that the instrument did not see, follows from that alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from scipy import sparse

from pairing.simulate.biology import ExpressionModel
from pairing.simulate.panel import Feature
from pairing.simulate.section import PIXEL_UM, Transcripts

F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

MADE_PER_CELL = 150.0  # of a cell of usual size and depth: those decoded, of any quality
# Large cells make more; the exponent is about that of real runs.
USUAL_CELL_UM2 = 120.0
DEPTH_BY_AREA = 0.9
GOOD_SHARE = 0.87  # of gene transcripts with qv ≥ 20
QV_MIN = 20.0
NUCLEAR_SHARE = 0.4
# Standard deviations along an axis of near and far diffusion; the far one, and its share, as
# Proseg's priors have them (Jones et al., Nat Methods 2025).
DIFFUSION_UM = (1.0, 4.0)
FAR_SHARE = 0.15
REACH_UM = 10.0  # no transcript diffuses further
FALSE_PER_UM2 = 1e-4  # calls of random genes, on glass and on tissue
STEP_UM = 1 / 64  # positions and distances are stored in steps, after each was given to a cell


@dataclass(frozen=True, slots=True)
class TissueBlock:
    """What lies in a window (h, w) of the morphology frame, of which `core` is the block's own.

    Rows of tissue cells and of the instrument's cells are two numberings; labels are row + 1.
    """

    x0_px: int
    y0_px: int
    maker: I32  # (h, w) label of the tissue cell whose body it is, seen or not, 0 none
    cell: I32  # (h, w) label of the instrument's cell
    nucleus: I32  # (h, w) positive in the instrument's nuclei
    maker_in_nucleus: Mask  # (h, w) in the nucleus of the tissue cell
    on_tissue: Mask  # (h, w)
    owned: I64  # rows of the tissue cells that this block makes the transcripts of
    core: tuple[int, int, int, int]  # x0, y0, x1, y1 in the window


@dataclass(frozen=True, slots=True)
class CellStates:
    """All n cells of the tissue."""

    type_index: I64
    state: F64
    niche: F64
    phase: I64
    donor: I64  # number of its model
    depth: F64  # see draw_depth


def draw_block(
    rng: np.random.Generator,
    block: TissueBlock,
    cells: CellStates,
    models: Sequence[ExpressionModel],
    features: Sequence[Feature],
) -> tuple[Transcripts, I64]:
    """The transcripts of one block as one field of view, and the row of each one's maker.

    The maker is a row of the tissue cells, -1 for what is ambient, false or a control; those lie
    in the core alone. An owned cell without a pixel makes nothing. Raises ValueError where the
    window does not hold all that its owned cells make.
    """
    row_of_name = {f.name: row for row, f in enumerate(features)}
    row_of_gene = np.array([row_of_name[gene] for gene in models[0].genes])
    bodies = _Bodies.of(block)
    maker, gene = _draw_made(rng, block.owned, bodies.n_px, cells, models)
    made_px = _diffused(rng, bodies.places(rng, maker), block.maker.shape)

    x0, y0, x1, y1 = block.core
    tissue_y, tissue_x = np.nonzero(block.on_tissue[y0:y1, x0:x1])
    n_made = len(gene) if len(tissue_x) else 0
    ambient = _draw_ambient(rng, cells.donor[block.owned[maker]], n_made, models)
    control = _draw_controls(rng, features, n_made)
    at = rng.integers(0, max(len(tissue_x), 1), len(ambient) + len(control))
    tissue_px = np.stack([x0 + tissue_x[at], y0 + tissue_y[at]], axis=1) + rng.random((len(at), 2))
    n_false = rng.poisson(FALSE_PER_UM2 * (x1 - x0) * (y1 - y0) * PIXEL_UM**2)
    false_px = np.array([x0, y0]) + rng.random((n_false, 2)) * (x1 - x0, y1 - y0)

    px = np.concatenate([made_px, tissue_px, false_px])
    false = rng.integers(0, len(row_of_gene), n_false)
    feature = np.concatenate([row_of_gene[gene], row_of_gene[ambient], control, row_of_gene[false]])
    made_by = np.full(len(px), -1)
    made_by[: len(maker)] = block.owned[maker]
    return _decode(rng, block, px, feature, features, made_by)


@dataclass(frozen=True, slots=True)
class _Bodies:
    """Pixels of each owned cell, those in its nucleus first."""

    pixel: I32  # flat, by owned cell
    width: int
    start: I64  # of each owned cell's
    n_px: I64
    n_nuclear: I64

    @classmethod
    def of(cls, block: TissueBlock) -> _Bodies:
        n = len(block.owned)
        number = np.zeros(max(block.maker.max(), block.owned.max(initial=0) + 1) + 1, np.int32)
        number[block.owned + 1] = np.arange(1, n + 1)
        own = number[block.maker].ravel()
        area = np.flatnonzero(own)
        group = 2 * (own[area] - 1) + ~block.maker_in_nucleus.ravel()[area]
        # A sort by counting: the rows of the matrix are the groups, its columns the pixels.
        entries = (np.ones(len(area), np.int8), (group, area))
        grouped = sparse.csr_matrix(entries, shape=(2 * n, own.size))
        edge = grouped.indptr.astype(np.int64)
        return cls(
            pixel=grouped.indices,
            width=block.maker.shape[1],
            start=edge[:-1:2],
            n_px=edge[2::2] - edge[:-1:2],
            n_nuclear=edge[1::2] - edge[:-1:2],
        )

    def places(self, rng: np.random.Generator, maker: I64) -> F64:
        """(k, 2) a random place (x, y) in the body of each maker, in its nucleus more often."""
        n_nuclear = self.n_nuclear[maker]
        nuclear = (rng.random(len(maker)) < NUCLEAR_SHARE) & (n_nuclear > 0)
        n = np.where(nuclear, n_nuclear, self.n_px[maker])
        pixel = self.pixel[self.start[maker] + (rng.random(len(maker)) * n).astype(np.int64)]
        corner = np.stack([pixel % self.width, pixel // self.width], axis=1)
        return np.asarray(corner + rng.random((len(maker), 2)))


def _draw_made(
    rng: np.random.Generator,
    owned: I64,
    n_px: I64,
    cells: CellStates,
    models: Sequence[ExpressionModel],
) -> tuple[I64, I64]:
    """(position in `owned` of the maker, gene) of every transcript that cells made."""
    donor, there = cells.donor[owned], n_px > 0
    size = (n_px * PIXEL_UM**2 / USUAL_CELL_UM2) ** DEPTH_BY_AREA
    makers, genes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for number in np.unique(donor[there]):
        mine = np.flatnonzero(there & (donor == number))
        rows, model = owned[mine], models[number]
        phase = cells.phase[rows]
        profile = model.profile(cells.type_index[rows], cells.state[rows], cells.niche[rows], phase)
        rate = rng.standard_gamma(model.concentration * profile) / model.concentration
        rate *= (MADE_PER_CELL * cells.depth[rows] * model.phase_depth[phase] * size[mine])[:, None]
        counts = rng.poisson(rate)
        cell, gene = np.nonzero(counts)
        times = counts[cell, gene]
        makers.append(np.repeat(mine[cell], times))
        genes.append(np.repeat(gene, times))
    return np.concatenate(makers), np.concatenate(genes)


def _diffused(rng: np.random.Generator, px: F64, shape: tuple[int, ...]) -> F64:
    """Displaced by a Gaussian, near or far, that is cut off at REACH_UM."""
    n = len(px)
    sigma_um = np.where(rng.random(n) < FAR_SHARE, DIFFUSION_UM[1], DIFFUSION_UM[0])
    within_reach = -np.expm1(-((REACH_UM / sigma_um) ** 2) / 2)
    distance_px = sigma_um * np.sqrt(-2 * np.log1p(-rng.random(n) * within_reach)) / PIXEL_UM
    angle = rng.uniform(0, 2 * np.pi, n)
    moved = px + distance_px[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    n_outside = int(((moved < 0) | (moved >= (shape[1], shape[0]))).any(axis=1).sum())
    if n_outside:
        raise ValueError(
            f"{n_outside} transcripts of owned cells lie outside the window: it must reach "
            f"{REACH_UM:g} µm beyond their bodies"
        )
    return np.asarray(moved)


def _draw_ambient(
    rng: np.random.Generator, donor: I64, n_made: int, models: Sequence[ExpressionModel]
) -> I64:
    """Genes of the ambient transcripts, from donors as those of the transcripts that cells made."""
    share = float(models[0].ambient_share)
    of = donor[rng.integers(0, max(n_made, 1), rng.poisson(n_made * share / (1 - share)))]
    drawn = [
        rng.choice(len(models[number].genes), int((of == number).sum()), p=models[number].ambient)
        for number in np.unique(of)
    ]
    return np.concatenate([np.zeros(0, np.int64), *drawn])


def _draw_controls(rng: np.random.Generator, features: Sequence[Feature], n_made: int) -> I64:
    """Rows of the controls among the features, by each kind's share."""
    drawn = [np.zeros(0, np.int64)]
    for kind in dict.fromkeys(f.kind for f in features if f.kind):
        rows = np.array([row for row, f in enumerate(features) if f.kind == kind])
        drawn.append(rng.choice(rows, rng.poisson(kind.share * n_made)))
    return np.concatenate(drawn)


def _decode(
    rng: np.random.Generator,
    block: TissueBlock,
    px: F64,
    feature: I64,
    features: Sequence[Feature],
    made_by: I64,
) -> tuple[Transcripts, I64]:
    """What the instrument makes of molecules at `px` of the window, in the order of its file."""
    n = len(px)
    good_share = np.array([f.kind.good_share if f.kind else GOOD_SHARE for f in features])
    first = np.array([f.codewords[0] for f in features])
    n_codewords = np.array([len(f.codewords) for f in features])
    codeword = first[feature] + (rng.random(n) * n_codewords[feature]).astype(np.int64)
    order = np.lexsort((rng.random(n), codeword))
    px, feature = px[order], feature[order]
    x, y = px.astype(np.int64).T
    um = _in_steps((px + np.array([block.x0_px, block.y0_px])) * PIXEL_UM)
    transcripts = Transcripts(
        # Decided before the position is stored in steps: a few on an edge step over it.
        cell=block.cell[y, x].astype(np.int64) - 1,
        feature=feature,
        codeword=codeword[order],
        x_um=um[:, 0],
        y_um=um[:, 1],
        z_um=_in_steps(rng.normal(18, 3.5, n).clip(3, 33)),
        qv=_draw_qv(rng, good_share[feature]),
        in_nucleus=block.nucleus[y, x] > 0,
        nucleus_distance_um=_in_steps(_to_nucleus_um(block.nucleus)[y, x]),
    )
    return transcripts, made_by[order]


def _to_nucleus_um(nucleus: I32) -> npt.NDArray[np.float32]:
    outside = (nucleus <= 0).astype(np.uint8)
    if outside.all():
        # Of the nearest nucleus no more is known than that the window doesn't hold it.
        return np.full(nucleus.shape, np.hypot(*nucleus.shape) * PIXEL_UM, np.float32)
    distance_px = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_5)
    return np.asarray(distance_px * PIXEL_UM, np.float32)


def _draw_qv(rng: np.random.Generator, good_share: F64) -> F64:
    """Phred values in steps of a quarter: most good ones are exactly 40, bad ones around 14.

    As in real runs of prostate and mouse brain (docs/calibration.md).
    """
    n = len(good_share)
    good = rng.random(n) < good_share
    high = np.where(rng.random(n) < 0.68, 40.0, QV_MIN + 20 * rng.beta(1.6, 1.0, n))
    low = np.where(rng.random(n) < 0.05, 0.0, QV_MIN - 12.5 * rng.beta(1.4, 1.4, n).clip(0.02))
    return np.asarray(np.floor(np.where(good, high, low) * 4) / 4)


def _in_steps(value_um: npt.NDArray[np.floating]) -> F64:
    return np.asarray(np.rint(value_um / STEP_UM) * STEP_UM, dtype=np.float64)
