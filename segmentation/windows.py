"""The windows of a network: one global grid over a slide, run in groups, stored once, read blended.

The grid starts at the slide's origin and its windows are the same whatever the blocks are, so that
every pixel has one flow. What a window shows is stored as float16; blocks read it from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pairing.geometry import Box
from pairing.slide import Damage, open_slide
from segmentation.stain import Normalisation, Rgb, haematoxylin
from shards.artifact import write_atomically, written_aside
from shards.schema import Record

# Flow y, flow x (both times five, as Cellpose's networks give them), logit, haematoxylin.
N_CHANNELS = 4
Output = npt.NDArray[np.float16]  # (N_CHANNELS, Y, X), or of several windows, stacked
# Windows are decoded and stored in squares of about this size: each tile of the file is decoded
# little more than once, and a square of pixels is some ten megabytes.
_GROUP_PX = 2048
# Where no window shows tissue nothing is inside.
_GLASS_LOGIT = np.float32(-1000)


@dataclass(frozen=True, slots=True)
class WindowGrid:
    """Square windows of `window_px`, each `overlap_px` over the next, from the slide's origin.

    All in pixels of `mpp`; the first window begins half an overlap before the origin. `size_px` is
    the slide's (width, height); `shown` (down, across) tells which windows show tissue: the others
    are glass, where nothing is looked for.
    """

    mpp: float
    size_px: tuple[int, int]
    window_px: int
    overlap_px: int
    shown: npt.NDArray[np.bool_]

    @classmethod
    def over(
        cls, size_px: tuple[int, int], mpp: float, window_px: int, overlap_px: int
    ) -> WindowGrid:
        """All windows of a slide of `size_px` (width, height) at `mpp`."""
        n_across, n_down = (-(-n // (window_px - overlap_px)) for n in size_px)
        return cls(mpp, size_px, window_px, overlap_px, np.ones((n_down, n_across), bool))

    @property
    def stride_px(self) -> int:
        return self.window_px - self.overlap_px

    @property
    def group_side(self) -> int:
        """Windows along a side of a group."""
        return max(1, _GROUP_PX // self.stride_px)

    def box(self, row: int, column: int) -> Box:
        """Where a window lies: half-open, possibly reaching outside the slide."""
        x0 = column * self.stride_px - self.overlap_px // 2
        y0 = row * self.stride_px - self.overlap_px // 2
        return x0, y0, x0 + self.window_px, y0 + self.window_px

    def touching(self, box: Box) -> list[tuple[int, int]]:
        """(row, column) of the shown windows that share a pixel with a box, row by row."""
        half, stride = self.overlap_px // 2, self.stride_px
        rows, columns = (
            range(
                max(0, (low + half - self.window_px) // stride + 1),
                min(n, (high - 1 + half) // stride + 1),
            )
            for low, high, n in zip(box[1::-1], box[:1:-1], self.shown.shape, strict=True)
        )
        return [(r, c) for r, c in product(rows, columns) if self.shown[r, c]]

    def groups(self) -> list[Group]:
        """All groups with a shown window, row by row."""
        side = self.group_side
        return [
            group
            for r, c in product(*(range(-(-n // side)) for n in self.shown.shape))
            if (group := self.group(r, c)).windows
        ]

    def group(self, row: int, column: int) -> Group:
        """The group at a place of the grid of groups."""
        side = self.group_side
        rows, columns = (range(k * side, (k + 1) * side) for k in (row, column))
        n_down, n_across = self.shown.shape
        windows = [
            (r, c)
            for r, c in product(rows, columns)
            if r < n_down and c < n_across and self.shown[r, c]
        ]
        return Group(row, column, tuple(windows))

    def groups_of(self, box: Box) -> set[Group]:
        """The groups of all shown windows that share a pixel with a box."""
        side = self.group_side
        places = {(row // side, column // side) for row, column in self.touching(box)}
        return {self.group(*place) for place in places}


@dataclass(frozen=True, slots=True)
class Group:
    """A square of neighbouring windows (row, column), those without tissue left out."""

    row: int
    column: int
    windows: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        return f"windows-{self.row:04d}-{self.column:04d}"


def plan_windows(grid: WindowGrid, tissue: npt.NDArray[np.bool_], tissue_mpp: float) -> WindowGrid:
    """The windows of a grid that show any of `tissue`, (Y, X) at `tissue_mpp` from its origin."""
    shown = np.zeros_like(grid.shown)
    cell = grid.mpp / tissue_mpp
    for row, column in np.argwhere(grid.shown).tolist():
        x0, y0, x1, y1 = grid.box(row, column)
        rows, columns = (
            slice(max(0, int(low * cell)), max(0, math.ceil(high * cell)))
            for low, high in ((y0, y1), (x0, x1))
        )
        shown[row, column] = tissue[rows, columns].any()
    return replace(grid, shown=shown)


class Predictor(Protocol):
    """A network, loaded."""

    @property
    def device(self) -> str: ...

    def predict(self, rgb_BYXC: Rgb, normalisation: Normalisation) -> Output:
        """Windows at the network's pixel size to the first 3 channels of their outputs."""


class GroupFacts(Record):
    """How a group was run: on which kind of device, and what damage of the slide it met."""

    device: str
    damage: tuple[Damage, ...]


@dataclass(frozen=True, slots=True)
class SlideSource:
    """A slide that any process can open: its path, and the pixel size that overrules its own."""

    path: Path
    mpp: float | None


def run_groups(
    groups: Sequence[Group],
    *,
    kept: Path,
    source: SlideSource,
    grid: WindowGrid,
    normalisation: Normalisation,
    network: Predictor,
) -> list[tuple[Group, GroupFacts]]:
    """Run the network over groups and publish each in `kept`; the next is decoded meanwhile."""
    done = []
    with ThreadPoolExecutor(1) as decoder:
        coming = [decoder.submit(decode_group, group, source, grid) for group in groups]
        for group, decoded in zip(groups, coming, strict=True):
            rgb_BYXC, haematoxylin_BYX, damage = decoded.result()
            output = np.empty((len(rgb_BYXC), N_CHANNELS, *rgb_BYXC.shape[1:3]), np.float16)
            output[:, :3] = network.predict(rgb_BYXC, normalisation)
            output[:, 3] = haematoxylin_BYX
            facts = GroupFacts(device=network.device, damage=damage)
            with written_aside(_outputs_path(kept, group)) as path, path.open("wb") as file:
                np.save(file, output, allow_pickle=False)
            # The last: a group is there if and only if its facts are.
            write_atomically(_facts_path(kept, group), facts.model_dump_json().encode())
            done.append((group, facts))
    return done


def decode_group(
    group: Group, source: SlideSource, grid: WindowGrid
) -> tuple[Rgb, npt.NDArray[np.float32], tuple[Damage, ...]]:
    """Pixels (windows, Y, X, 3) at the grid's mpp, haematoxylin (windows, Y, X), and damage met."""
    boxes = np.array([grid.box(*window) for window in group.windows])
    x0, y0 = boxes[:, :2].min(axis=0).tolist()
    x1, y1 = boxes[:, 2:].max(axis=0).tolist()
    with open_slide(source.path, mpp=source.mpp) as opened:
        slide, damage = opened.tolerant()
        # In one piece: every tile of the file under it is decoded once.
        rgb = slide.read_at((x0, y0, x1, y1), grid.mpp)
        amount = haematoxylin(rgb, slide.background)
    parts = [(slice(b[1] - y0, b[3] - y0), slice(b[0] - x0, b[2] - x0)) for b in boxes.tolist()]
    unique = tuple(sorted(set(damage), key=lambda d: (d.box, d.kind)))
    return np.stack([rgb[p] for p in parts]), np.stack([amount[p] for p in parts]), unique


def read_group_facts(kept: Path, group: Group) -> GroupFacts | None:
    """How a published group was run, or None where it is not there yet."""
    path = _facts_path(kept, group)
    return GroupFacts.model_validate_json(path.read_bytes()) if path.exists() else None


def has_outputs(kept: Path, group: Group) -> bool:
    """Whether the outputs of a published group are still there."""
    return _outputs_path(kept, group).exists()


def remove_outputs(kept: Path, group: Group) -> None:
    """Remove the outputs of a group that no block waits for; how it was run stays told."""
    _outputs_path(kept, group).unlink()


def remove_group(kept: Path, group: Group) -> None:
    """Remove a group as if it had never been run; the facts first, which stand for all of it."""
    _facts_path(kept, group).unlink()
    _outputs_path(kept, group).unlink(missing_ok=True)


def _facts_path(kept: Path, group: Group) -> Path:
    return kept / f"{group.name}.json"


def _outputs_path(kept: Path, group: Group) -> Path:
    return kept / f"{group.name}.npy"


@dataclass(frozen=True, slots=True)
class Field:
    """What the network says of a box: `flow_2YX` px a step, `logit_YX`, `haematoxylin_YX`."""

    flow_2YX: npt.NDArray[np.float32]
    logit_YX: npt.NDArray[np.float32]
    haematoxylin_YX: npt.NDArray[np.float32]


def read_field(kept: Path, grid: WindowGrid, box: Box) -> Field:
    """The network's stored outputs over a box; as `blended`."""
    output_of: dict[tuple[int, int], Output] = {}
    for group in grid.groups_of(box):
        outputs = np.load(_outputs_path(kept, group), mmap_mode="r", allow_pickle=False)
        output_of.update(zip(group.windows, outputs, strict=True))
    return blended(grid, box, output_of.__getitem__)


def blended(grid: WindowGrid, box: Box, output_of: Callable[[tuple[int, int]], Output]) -> Field:
    """What windows say of a box; `output_of(row, column)` is (N_CHANNELS, Y, X).

    Where windows overlap, each counts by how far from its own edge a pixel lies. Outside the
    slide, and where no window shows tissue, nothing is inside.
    """
    x0, y0, x1, y1 = box
    summed = np.zeros((N_CHANNELS, y1 - y0, x1 - x0), np.float32)
    weights = np.zeros((y1 - y0, x1 - x0), np.float32)
    ramp = _ramp(grid.window_px, grid.overlap_px)
    # Row by row of windows: sums of the same terms in the same order, whatever the box is.
    for window in grid.touching(box):
        wx0, wy0, wx1, wy1 = grid.box(*window)
        ax0, ay0, ax1, ay1 = max(x0, wx0), max(y0, wy0), min(x1, wx1), min(y1, wy1)
        here = (slice(ay0 - y0, ay1 - y0), slice(ax0 - x0, ax1 - x0))
        there = (slice(ay0 - wy0, ay1 - wy0), slice(ax0 - wx0, ax1 - wx0))
        weight = ramp[there[0], None] * ramp[there[1]]
        summed[:, *here] += weight * output_of(window)[:, *there].astype(np.float32)
        weights[here] += weight
    inside = weights > 0
    summed[:, inside] /= weights[inside]
    width, height = grid.size_px
    inside[: max(0, -y0)] = inside[max(0, height - y0) :] = False
    inside[:, : max(0, -x0)] = inside[:, max(0, width - x0) :] = False
    logit = np.where(inside, summed[2], _GLASS_LOGIT)
    return Field(summed[:2] / np.float32(5), logit, summed[3])


def _ramp(window_px: int, overlap_px: int) -> npt.NDArray[np.float32]:
    """Weights along a window: 1, and to its ends a straight fall over the overlap."""
    from_end = np.minimum(np.arange(window_px), np.arange(window_px)[::-1]) + 0.5
    weights: npt.NDArray[np.float32] = np.minimum(from_end / max(overlap_px, 1), 1).astype(
        np.float32
    )
    return weights
