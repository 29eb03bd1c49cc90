"""Which patches are cut together: blocks of a slide between which few tiles are decoded twice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pairing.patch_grid import expanded, tile_keys

# Of the tiles that are needed, no larger share is decoded a second time for another block.
MAX_REDECODED = 0.15
# A block of no more patches is work for a second or two, and not cut further.
BLOCK_PATCHES = 8192
# What a block costs beside its tiles (a slide to open, files to publish), in tiles to decode.
_BLOCK_COSTS_TILES = 4
# A block holds the rows of the slide that it works on; they may take no more than this, or it is
# cut, whatever that decodes twice.
_HELD_BYTES = 512 * 2**20

_X, _Y = 0, 1


@dataclass(frozen=True, slots=True)
class Plan:
    """`blocks` of patches, each by their numbers, ascending, and how many tiles they decode.

    Blocks go from the top of the slide down. `n_tiles` are needed by any patch at all.
    """

    blocks: tuple[npt.NDArray[np.int64], ...]
    n_tiles: int
    n_decoded: int


def plan_cuts(footprints: npt.NDArray[np.int64], held_bytes_per_column: int) -> Plan:
    """Blocks of the patches with these `footprints`: (n, 4) first and last tile, inclusive.

    A patch belongs to one block, which decodes all the tiles of its patches. So a cut between two
    blocks costs the tiles that patches of both need. From one block of all patches, always the one
    with the most is cut in two, across or down, where that costs least for the patches that are
    split off; until what is cut would decode more than MAX_REDECODED of the tiles twice, or all
    blocks are small. Cells decide with the slide, workers never.

    `held_bytes_per_column` is what a block holds for each column of tiles that it is wide.
    """
    if not len(footprints):
        return Plan((), 0, 0)
    kinds, kind_of, n_of_kind = _kinds(footprints)
    whole = _Part(kinds, n_of_kind, np.arange(len(kinds)), held_bytes_per_column)
    n_tiles = n_decoded = len(np.unique(tile_keys(kinds)))
    waiting, done = [whole], list[_Part]()
    while waiting:
        part = max(waiting, key=lambda p: (p.too_wide, p.n_patches))
        waiting.remove(part)
        cut = None
        if part.too_wide:
            cut = _best_cut(part, (_X,))
        elif part.n_patches > BLOCK_PATCHES:
            cut = _best_cut(part, (_X, _Y))
            if cut is not None and n_decoded + cut.n_tiles > (1 + MAX_REDECODED) * n_tiles:
                cut = None
        if cut is None:
            done.append(part)
        else:
            n_decoded += cut.n_tiles
            waiting += part.cut(cut)
    done.sort(key=lambda p: (*p.kinds[:, 1::-1].min(axis=0).tolist(), int(p.numbers[0])))
    block_of_kind = np.empty(len(kinds), np.int64)
    for i, part in enumerate(done):
        block_of_kind[part.numbers] = i
    block_of = block_of_kind[kind_of]
    order = np.argsort(block_of, kind="stable")
    blocks = np.split(order, np.cumsum(np.bincount(block_of))[:-1])
    return Plan(tuple(blocks), n_tiles, n_decoded)


def _kinds(
    footprints: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Footprints without repetition, which of them each patch has, and how many patches each."""
    sizes = footprints[:, 2:] - footprints[:, :2]
    key = footprints[:, 1]
    # One number a footprint: sorting rows of four takes many times as long.
    for column in (footprints[:, 0], sizes[:, 0], sizes[:, 1]):
        key = key * (int(column.max()) + 1) + column
    _, first, kind_of, n_of_kind = np.unique(
        key, return_index=True, return_inverse=True, return_counts=True
    )
    return footprints[first], kind_of, n_of_kind


@dataclass(frozen=True, slots=True)
class _Cut:
    """Patches whose first tile lies before `at` go to one side; `n_tiles` are needed by both."""

    axis: int
    at: int
    n_tiles: int
    score: float


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Kinds of patches, by their (m, 4) tiles and how many there are of each."""

    kinds: npt.NDArray[np.int64]
    n_of_kind: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]  # among all kinds
    held_bytes_per_column: int

    @property
    def n_patches(self) -> int:
        return int(self.n_of_kind.sum())

    @property
    def too_wide(self) -> bool:
        n_columns = int(self.kinds[:, 2].max() - self.kinds[:, 0].min()) + 1
        return n_columns * self.held_bytes_per_column > _HELD_BYTES

    def cut(self, cut: _Cut) -> list[_Part]:
        before = self.kinds[:, cut.axis] < cut.at
        return [
            _Part(
                self.kinds[side], self.n_of_kind[side], self.numbers[side],
                self.held_bytes_per_column,
            )
            for side in (before, ~before)
        ]  # fmt: skip


def _best_cut(part: _Part, axes: tuple[int, ...]) -> _Cut | None:
    """The cut that costs least for each patch on its smaller side; None where none is possible."""
    kind = expanded(part.kinds)[0]
    _, tile = np.unique(tile_keys(part.kinds), return_inverse=True)
    best = None
    for axis in axes:
        first = part.kinds[:, axis] - part.kinds[:, axis].min()
        n_cuts = int(first.max())
        if n_cuts == 0:
            continue
        # A tile is needed on both sides of the cuts after the first patch that needs it, up to
        # the last one.
        earliest = np.full(tile.max() + 1, n_cuts)
        latest = np.zeros(tile.max() + 1, np.int64)
        np.minimum.at(earliest, tile, first[kind])
        np.maximum.at(latest, tile, first[kind])
        opens = np.bincount(earliest, minlength=n_cuts + 1)
        closes = np.bincount(latest, minlength=n_cuts + 1)
        n_shared = np.cumsum(opens - closes)[:n_cuts]
        n_before = np.cumsum(np.bincount(first, part.n_of_kind, n_cuts + 1))[:n_cuts]
        score = (n_shared + _BLOCK_COSTS_TILES) / np.minimum(n_before, part.n_patches - n_before)
        i = int(score.argmin())
        if best is None or score[i] < best.score:
            at = i + 1 + int(part.kinds[:, axis].min())
            best = _Cut(axis, at, int(n_shared[i]), float(score[i]))
    return best
