"""Patches over damaged places of a slide: cut all the same, marked, and the damage reported."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pairing import patch_blocks, patch_plan
from pairing.patch_blocks import (
    DAMAGE_FILE,
    INDEX_SCHEMA,
    DamageReport,
    PatchBlock,
    plan_blocks,
)
from pairing.patches import INDEX_FILE, PatchReader, write_patches
from pairing.slide import Damage, open_slide
from shards.artifact import sha256_of
from shards.dataset import read_record
from shards.errors import BadInput
from shards.schema import PatchSpec
from tests.pairing.slides import MPP, ome, repeat, repoint, spoil, tissue

WIDTH, HEIGHT, TILE = 2560, 2304, 128
# Patches of 64 px of the slide.
SPEC = PatchSpec(image="he", fov_um=16.0, size_px=64, center="cell", jpeg_quality=95)
GLASS = (240, 238, 243)


def picture_of_slide() -> Any:
    image = tissue(HEIGHT, WIDTH)
    image[:, :TILE] = GLASS
    return image


def box_of(tile: int) -> tuple[int, int, int, int]:
    x, y = tile % (WIDTH // TILE) * TILE, tile // (WIDTH // TILE) * TILE
    return x, y, x + TILE, y + TILE


# Tiles by their number, 20 a row.
UNDECODABLE, DUPLICATE, ORIGINAL, BLACK, MISSING = 65, 210, 133, 96, 318
HOLE = (2000, 2020, 2100, 2075)  # of no tile: over four tiles
DAMAGE = [
    ("undecodable", box_of(UNDECODABLE)),
    ("black", box_of(BLACK)),
    ("duplicate", box_of(ORIGINAL)),
    ("duplicate", box_of(DUPLICATE)),
    ("black", (2000, 2020, 2048, 2048)),
    ("black", (2048, 2020, 2100, 2048)),
    ("missing", box_of(MISSING)),
    ("black", (2000, 2048, 2048, 2075)),
    ("black", (2048, 2048, 2100, 2075)),
]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_plan, "BLOCK_PATCHES", 50)


@pytest.fixture(scope="module")
def centres_px() -> Any:
    rng = np.random.default_rng(4)
    return rng.uniform((TILE + 40, -20), (WIDTH + 20, HEIGHT + 20), (3000, 2))


def shard_order(n: int) -> Any:
    return np.random.default_rng(5).permutation(n)


def written(folder: Path, path: Path, centres_px: Any, map_blocks: Any = map) -> dict[str, Any]:
    folder.mkdir()
    kept = folder.with_name(f"{folder.name}-blocks")
    kept.mkdir()
    order = shard_order(len(centres_px))
    open_image = partial(open_slide, path)
    made = write_patches(folder, kept, open_image, centres_px, order, SPEC, map_blocks)
    assert made.sha256s == {p.name: sha256_of(p) for p in folder.glob("*.jpgs")}
    return made.summary


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, centres_px: Any) -> Path:
    """Patches of the slide before it was damaged."""
    folder = tmp_path_factory.mktemp("whole")
    path = ome(folder / "he.ome.tif", picture_of_slide(), "YXS", **OPTIONS)
    summary = written(folder / "patches", path, centres_px)
    assert (summary["n_damaged_tiles"], summary["n_on_damaged_tile"]) == (0, 0)
    return folder / "patches"


OPTIONS: dict[str, Any] = {
    "photometric": "rgb", "tile": (TILE, TILE), "compression": "deflate",
    "compressionargs": {"level": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = picture_of_slide()
    for x0, y0, x1, y1 in (box_of(BLACK), HOLE):
        image[y0:y1, x0:x1] = 0
    path = ome(tmp_path_factory.mktemp("damaged") / "he.ome.tif", image, "YXS", **OPTIONS)
    spoil(path, UNDECODABLE)
    repeat(path, DUPLICATE, of=ORIGINAL)
    repoint(path, MISSING, (0, 0))
    repoint(path, 0, (0, 0))  # glass, where no cell lies
    return path


def read_all(folder: Path) -> tuple[pd.DataFrame, list[bytes]]:
    index = pq.read_table(folder / INDEX_FILE)
    assert index.schema.equals(INDEX_SCHEMA)
    table = index.to_pandas()
    reader = PatchReader(folder)
    jpegs = [reader.read(r.part, r.offset, r.size) for r in table.itertuples()]
    reader.close()
    return table, jpegs


def test_damage_is_reported_and_the_patches_over_it_are_marked(
    damaged: Path, whole: Path, centres_px: Any, tmp_path: Path, small_blocks: None
) -> None:
    summary = written(tmp_path / "patches", damaged, centres_px)
    report = read_record(tmp_path / "patches" / DAMAGE_FILE, DamageReport)
    assert sorted((d.box[1], d.box[0], d.kind) for d in report.damage) == sorted(
        (box[1], box[0], kind) for kind, box in DAMAGE
    )
    table, jpegs = read_all(tmp_path / "patches")
    expected = np.zeros(len(table), bool)
    left, top = np.floor(table["x_px"] - 31.5), np.floor(table["y_px"] - 31.5)
    for _, (x0, y0, x1, y1) in DAMAGE:
        across = (left < x1) & (left + 64 > x0)
        down = (top < y1) & (top + 64 > y0)
        expected |= (across & down).to_numpy()
    np.testing.assert_array_equal(table["damaged_tile"], expected)
    assert summary["n_damaged_tiles"] == len(DAMAGE)
    assert summary["n_on_damaged_tile"] == expected.sum()
    assert 50 < expected.sum() < len(table) / 2
    # All other patches are those of the slide as it was, of which there was one block.
    assert summary["n_blocks"] > 2
    before, jpegs_before = read_all(whole)
    pd.testing.assert_series_equal(table["row"], before["row"])
    assert not before["damaged_tile"].any()
    for marked, jpeg, jpeg_before in zip(expected, jpegs, jpegs_before, strict=True):
        assert marked or jpeg == jpeg_before


def test_what_cannot_be_seen_is_glass(damaged: Path, tmp_path: Path) -> None:
    centres = [np.add(box_of(tile)[:2], TILE / 2) for tile in (UNDECODABLE, BLACK)]
    written(tmp_path / "patches", damaged, np.array(centres))
    table, jpegs = read_all(tmp_path / "patches")
    assert table["damaged_tile"].all()
    for jpeg in jpegs:
        pixels = np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)
        assert np.abs(pixels - GLASS).max() <= 2


def test_order_and_repetition_of_blocks_change_no_byte(
    damaged: Path, centres_px: Any, tmp_path: Path, small_blocks: None
) -> None:
    def backwards(cut: Callable[[PatchBlock], str], blocks: Iterable[PatchBlock]) -> list[str]:
        return [cut(block) for block in list(blocks)[::-1]]

    written(tmp_path / "a", damaged, centres_px[:800])
    written(tmp_path / "b", damaged, centres_px[:800], backwards)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_stopped_cut_goes_on_where_it_was(
    damaged: Path, centres_px: Any, tmp_path: Path, small_blocks: None
) -> None:
    def stopped(cut: Callable[[PatchBlock], str], blocks: Iterable[PatchBlock]) -> Iterator[str]:
        for block in list(blocks)[:3]:
            yield cut(block)
        raise KeyboardInterrupt

    went_on: list[str] = []

    def watched(cut: Callable[[PatchBlock], str], blocks: Iterable[PatchBlock]) -> list[str]:
        went_on.extend(block.name for block in blocks)
        return [cut(block) for block in blocks]

    whole = written(tmp_path / "whole", damaged, centres_px[:800])
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "parts", damaged, centres_px[:800], stopped)
    assert list((tmp_path / "parts").iterdir()) == []
    kept = tmp_path / "parts-blocks"
    assert len(list(kept.glob("*.parquet"))) == 3
    # A block that was cut but not recorded is cut again: its table is what makes it whole.
    first = min(kept.glob("*.parquet"))
    first.unlink()
    open_image = partial(open_slide, damaged)
    again = write_patches(
        tmp_path / "parts", kept, open_image, centres_px[:800], shard_order(800), SPEC, watched
    )
    assert again.summary == whole
    assert len(went_on) == whole["n_blocks"] - 2
    assert first.stem in went_on
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("n_held", [None, 100])
def test_patches_of_a_part_lie_in_the_order_of_the_shards(
    damaged: Path,
    centres_px: Any,
    tmp_path: Path,
    n_held: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if n_held is not None:  # as of a block that is too large to be put in order at once
        monkeypatch.setattr(patch_blocks, "_HELD_BYTES", n_held * 2000)
    written(tmp_path / "patches", damaged, centres_px)
    table, jpegs = read_all(tmp_path / "patches")
    assert all(jpeg[:2] == b"\xff\xd8" and jpeg[-2:] == b"\xff\xd9" for jpeg in jpegs)
    ranks = np.argsort(shard_order(len(centres_px)))
    for _, part in table.sort_values("offset").groupby("part"):
        assert part["offset"].tolist() == [0, *np.cumsum(part["size"])[:-1]]
        n_sequences = 1 + (np.diff(ranks[part["row"]]) < 0).sum()
        if n_held is None:
            assert n_sequences == 1
        else:
            assert 1 < n_sequences <= 1 + part["size"].sum() // (n_held * 2000)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 900, 131_072, 131_073, 400_000]), st.integers(1, 30_000)),
        max_size=40,
    )
)
def test_what_is_expected_of_a_part_is_asked_for_in_pieces_that_the_system_takes(
    patches: list[tuple[int, int]],
) -> None:
    """All of it, nothing of wide gaps, and no more at a time than Linux fetches for one call."""
    asked: list[tuple[int, int]] = []

    def advise(file: int, start: int, n_bytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((start, start + n_bytes))

    gaps, sizes = np.array(patches, np.int64).reshape(-1, 2).T
    offsets = np.cumsum(gaps) + np.cumsum(sizes) - sizes
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        Path(name, "part.jpgs").touch()
        patch.setattr(os, "posix_fadvise", advise)
        PatchReader(Path(name)).expect("part", offsets, sizes)
    fetched = np.zeros(int(offsets[-1] + sizes[-1]) if patches else 0, bool)
    for start, stop in asked:
        assert 0 < stop - start <= 128 * 1024
        assert not fetched[start:stop].any()
        fetched[start:stop] = True
    wanted = np.zeros_like(fetched)
    for i, (offset, size) in enumerate(zip(offsets.tolist(), sizes.tolist(), strict=True)):
        between = i > 0 and gaps[i] <= 128 * 1024
        wanted[offset - gaps[i] * between : offset + size] = True
    np.testing.assert_array_equal(fetched, wanted)


def test_damage_where_no_patch_is_cut_is_not_looked_for(damaged: Path, tmp_path: Path) -> None:
    x0, y0, *_ = box_of(20 * 9 + 4)
    summary = written(tmp_path / "patches", damaged, np.array([[x0 + 60.0, y0 + 60.0]]))
    report = read_record(tmp_path / "patches" / DAMAGE_FILE, DamageReport)
    # Duplicates stand in the file's table of tiles, and are told wherever they are.
    assert report.damage == tuple(
        Damage(kind="duplicate", box=box_of(t)) for t in (ORIGINAL, DUPLICATE)
    )
    assert (summary["n_damaged_tiles"], summary["n_on_damaged_tile"]) == (2, 0)


@pytest.mark.parametrize(
    "image", [tissue(256, 256)[..., 0], tissue(256, 256)[..., :2]], ids=["one", "two"]
)
def test_an_he_has_three_channels(image: Any, tmp_path: Path) -> None:
    axes = "YX" if image.ndim == 2 else "CYX"
    data = image if image.ndim == 2 else np.moveaxis(image, 2, 0)
    path = ome(tmp_path / "he.ome.tif", data, axes, photometric="minisblack", tile=(64, 64))
    with pytest.raises(BadInput, match=r"(?s)a H&E: a slide of three channels.*morphology"):
        written(tmp_path / "patches", path, np.array([[128.0, 128.0]]))
    with open_slide(path) as slide:
        assert slide.mpp == MPP


@pytest.mark.parametrize(
    "layout", [{"tile": (128, 128)}, {"tile": (64, 240)}, {"rowsperstrip": 100}], ids=str
)
def test_tiles_are_decoded_once_a_block(
    layout: dict[str, Any], tmp_path: Path, small_blocks: None
) -> None:
    path = ome(tmp_path / "he.ome.tif", tissue(2600, 1300), "YXS", photometric="rgb",
               compression="deflate", **layout)  # fmt: skip
    centres_px = np.random.default_rng(0).uniform((-20, -20), (1320, 2620), (900, 2))
    summary = written(tmp_path / "patches", path, centres_px)
    assert summary["n_blocks"] > 1
    with open_slide(path) as slide:
        blocks, plan = plan_blocks(slide, centres_px, SPEC, shard_order(len(centres_px)))
    assert sum(len(b.rows) for b in blocks) == summary["n_cut"]
    # What was decoded is what was planned, so nothing was decoded twice within a block.
    assert summary["redecoded_share"] == round(plan.n_decoded / plan.n_tiles - 1, 4) <= 0.15


def test_a_patch_does_not_depend_on_what_else_is_cut(
    damaged: Path, centres_px: Any, tmp_path: Path
) -> None:
    spec = SPEC.model_copy(update={"fov_um": 18.0})  # 1.125 pixels of the slide a pixel
    made = []
    for some in (slice(60), slice(0, 60, 7)):
        folder = tmp_path / str(some.step)
        (folder / "out").mkdir(parents=True)
        (folder / "kept").mkdir()
        open_image = partial(open_slide, damaged)
        few_px = centres_px[some]
        order = shard_order(len(few_px))
        write_patches(folder / "out", folder / "kept", open_image, few_px, order, spec, map)
        table, jpegs = read_all(folder / "out")
        made.append({(r.x_px, r.y_px): j for r, j in zip(table.itertuples(), jpegs, strict=True)})
    many, few = made
    assert len(few) >= 8
    assert few.items() <= many.items()
