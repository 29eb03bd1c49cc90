"""The same nuclei, to the byte, whatever the blocks, their order, the workers and interruptions."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import shapely

from flows.cluster import BlockMap, Runtime
from segmentation.maps import InTurn
from shards.artifact import Items
from tests.segmentation.slides import (
    mosaic_of_real_tiles,
    on_seams,
    run,
    run_windows_alone,
    simulated_picture,
)

WHOLE_PX = 1 << 14
# Halos are most of the work of small blocks: all sizes but one are of the slow tests.
BLOCK_PX = (
    pytest.param(256, marks=pytest.mark.slow),
    pytest.param(500, marks=pytest.mark.slow),
    1024,
    pytest.param(2048, marks=pytest.mark.slow),
)

Whole = tuple[Path, pa.Table, bytes]


class Backwards(InTurn):
    """What is handed out is done from the last to the first."""

    def __call__(self, fn: Callable[[Any], Any], items: Items[Any], /) -> Iterable[Any]:
        return [fn(item) for item in reversed(list(items))]

    on_gpu = __call__


def whole(folder: Path, slide: Path) -> Whole:
    """A run on one block: the folder of its windows, table and bytes."""
    windows = run_windows_alone(folder / "windows", slide)
    done, table, data = run(folder / "whole", slide, windows_of=windows, block_px=WHOLE_PX)
    assert len(done.blocks) == 1
    return windows, table, data


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated_picture(tmp_path_factory.mktemp("bild mit ä") / "he.png", 900_030, 1300)


@pytest.fixture(scope="module")
def whole_picture(tmp_path_factory: pytest.TempPathFactory, picture: Path) -> Whole:
    return whole(tmp_path_factory.mktemp("whole"), picture)


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    path = tmp_path_factory.mktemp("mosaic") / "real.png"
    return mosaic_of_real_tiles(path, shared_data / "nuclei")


@pytest.fixture(scope="module")
def whole_mosaic(tmp_path_factory: pytest.TempPathFactory, mosaic: Path) -> Whole:
    return whole(tmp_path_factory.mktemp("whole"), mosaic)


def boxes_px(table: pa.Table) -> list[tuple[int, int, int, int]]:
    """Boxes around nuclei in pixels of the network, which are the pictures' own here."""
    bounds = shapely.bounds(shapely.from_wkb(table["polygon_px"].to_pylist()))
    return [(int(x0), int(y0), int(-(-x1 // 1)), int(-(-y1 // 1))) for x0, y0, x1, y1 in bounds]


@pytest.mark.parametrize("block_px", BLOCK_PX)
def test_blocks_of_a_simulated_slide_make_no_difference(
    picture: Path, whole_picture: Whole, tmp_path: Path, block_px: int
) -> None:
    folder, table, data = whole_picture
    done, parts, bytes_of_parts = run(tmp_path, picture, windows_of=folder, block_px=block_px)
    assert parts.equals(table)
    assert bytes_of_parts == data
    assert len(done.blocks) == (-(-1300 // block_px)) ** 2


@pytest.mark.slow
@pytest.mark.parametrize("block_px", BLOCK_PX)
def test_blocks_of_a_mosaic_of_real_tiles_make_no_difference(
    mosaic: Path, whole_mosaic: Whole, tmp_path: Path, block_px: int
) -> None:
    folder, table, data = whole_mosaic
    _, parts, bytes_of_parts = run(tmp_path, mosaic, windows_of=folder, block_px=block_px)
    assert parts.equals(table)
    assert bytes_of_parts == data


def test_five_hundred_nuclei_lie_on_seams(whole_picture: Whole, whole_mosaic: Whole) -> None:
    n_on_seams = sum(
        on_seams(boxes_px(table), block_px)
        for _, table, _ in (whole_picture, whole_mosaic)
        for block_px in (256, 500)
    )
    assert n_on_seams >= 500


def test_the_order_of_windows_and_blocks_makes_no_difference(
    picture: Path, whole_picture: Whole, tmp_path: Path
) -> None:
    _, table, data = whole_picture
    _, parts, bytes_of_parts = run(tmp_path / "back", picture, maps=Backwards(), block_px=500)
    assert parts.equals(table)
    assert bytes_of_parts == data


@pytest.mark.slow
def test_two_workers_one_of_them_lost_make_no_difference(
    picture: Path, whole_picture: Whole, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    lost = []

    def lose_one() -> None:
        while not list(kept.glob("block-*.parquet")):
            time.sleep(0.01)
        workers = psutil.Process().children(recursive=True)
        lost.append(next(w for w in workers if "spawn_main" in " ".join(w.cmdline())))
        lost[0].kill()

    killer = threading.Thread(target=lose_one)
    killer.start()
    with BlockMap(Runtime(workers=2, device="cpu")) as maps:
        _, _, data = run(tmp_path, picture, maps=maps, block_px=325)
    killer.join()
    assert len(lost) == 1
    assert data == whole_picture[2]


_SEGMENT = """
import sys
from pathlib import Path
from tests.segmentation.slides import run
run(Path(sys.argv[1]), Path(sys.argv[2]), block_px=325)
"""


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_nuclei(
    picture: Path, whole_picture: Whole, tmp_path: Path
) -> None:
    _, _, data = whole_picture
    kept = tmp_path / "kept"
    kept.mkdir()
    # By the work that is done, not by the clock: among windows, between both, and among blocks.
    for pattern, n_wanted in (
        ("windows-*.json", 1),
        ("block-*.parquet", 2),
        ("block-*.parquet", 9),
    ):
        process = subprocess.Popen([sys.executable, "-c", _SEGMENT, str(tmp_path), str(picture)])
        while len(list(kept.glob(pattern))) < n_wanted:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        process.kill()
        process.wait()
        assert not (tmp_path / "nuclei.parquet").exists()
    there = {path: path.stat().st_mtime_ns for path in kept.glob("*-*.*") if path.suffix != ".npy"}
    _, _, after = run(tmp_path, picture, block_px=325)
    assert after == data
    # What was published is not made again.
    assert len(there) > 9
    assert all(path.stat().st_mtime_ns == at for path, at in there.items())
    # No window outlives the blocks that waited for it.
    assert not list(kept.glob("windows-*.npy"))
