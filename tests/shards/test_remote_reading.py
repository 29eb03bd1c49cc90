"""Datasets behind a URL: read, checked and told as those in a folder are."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

from shards import remote as remote_module
from shards.check import describe, validate
from shards.errors import BadInput, BadSetting
from shards.remote import RemotePath, remote_path
from shards.schema import Split
from shards.stream import Reading, Stream, read_stream
from tests.s3 import Line
from tests.shards.tiny import write_tiny_dataset

DONORS: dict[str, Split] = {"D1": "train", "D2": "train", "D3": "test"}
PIECE_SAMPLES = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("dataset"), DONORS, n_per_donor=30)


@pytest.fixture
def there(folder: Path, bucket: str, s3: Line) -> RemotePath:
    """The same dataset behind a URL."""
    remote = remote_path(bucket)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        (remote / path.relative_to(folder).as_posix()).upload(path)
    return remote


def batches(stream: Stream, reading: Reading, cursor: int = 0) -> list[bytes]:
    """Images and counts of an epoch in its order from a cursor on, batch by batch."""
    order = stream.order(3, reading=reading, balanced=True, pieces=4, piece_samples=PIECE_SAMPLES)
    found = []
    with stream.reader(reading, piece_samples=PIECE_SAMPLES, cache_bytes=10**7) as reader:
        for start in range(cursor, order.n, 16):
            rows = order.batch(range(start, min(start + 16, order.n)))
            reader.expect(rows)
            samples = {}
            for place, pair in reader.each(rows):
                assert not isinstance(pair, BadInput), pair
                assert pair.counts is not None
                samples[place] = bytes(pair.jpeg) + pair.counts.tobytes()
            found.append(b"".join(samples[place] for place in range(len(rows))))
    return found


@pytest.mark.parametrize("reading", ["global", "block"])
def test_training_reads_the_same_samples_in_the_same_order(
    folder: Path, there: RemotePath, reading: Reading
) -> None:
    here, far = read_stream([folder], "train"), read_stream([there], "train")
    assert far.fingerprint == here.fingerprint
    local = batches(here, reading)
    assert batches(far, reading) == local
    # A run that goes on, in another process, reads the rest and nothing else.
    assert batches(pickle.loads(pickle.dumps(far)), reading, cursor=32) == local[2:]
    assert far.table(["key", "donor"]).equals(here.table(["key", "donor"]))
    assert far.keys([5, 40]) == here.keys([5, 40])


def test_block_reading_asks_for_pieces_and_not_for_samples(there: RemotePath, s3: Line) -> None:
    stream = read_stream([there], "train")
    stream.build_index()
    s3.clear()
    batches(stream, "block")
    n_pieces = sum(-(-shard.n_samples // PIECE_SAMPLES) for shard in stream.shards)
    tars = [path for method, path in s3.requests if method == "GET" and path.endswith(".tar")]
    assert len(tars) == n_pieces


def test_a_moment_without_a_network_only_takes_time(
    there: RemotePath, s3: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "PAUSES_S", (0.5, 1.0))
    stream = read_stream([there], "train")
    whole = batches(stream, "block")
    timers: list[threading.Timer] = []

    def cut_once(method: str, path: str) -> bool:
        if timers or not path.endswith(".tar"):
            return False
        timers.append(threading.Timer(0.3, s3.mend))
        timers[0].start()
        return True

    s3.cut_at = cut_once
    assert batches(stream, "block") == whole
    timers[0].join()


@pytest.mark.slow
def test_a_store_that_stays_away_is_named(
    there: RemotePath, s3: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "PAUSES_S", (0.1,))
    stream = read_stream([there], "train")
    stream.build_index()
    s3.cut()
    with pytest.raises(ConnectionError, match=f"{there}.*does not answer"):
        batches(stream, "block")


def test_tars_that_do_not_fit_into_the_cache_are_read_by_blocks_alone(
    there: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELLPAIR_CACHE_BYTES", "1000")
    stream = read_stream([there], "train")
    with pytest.raises(BadSetting, match="set it to block"):
        stream.reader("global")
    assert batches(stream, "block")


def test_a_truncated_shard_is_told_at_open_and_by_check(there: RemotePath) -> None:
    tar = read_stream([there], "train").shards[0].tar
    whole = tar.read_bytes()
    assert isinstance(tar, RemotePath)
    tar.write_bytes(whole[:-512])
    with pytest.raises(BadInput, match=rf"{tar}[\s\S]*{len(whole)} bytes"):
        read_stream([there], "train")
    faults = validate(there)
    assert any(f"{len(whole) - 512} bytes, the manifest says {len(whole)}" in f for f in faults)


def test_a_swapped_shard_is_told_whoever_reads_it(
    there: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELLPAIR_CACHE", str(tmp_path / "cache"))  # no copy of the right one
    stream = read_stream([there], "train")
    first, second = (shard.tar for shard in stream.shards[:2])
    assert isinstance(first, RemotePath)
    other = second.read_bytes()
    n_bytes = stream.shards[0].info.tar_bytes
    first.write_bytes((other * 2)[:n_bytes])
    stream = read_stream([there], "train")
    with stream.reader("global") as reader:
        (_, fault), *_ = reader.each([0])
    assert isinstance(fault, BadInput)
    assert "sha256" in fault.expected
    with stream.reader("block", piece_samples=4) as reader:
        faults = [pair for _, pair in reader.each(np.arange(4))]
    assert all(isinstance(fault, BadInput) and str(first) in fault.where for fault in faults)
    assert any("sha256" in fault for fault in validate(there))


def test_info_and_check_tell_the_same_as_of_a_folder(folder: Path, there: RemotePath) -> None:
    assert describe(there) == describe(folder)
    assert validate(there) == []
    assert validate(there / "dataset.json") == []
    with pytest.raises(BadInput):
        validate(there / "nothing-here")
