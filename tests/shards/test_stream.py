"""The stream: what a dataset holds, composed and mixed; what shows when it is opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.dataset import dataset_path, publish_dataset, read_dataset
from shards.errors import BadInput
from shards.order import Shuffled
from shards.schema import Dataset, Split
from shards.stream import Stream, read_stream
from tests.shards.tiny import tiny_panel, tiny_samples, write_tiny_dataset

DONORS: dict[str, Split] = {"D1": "train", "D2": "train", "D3": "test"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("dataset"), DONORS, n_per_donor=50)


@pytest.fixture(scope="module")
def train(dataset: Path) -> Stream:
    return read_stream([dataset], "train")


def test_reads_what_was_written(train: Stream) -> None:
    panel = tiny_panel()
    written = tiny_samples("run0", "D1", 50, panel, 0) + tiny_samples("run1", "D2", 50, panel, 1)
    assert len(train) == 100
    assert train.panels == (panel,)
    order = Shuffled(len(train), 0, train.fingerprint).batch(range(100))
    for index, pair in zip(order, train.read(order), strict=True):
        assert pair.jpeg == written[index].image_jpeg
        assert pair.counts is not None
        assert pair.neighbors is not None
        np.testing.assert_array_equal(pair.counts, written[index].counts)
        np.testing.assert_array_equal(pair.neighbors, written[index].neighbors)
        assert pair.panel == 0
    assert train.table(["cell_id"])["cell_id"].to_pylist() == [s.cell_id for s in written]


def test_splits_are_disjoint_and_an_empty_one_is_empty(dataset: Path, train: Stream) -> None:
    test = read_stream([dataset], "test")
    assert set(test.table(["donor"])["donor"].to_pylist()) == {"D3"}
    assert set(train.table(["donor"])["donor"].to_pylist()) == {"D1", "D2"}
    assert len(read_stream([dataset], "val")) == 0
    assert test.fingerprint != train.fingerprint


@settings(max_examples=20)
@given(places=st.lists(st.integers(0, 99), min_size=1, max_size=20))
def test_any_samples_in_any_order(train: Stream, places: list[int]) -> None:
    alone = [train.read(p)[0].jpeg for p in places]
    assert [pair.jpeg for pair in train.read(places)] == alone


def test_a_damaged_sample_is_named(tmp_path: Path) -> None:
    root = write_tiny_dataset(tmp_path, {"D1": "train"}, n_per_donor=10)
    stream = read_stream([root], "train")
    image = stream.read(7)[0].jpeg
    tar = stream.shards[0].tar
    content = bytearray(tar.read_bytes())
    content[content.index(image) + 100] ^= 1
    tar.write_bytes(content)
    stream = read_stream([root], "train")
    stream.read([0, 1, 2, 3, 4, 5, 6, 8, 9])
    with pytest.raises(BadInput, match=r"run0__run000007-1[\s\S]*crc32"):
        stream.read(7)


def test_damage_that_shows_at_open(tmp_path: Path) -> None:
    root = write_tiny_dataset(tmp_path, {"D1": "train"}, n_per_donor=10)
    tar = read_stream([root], "train").shards[0].tar
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    with pytest.raises(BadInput, match=f"{len(whole)} bytes"):
        read_stream([root], "train")
    tar.unlink()
    with pytest.raises(BadInput, match="no such file"):
        read_stream([root], "train")
    tar.write_bytes(whole)
    tar.with_suffix(".parquet").rename(tar.with_suffix(".elsewhere"))
    with pytest.raises(BadInput, match="index table"):
        read_stream([root], "train")
    manifest = tar.parent / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tissue": "test"', '"tissue": "other"'))
    with pytest.raises(BadInput, match="the manifest that the dataset names"):
        read_stream([root], "train")


def test_datasets_compose_unless_they_share_a_run_or_a_donor_leaks(tmp_path: Path) -> None:
    root = write_tiny_dataset(tmp_path, {"D1": "train", "D2": "train"}, n_per_donor=10)
    both, _ = read_dataset(root)

    def part(run: int, donors: dict[str, Split]) -> Path:
        shards: dict[Split, tuple[str, ...]] = {
            "train": tuple(s for s in both.shards["train"] if f"/run{run}/" in s)
        }
        part = Dataset.of(f"part{run}", [both.runs[run]], both.panels, donors, shards)
        publish_dataset(root, part)
        return root / dataset_path(part.fingerprint)

    first, second = part(0, {"D1": "train"}), part(1, {"D2": "train"})
    composed = read_stream([first, second], "train")
    assert composed.table(["donor"])["donor"].to_pylist() == ["D1"] * 10 + ["D2"] * 10
    with pytest.raises(BadInput, match="run0 in more than one"):
        read_stream([first, first], "train")
    with pytest.raises(BadInput, match="test here, train in another"):
        read_stream([first, part(1, {"D1": "test", "D2": "train"})], "train")


def test_images_decode(train: Stream) -> None:
    assert simplejpeg.decode_jpeg(train.read(3)[0].jpeg, colorspace="RGB").shape == (32, 32, 3)
