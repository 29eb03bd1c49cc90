"""Sections: tiles of tissue cut to an outline, as one piece or as the cores of an array."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pairing.simulate.architecture import TissueMap
from pairing.simulate.fields import Outline
from pairing.simulate.nuclei import Nuclei, joined_nuclei
from pairing.simulate.tissue import KEEP_APART, PERIOD_UM, Cells, Piece, Tile, Tissue, draw_tile

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

# Nuclei that one of the two pictures does not show, of all nuclei: drawn for each section.
SHARE_UNSEEN = (0.05, 0.10)
_MARGIN_UM = (35.0, 90.0, 60.0, 40.0)  # glass beyond the tissue: left, right, top, bottom
_MEAN_CELLS_PER_MM2 = 3900.0  # a first guess alone
_LARGEST_RAGGEDNESS = 6.0  # standard deviations
_RIM_UM = 5.0  # no nucleus nearer to the edge of the tissue
_CORE_GAP = 0.35  # between the cores of a microarray, of their diameter


def draw_section(rng: np.random.Generator, n_cells: int, n_donors: int = 1) -> Tissue:
    """A section in which the instrument sees exactly `n_cells` cells, with blank glass around.

    One donor gives one section, several give the cores of a microarray in a square array.
    """
    unseen = float(rng.uniform(*SHARE_UNSEEN))
    seen_of = np.full(n_donors, n_cells // n_donors)
    seen_of[: n_cells % n_donors] += 1
    columns = int(np.ceil(np.sqrt(n_donors)))
    parts: list[tuple[Piece, Cells, Nuclei]] = []
    corner_x, corner_y, width, row_bottom = _MARGIN_UM[0], _MARGIN_UM[2], 0.0, 0.0
    for donor, n_seen in enumerate(seen_of.tolist()):
        outline = Outline.of_section(rng) if n_donors == 1 else Outline.of_core(rng)
        if donor and donor % columns == 0:
            corner_x, corner_y = _MARGIN_UM[0], row_bottom
        part = _draw_piece(rng, outline, donor, n_seen, unseen, (corner_x, corner_y))
        x0, _, x1, y1 = part[0].box_um
        gap = _CORE_GAP * (x1 - x0) if n_donors > 1 else 0.0
        corner_x = x1 + gap
        width, row_bottom = max(width, x1), max(row_bottom, y1 + gap)
        parts.append(part)
    height = max(piece.box_um[3] for piece, _, _ in parts)
    cells, nuclei = _joined([c for _, c, _ in parts], [n for _, _, n in parts])
    return Tissue(
        width + _MARGIN_UM[1],
        height + _MARGIN_UM[3],
        tuple(piece for piece, _, _ in parts),
        cells,
        nuclei,
    )


def draw_next_section(rng: np.random.Generator, section: Tissue) -> Tissue:
    """The section after: the same architecture, other cells; none of them is the instrument's."""
    parts = []
    for piece in section.pieces:
        tissue_map = piece.tissue_map.next_section(rng)
        points, source, tile = _fill(rng, tissue_map, piece.box_um)
        keep = np.arange(len(points))
        cells, nuclei = _placed(
            rng, tile, tissue_map.period_um, points, source, keep, piece.donor, len(points), 0.0
        )
        parts.append((replace(piece, tissue_map=tissue_map), cells, nuclei))
    cells, nuclei = _joined([c for _, c, _ in parts], [n for _, _, n in parts])
    pieces = tuple(piece for piece, _, _ in parts)
    return Tissue(section.width_um, section.height_um, pieces, cells, nuclei)


def _draw_piece(
    rng: np.random.Generator,
    outline: Outline,
    donor: int,
    n_seen: int,
    unseen: float,
    corner_um: tuple[float, float],
) -> tuple[Piece, Cells, Nuclei]:
    n_wanted = round(n_seen / (1 - unseen))
    unit = np.arange(-2.2, 2.2, 0.02)
    area = float((outline.level(unit[None], unit[:, None]) > 0).sum() * 0.02**2)
    radius = np.sqrt(n_wanted / (_MEAN_CELLS_PER_MM2 * 1e-6) / area)
    period = min(PERIOD_UM, 2.2 * radius + 60)
    tissue_map = TissueMap.draw(rng, period, None)
    tile = draw_tile(rng, tissue_map, 1.0, KEEP_APART)
    # The smallest outline of those tried that holds enough; a few cells too many are left out.
    low, high = 0.3 * radius, 3.0 * radius
    while high / low > 1.004:
        radius = np.sqrt(low * high)
        placed, box = _at_corner(replace(tissue_map, outline=outline.scaled(radius)), corner_um)
        points, source = _inside(placed, box, tile[0])
        low, high = (radius, high) if len(points) < n_wanted else (low, radius)
    placed, box = _at_corner(replace(tissue_map, outline=outline.scaled(high)), corner_um)
    points, source = _inside(placed, box, tile[0])
    keep = np.sort(rng.permutation(len(points))[:n_wanted])
    cells, nuclei = _placed(
        rng, tile, tissue_map.period_um, points, source, keep, donor, n_seen, unseen
    )
    return Piece(placed, donor, box), cells, nuclei


def _at_corner(
    tissue_map: TissueMap, corner_um: tuple[float, float]
) -> tuple[TissueMap, tuple[float, float, float, float]]:
    """Move the outline so that the box around its tissue starts at the corner."""
    assert tissue_map.outline is not None
    radius = tissue_map.outline.radius_um
    grid = np.linspace(-2.4 * radius, 2.4 * radius, 480)
    # The ragged edge is of the frame and moves against the outline: 20 µm leave room for it.
    inside = tissue_map.outline.level(grid[None], grid[:, None]) > -20
    x, y = grid[inside.any(0)], grid[inside.any(1)]
    origin = (float(corner_um[0] - x[0]), float(corner_um[1] - y[0]))
    box = (*corner_um, float(x[-1] + origin[0]), float(y[-1] + origin[1]))
    return replace(tissue_map, origin_um=origin), box


def _inside(
    tissue_map: TissueMap, box_um: tuple[float, float, float, float], tile_points: F64
) -> tuple[F64, I64]:
    """Copies of the tile's points that lie inside the outline, and which point each is of."""
    period = tissue_map.period_um
    assert tissue_map.outline is not None
    x0, y0 = tissue_map.origin_um
    points, source = [], []
    for kx in range(int(box_um[0] // period), int(box_um[2] // period) + 1):
        for ky in range(int(box_um[1] // period), int(box_um[3] // period) + 1):
            moved = tile_points + np.array([kx, ky]) * period
            level = tissue_map.outline.level(moved[:, 0] - x0, moved[:, 1] - y0).astype(np.float64)
            # Raggedness moves the edge by less than this, so that it is asked for there alone.
            edge = np.flatnonzero(np.abs(level) < 7 * _LARGEST_RAGGEDNESS)
            level[edge] += 7 * tissue_map.ragged.at(moved[edge])
            inside = np.flatnonzero(level > _RIM_UM)
            points.append(moved[inside])
            source.append(inside)
    return np.concatenate(points), np.concatenate(source)


def _fill(
    rng: np.random.Generator, tissue_map: TissueMap, box_um: tuple[float, float, float, float]
) -> tuple[F64, I64, Tile]:
    # The tile is the whole period's; the outline cuts it afterwards.
    tile = draw_tile(rng, replace(tissue_map, outline=None), 1.0, KEEP_APART)
    return *_inside(tissue_map, box_um, tile[0]), tile


def _placed(
    rng: np.random.Generator,
    tile: Tile,
    period_um: float,
    points: F64,
    source: I64,
    keep: I64,
    donor: int,
    n_seen: int,
    unseen: float,
) -> tuple[Cells, Nuclei]:
    """The cells at `points[keep]`, copies of the tile's; the instrument sees `n_seen` of them."""
    tile_points, tile_cells, tile_nuclei = tile
    of_cell = source[keep]
    n = len(keep)
    seen = np.zeros(n, bool)
    seen[rng.permutation(n)[:n_seen]] = True
    cells = replace(tile_cells.take(of_cell), donor=np.full(n, donor), seen=seen)
    # The tile's first nuclei are its cells' own, in their order; second ones follow.
    n_tile = len(tile_points)
    second = np.full(n_tile, -1)
    second[tile_nuclei.cell[n_tile:]] = np.arange(n_tile, len(tile_nuclei.cell))
    twins = np.flatnonzero(second[of_cell] >= 0)
    rows = np.concatenate([of_cell, second[of_cell[twins]]])
    cell = np.concatenate([np.arange(n), twins])
    shift = points[keep] - tile_points[of_cell]
    nuclei = tile_nuclei.take(rows)
    # A second nucleus may lie across the edge of the tile from the first.
    apart = nuclei.centres_um - tile_points[of_cell[cell]]
    shift = shift[cell] - period_um * np.rint(apart / period_um)
    lost = rng.random(len(rows)) < rng.uniform(*SHARE_UNSEEN)
    return cells, replace(
        nuclei,
        cell=cell,
        x_um=nuclei.x_um + shift[:, 0],
        y_um=nuclei.y_um + shift[:, 1],
        in_dapi=nuclei.in_dapi & seen[cell],
        in_he=nuclei.in_he & ~lost,
    )


def _joined(cells: list[Cells], nuclei: list[Nuclei]) -> tuple[Cells, Nuclei]:
    """The parts as one, with first nuclei before all second ones."""
    start = np.cumsum([0, *(len(c.state) for c in cells)])
    all_cells = Cells(
        *(np.concatenate([getattr(c, name) for c in cells]) for name in Cells.__slots__)
    )
    all_nuclei = joined_nuclei(
        [replace(n, cell=n.cell + s) for n, s in zip(nuclei, start, strict=False)]
    )
    is_second = [np.arange(len(n.cell)) >= len(c.state) for c, n in zip(cells, nuclei, strict=True)]
    return all_cells, all_nuclei.take(np.argsort(np.concatenate(is_second), kind="stable"))
