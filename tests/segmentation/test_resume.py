"""A stopped segmentation goes on with the blocks that are missing, and mixes no kinds of device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pairing.simulate.tile import labelled_tile
from segmentation.blocks import Block
from segmentation.config import NUCLEI_FILE, SegmentationConfig
from segmentation.segment import BlockFacts, SegmentedBlock, write_nuclei
from shards.errors import BadInput

CONFIG = SegmentationConfig(block_px=192)
Work = Callable[[Block], SegmentedBlock]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume") / "he.png"
    Image.fromarray(labelled_tile(900_020, 700, 0.5)[0]).save(path)
    return path


def write(folder: Path, picture: Path, map_blocks: Any = map) -> bytes:
    """Segment into `folder/out`, going on from `folder/blocks`; returns the table's bytes."""
    for name in ("out", "blocks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_nuclei(
        folder / "out",
        folder / "blocks",
        picture,
        CONFIG,
        mpp=0.5,
        device="cpu",
        map_blocks=map_blocks,
    )
    return (folder / "out" / NUCLEI_FILE).read_bytes()


class Watched:
    """A map that notes which blocks it was given, and stops after `n`."""

    def __init__(self, n: int | None = None) -> None:
        self.n = n
        self.given: list[int] = []

    def __call__(self, fn: Work, items: Collection[Block]) -> Iterator[SegmentedBlock]:
        for number, block in enumerate(items):
            if number == self.n:
                raise KeyboardInterrupt
            self.given.append(block.index)
            yield fn(block)


def test_it_goes_on_with_what_is_missing(picture: Path, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", picture)
    stopped, went_on = Watched(5), Watched()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "parts", picture, stopped)
    assert not (tmp_path / "parts" / "out" / NUCLEI_FILE).exists()
    assert write(tmp_path / "parts", picture, went_on) == whole
    assert stopped.given == [0, 1, 2, 3, 4]
    assert sorted(stopped.given + went_on.given) == list(range(16))


def test_blocks_of_another_kind_of_device_are_made_again(picture: Path, tmp_path: Path) -> None:
    whole = write(tmp_path, picture)
    for number in (3, 7, 11):
        path = tmp_path / "blocks" / f"block-{number:06d}.parquet"
        table = pq.read_table(path)
        facts = BlockFacts(device="cuda bfloat16", damage=()).model_dump_json()
        # Of another kind, and with other nuclei: none.
        pq.write_table(table[:0].replace_schema_metadata({"cellpair.block": facts}), path)
    (tmp_path / "blocks" / "block-000000.parquet").unlink()
    watched = Watched()
    assert write(tmp_path, picture, watched) == whole
    assert watched.given == [0, 3, 7, 11]


def test_workers_of_two_kinds_are_refused(picture: Path, tmp_path: Path) -> None:
    def mixed(fn: Work, items: Collection[Block]) -> Iterator[SegmentedBlock]:
        for block in items:
            part = fn(block)
            device = "cuda bfloat16" if block.index % 2 else part.facts.device
            yield SegmentedBlock(
                part.index, part.table, part.facts.model_copy(update={"device": device})
            )

    with pytest.raises(BadInput, match=r"one kind of device[\s\S]*cpu float32, cuda bfloat16"):
        write(tmp_path, picture, mixed)
