"""Readers: each sample once whatever reads it, pieces in bounded memory, faults as values."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shards.blocks import BlockReader
from shards.dataset import dataset_path, publish_dataset, read_dataset
from shards.errors import BadInput, BadSetting
from shards.order import Order, batch_at, cut, share_of
from shards.reader import Pair, Reader
from shards.schema import Dataset, Split
from shards.stream import Reading, Stream, read_stream
from tests.shards.tiny import write_tiny_dataset

DONORS: dict[str, Split] = {"D1": "train", "D2": "train", "D3": "train", "D4": "train"}
READINGS: tuple[Reading, ...] = ("global", "block")
PIECE_SAMPLES, PIECES = 6, 5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs, of which all but the first miss shards: 48, 32, 16 and 8 samples."""
    root = tmp_path_factory.mktemp("dataset")
    write_tiny_dataset(root, DONORS, n_per_donor=48, max_samples=8)
    whole, _ = read_dataset(root)
    kept = [
        shard
        for run, n in enumerate((6, 4, 2, 1))
        for shard in [s for s in whole.shards["train"] if f"/run{run}/" in s][:n]
    ]
    uneven = Dataset.of("uneven", whole.runs, whole.panels, DONORS, {"train": tuple(kept)})
    publish_dataset(root, uneven)
    return root / dataset_path(uneven.fingerprint)


@pytest.fixture(scope="module")
def stream(dataset: Path) -> Stream:
    return read_stream([dataset], "train")


@pytest.fixture(scope="module")
def key_of(stream: Stream) -> dict[bytes, str]:
    """Key by image: all images differ."""
    everything = range(len(stream))
    images = (bytes(pair.jpeg) for pair in stream.read(everything))
    return dict(zip(images, stream.keys(everything), strict=True))


@pytest.fixture
def own(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset to damage."""
    root = dataset.parents[1]
    return shutil.copytree(root, tmp_path / "own") / dataset.relative_to(root)


def order_of(stream: Stream, reading: Reading, balanced: bool) -> Order:
    return stream.order(
        7, reading=reading, balanced=balanced, pieces=PIECES, piece_samples=PIECE_SAMPLES
    )


def reader_of(stream: Stream, reading: Reading, cache_bytes: int = 1 << 20) -> Reader:
    return stream.reader(reading, piece_samples=PIECE_SAMPLES, cache_bytes=cache_bytes)


def whole(read: tuple[int, Pair | BadInput]) -> tuple[int, Pair]:
    place, pair = read
    if isinstance(pair, BadInput):
        raise pair
    return place, pair


def keys_read(reader: Reader, key_of: dict[bytes, str], indices: np.ndarray) -> list[str]:
    keys = {}
    for place, pair in map(whole, reader.each(indices)):
        keys[place] = key_of[bytes(pair.jpeg)]
    return [keys[place] for place in range(len(indices))]


def batches(stream: Stream, epochs: int, size: int) -> Iterator[range]:
    cursor = 0
    while cursor < epochs * len(stream):
        yield (batch := batch_at(cursor, len(stream), size))
        cursor = batch.stop


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_any_ranks_read_the_same_batches_and_each_sample_once_an_epoch(
    stream: Stream, key_of: dict[bytes, str], reading: Reading, balanced: bool, world: int
) -> None:
    size = 27
    alone = order_of(stream, reading, balanced)
    # Every rank makes all of it from a few words.
    ranks = [pickle.loads(pickle.dumps(stream)) for _ in range(world)]
    orders = [order_of(rank, reading, balanced) for rank in ranks]
    readers = [reader_of(rank, reading) for rank in ranks]
    seen: Counter[str] = Counter()
    for batch in batches(stream, 2, size):
        rows = []
        for rank, (order, reader) in enumerate(zip(orders, readers, strict=True)):
            share = share_of(range(len(batch)), rank, world)
            rows += keys_read(reader, key_of, order.batch(batch)[share.start : share.stop])
        assert rows == stream.keys(alone.batch(batch))
        seen.update(rows)
    for reader in readers:
        reader.close()
    assert seen == dict.fromkeys(key_of.values(), 2)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("balanced", [False, True])
def test_500_cuts_read_the_same_keys_again(
    stream: Stream, key_of: dict[bytes, str], reading: Reading, balanced: bool
) -> None:
    straight = [
        stream.keys(order_of(stream, reading, balanced).batch(batch))
        for batch in batches(stream, 2, 27)
    ]
    starts = list(batches(stream, 2, 27))
    rng = np.random.default_rng(0)
    with reader_of(stream, reading) as reader:
        for cut in rng.integers(len(starts), size=500).tolist():
            order = order_of(stream, reading, balanced)
            found = order.batch(batch_at(starts[cut].start, len(stream), 27))
            assert keys_read(reader, key_of, found) == straight[cut]


def test_blocks_give_the_same_bytes_as_single_reads(stream: Stream) -> None:
    indices = np.random.default_rng(0).permutation(len(stream))
    with reader_of(stream, "block") as block, reader_of(stream, "global") as single:
        pairs = [dict(map(whole, reader.each(indices))) for reader in (block, single)]
    assert pairs[0].keys() == pairs[1].keys() == set(range(len(stream)))
    for place, one in pairs[0].items():
        other = pairs[1][place]
        assert one.jpeg == other.jpeg
        np.testing.assert_array_equal(one.counts, other.counts)
        np.testing.assert_array_equal(one.neighbors, other.neighbors)
        assert one.panel == other.panel


def largest_piece(stream: Stream) -> int:
    with reader_of(stream, "block") as reader:
        assert isinstance(reader, BlockReader)
        sizes = []
        for index in range(len(stream)):
            before = reader.pieces.n_bytes
            dict(map(whole, reader.each([index])))
            sizes.append(reader.pieces.n_bytes - before)
    return max(sizes)


def n_pieces_of(stream: Stream) -> int:
    return len(cut(stream.parts.n_P, PIECE_SAMPLES)) - 1


@pytest.mark.parametrize("ahead", [0, 1, 4, 20])
@pytest.mark.parametrize("room", [1, 2, 5, 100])
def test_pieces_take_no_more_than_their_room_and_give_the_same(
    stream: Stream, key_of: dict[bytes, str], ahead: int, room: int
) -> None:
    order = order_of(stream, "block", False)
    asked = [order.batch(batch) for batch in batches(stream, 2, 11)]
    limit = room * largest_piece(stream)
    with reader_of(stream, "block", limit) as reader:
        assert isinstance(reader, BlockReader)
        for indices in asked[:ahead]:
            reader.expect(indices)
        for step, indices in enumerate(asked):
            if ahead and step + ahead < len(asked):
                reader.expect(asked[step + ahead])
            for place, pair in map(whole, reader.each(indices)):
                assert reader.pieces.n_bytes <= limit
                assert key_of[bytes(pair.jpeg)] in stream.keys(indices[place])
        n_loaded = reader.pieces.n_loaded
    if room == 100:
        assert n_loaded == n_pieces_of(stream)  # each once, whoever loads it
    assert reader.pieces.n_bytes == 0


def test_with_room_for_two_blocks_each_piece_is_read_once_an_epoch(stream: Stream) -> None:
    order = order_of(stream, "block", False)
    asked = [order.batch(batch) for batch in batches(stream, 3, 11)]
    with reader_of(stream, "block", 2 * PIECES * largest_piece(stream)) as reader:
        assert isinstance(reader, BlockReader)
        for indices in asked:
            reader.expect(indices)
            dict(map(whole, reader.each(indices)))
        assert reader.pieces.n_loaded <= 3 * n_pieces_of(stream)


def test_what_is_expected_is_read_ahead(stream: Stream) -> None:
    with reader_of(stream, "block") as reader:
        assert isinstance(reader, BlockReader)
        reader.expect([0, 1, 40])
        while reader.pieces.n_loaded < 2:  # by the thread, while nobody asks
            time.sleep(0.001)
        dict(map(whole, reader.each([0, 1, 40])))
        assert reader.pieces.n_loaded == 2


def test_a_caller_may_stop_half_way_or_ask_for_something_else(stream: Stream) -> None:
    with reader_of(stream, "block", 2 * largest_piece(stream)) as reader:
        for start in range(0, 60, 10):
            reader.expect(np.arange(start, start + 10))
            half = reader.each(np.arange(60 - start, 70 - start))
            next(half)
            half.close()
        assert len(dict(map(whole, reader.each(np.arange(len(stream)))))) == len(stream)


def test_room_for_less_than_a_piece_names_the_setting(stream: Stream) -> None:
    with reader_of(stream, "block", 1000) as reader:
        reader.expect([3])
        with pytest.raises(BadSetting, match=r"data_loading\.cache_bytes[\s\S]*1000"):
            list(reader.each([3]))


def faults(stream: Stream, reading: Reading) -> dict[int, str]:
    """What every index reads as, where it isn't well; every index is told of once."""
    with reader_of(stream, reading) as reader:
        reader.expect(range(len(stream)))
        found = list(reader.each(range(len(stream))))
    assert sorted(place for place, _ in found) == list(range(len(stream)))
    return {place: str(pair) for place, pair in found if isinstance(pair, BadInput)}


@pytest.mark.parametrize("reading", READINGS)
def test_a_damaged_sample_is_told_in_its_place(own: Path, reading: Reading) -> None:
    stream = read_stream([own], "train")
    pairs = stream.read(range(len(stream)))
    counts = pairs[50].counts
    assert counts is not None
    for index, part in ((5, bytes(pairs[5].jpeg)), (50, counts.tobytes())):
        shard, _ = stream.parts.locate(np.array([index]))
        tar = stream.shards[int(shard[0])].tar
        content = bytearray(tar.read_bytes())
        at = content.index(part) + len(part) // 2
        content[at] ^= 1
        tar.write_bytes(content)
    told = faults(stream, reading)
    assert told.keys() == {5, 50}
    for index, text in told.items():
        assert stream.keys(index)[0] in text
        assert "crc32" in text
    with pytest.raises(BadInput, match=stream.keys(5)[0]):
        stream.read([4, 5, 6])
    assert len(stream.read([4, 6])) == 2


@pytest.mark.parametrize("reading", READINGS)
def test_a_fault_is_told_where_the_table_is_gone_too(own: Path, reading: Reading) -> None:
    stream = read_stream([own], "train")
    stream.build_index()
    shard = stream.shards[0]
    shard.tar.write_bytes(b"\0" * shard.info.tar_bytes)
    shard.table.unlink()
    told = faults(stream, reading)
    assert told.keys() == set(range(8))
    assert f"{shard.tar}, sample number 3" in told[3]


@pytest.mark.parametrize("reading", READINGS)
def test_a_tar_that_goes_or_is_cut_while_running_is_named(own: Path, reading: Reading) -> None:
    stream = read_stream([own], "train")
    gone, cut = stream.shards[1].tar, stream.shards[2].tar
    gone.unlink()
    n_bytes = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[:-512])
    told = faults(stream, reading)
    assert told.keys() == set(range(8, 24))
    assert all(str(gone) in told[i] and "no such file" in told[i] for i in range(8, 16))
    assert all(str(cut) in told[i] and f"{n_bytes - 512} bytes" in told[i] for i in range(16, 24))
    with pytest.raises(BadInput, match=gone.name):
        stream.read(9)
    assert len(stream.read(range(8))) == 8


def test_a_tar_that_is_cut_while_open_is_named_by_its_samples(own: Path) -> None:
    stream = read_stream([own], "train")
    with stream.reader() as reader:
        assert isinstance(next(reader.each([0]))[1], Pair)
        tar = stream.shards[0].tar
        with tar.open("r+b") as file:
            file.truncate(tar.stat().st_size // 2)
        read = dict(reader.each(range(8)))
    bad = [place for place, pair in read.items() if isinstance(pair, BadInput)]
    assert 0 < len(bad) < 8
    assert all(stream.keys(place)[0] in str(read[place]) for place in bad)


@pytest.mark.parametrize("reading", READINGS)
def test_sha256_finds_what_no_sample_shows(own: Path, reading: Reading) -> None:
    tar = read_stream([own], "train").shards[1].tar
    content = bytearray(tar.read_bytes())
    content[-1] ^= 1  # behind the last sample
    tar.write_bytes(content)
    assert faults(read_stream([own], "train"), reading) == {}
    stream = read_stream([own], "train", verify="sha256")
    told = faults(stream, reading)
    assert told.keys() == set(range(8, 16))
    assert all(
        stream.shards[1].info.tar_sha256 in text and str(tar) in text for text in told.values()
    )


def test_few_open_files_are_enough(dataset: Path) -> None:
    script = f"""
import resource
from pathlib import Path
from shards.stream import read_stream
resource.setrlimit(resource.RLIMIT_NOFILE, (16, 24))
stream = read_stream([Path({str(dataset)!r})], "train")
with stream.reader() as reader:
    for indices in (range(len(stream)), range(0, len(stream), 8)):
        assert all(type(pair).__name__ == "Pair" for _, pair in reader.each(indices))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], len(stream.shards))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.split() == ["24", "13"]


def test_reading_imports_nothing_heavy(dataset: Path, tmp_path: Path) -> None:
    # Many processes read, and each pays for its imports in time and memory.
    script = f"""
import sys
from pathlib import Path
from shards.stream import read_stream
stream = read_stream([Path({str(dataset)!r})], "train", index_cache=Path({str(tmp_path)!r}))
stream.read(range(len(stream)))
stream.fault(3, expected="", found="")
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr == ""
    assert not {"torch", "pandas", "scipy", "pyarrow.dataset"} & set(done.stdout.split())
