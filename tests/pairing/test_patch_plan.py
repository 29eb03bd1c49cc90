"""Blocks of patches: every patch in one of them, and few tiles decoded for two."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairing import patch_plan
from pairing.patch_plan import MAX_REDECODED, plan_cuts

PATCH_PX = 230
# Tiles of scanners and writers: (width, height); the last is a strip.
TILES = [(240, 240), (256, 256), (512, 512), (1024, 1024), (16_000, 256)]


def footprints(centres_px: Any, tile_px: tuple[int, int]) -> Any:
    low = (centres_px - PATCH_PX / 2).clip(0)
    high = centres_px + PATCH_PX / 2
    return (np.concatenate([low, high], axis=1) // (tile_px * 2)).astype(np.int64)


def n_tiles_of(footprints: Any) -> int:
    return len(
        {
            (x, y)
            for x0, y0, x1, y1 in footprints.tolist()
            for x in range(x0, x1 + 1)
            for y in range(y0, y1 + 1)
        }
    )


@st.composite
def layouts(draw: st.DrawFn) -> Any:
    """Cells of a section of up to 16,000 px: everywhere, in patches of tissue, or along a line."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        corner = rng.uniform(0, 12_000, 2)
        size = rng.uniform(0, 1, 2) ** 2 * (16_000 - corner)
        parts.append(corner + rng.uniform(0, 1, (draw(st.integers(1, 600)), 2)) * size)
    return np.concatenate(parts)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from(TILES))
def test_every_patch_is_in_one_block_and_few_tiles_in_two(
    centres_px: Any, tile_px: tuple[int, int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patch_plan, "BLOCK_PATCHES", 20)
        wanted = footprints(centres_px, tile_px)
        plan = plan_cuts(wanted, held_bytes_per_column=1)
        assert sorted(np.concatenate(plan.blocks).tolist()) == list(range(len(centres_px)))
        assert plan.n_tiles == n_tiles_of(wanted)
        assert plan.n_decoded == sum(n_tiles_of(wanted[block]) for block in plan.blocks)
        assert plan.n_decoded <= (1 + MAX_REDECODED) * plan.n_tiles
        # The order of the cells is none of the plan's business.
        order = np.random.default_rng(0).permutation(len(wanted))
        again = plan_cuts(wanted[order], held_bytes_per_column=1)
        assert [sorted(order[b].tolist()) for b in again.blocks] == [
            b.tolist() for b in plan.blocks
        ]


@pytest.mark.parametrize(
    ("tile_px", "n_blocks"),
    [((240, 240), 24), ((256, 256), 24), ((512, 512), 8), ((1024, 1024), 4), ((16_000, 256), 8)],
    ids=str,
)
def test_a_full_section_is_work_for_many(tile_px: tuple[int, int], n_blocks: int) -> None:
    centres_px = np.random.default_rng(1).uniform(0, 16_000, (300_000, 2))
    plan = plan_cuts(footprints(centres_px, tile_px), held_bytes_per_column=1)
    assert len(plan.blocks) >= n_blocks
    sizes = [len(block) for block in plan.blocks]
    assert max(sizes) < 6 * min(sizes)
    assert plan.n_decoded <= (1 + MAX_REDECODED) * plan.n_tiles


def test_tissue_is_cut_where_there_is_none() -> None:
    rng = np.random.default_rng(2)
    centres_px = rng.uniform(0, 4000, (12_000, 2))
    centres_px[6000:, 0] += 6000
    plan = plan_cuts(footprints(centres_px, (1024, 1024)), 1)
    assert plan.n_decoded == plan.n_tiles
    assert [block.tolist() for block in plan.blocks] == [
        list(range(6000)), list(range(6000, 12_000)),
    ]  # fmt: skip


def test_few_patches_are_one_block() -> None:
    centres_px = np.random.default_rng(3).uniform(0, 16_000, (8000, 2))
    assert len(plan_cuts(footprints(centres_px, (256, 256)), 1).blocks) == 1
    assert plan_cuts(np.zeros((0, 4), np.int64), 1).blocks == ()


def test_no_block_is_wider_than_memory_allows() -> None:
    centres_px = np.random.default_rng(4).uniform(0, 16_000, (3000, 2))
    wanted = footprints(centres_px, (1024, 1024))
    plan = plan_cuts(wanted, held_bytes_per_column=200 * 2**20)
    widths = [wanted[b, 2].max() - wanted[b, 0].min() + 1 for b in plan.blocks]
    assert max(widths) <= 2
