"""Batches and steps: what is in them, whoever reads them."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

from shards.errors import BadInput
from shards.schema import Gene, Panel
from shards.stream import read_stream
from shards.vocabulary import Vocabulary
from shards.write import Sample
from tests.shards.tiny import tiny_panel, tiny_samples, write_tiny_dataset
from tests.trainer.batches import assert_same, copied
from trainer.batch import dense_counts, dense_neighbors
from trainer.config import PRESETS, DataLoadingConfig
from trainer.data import Loader

CPU = torch.device("cpu")
CONFIG = DataLoadingConfig.model_validate(PRESETS["small"]["data_loading"])


@pytest.fixture
def loader(tiny_dataset: Path) -> Loader:
    stream = read_stream([tiny_dataset], "train")
    return Loader(stream, Vocabulary.union(stream.panels), neighbors_k=1)


def test_batches_hold_the_samples_in_order(loader: Loader) -> None:
    written = tiny_samples("run0", "D1", 70, tiny_panel(), 0)
    batch = loader.read(np.array([3, 0, 11]))
    counts_BG = dense_counts(batch.to(CPU), loader.places, 40).numpy()
    for row, i in enumerate([3, 0, 11]):
        want = np.zeros(40)
        counts = written[i].counts
        assert counts is not None
        want[counts[0]] = counts[1]
        np.testing.assert_array_equal(counts_BG[row], want)
        image = simplejpeg.decode_jpeg(written[i].image_jpeg, colorspace="RGB")
        np.testing.assert_array_equal(batch.image_BHWC[row].numpy(), image)


def test_a_gene_off_the_vocabulary_is_left_out_and_one_off_the_panel_is_unmeasured(
    tiny_dataset: Path,
) -> None:
    stream = read_stream([tiny_dataset], "train")
    known = [Gene(symbol="NEW", ensembl=None), *tiny_panel().genes[10:]]
    vocabulary = Vocabulary.union([Panel.of("human", known)])
    loader = Loader(stream, vocabulary)
    assert loader.measured_PG.tolist() == [[False] + [True] * 30]
    whole = Loader(stream, Vocabulary.union(stream.panels))
    full_BG, known_BG = (
        dense_counts(one.read(np.arange(5)).to(CPU), one.places, len(one.vocabulary.genes))
        for one in (whole, loader)
    )
    torch.testing.assert_close(known_BG[:, 1:], full_BG[:, 10:])


def test_a_vocabulary_that_shares_nothing_is_refused(tiny_dataset: Path) -> None:
    stream = read_stream([tiny_dataset], "train")
    mouse = Vocabulary.union([Panel.of("mouse", [Gene(symbol="Actb", ensembl=None)])])
    with pytest.raises(BadInput, match="genes that the model knows"):
        Loader(stream, mouse)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    root = write_tiny_dataset(tmp_path, {"D1": "train"}, n_per_donor=5)
    stream = read_stream([root], "val")
    with pytest.raises(BadInput, match="no samples"):
        Loader(stream, Vocabulary.union(stream.panels))


def _steps(of: Loader, cursor: int, n: int, rank: int = 0, size: int = 1, **config: Any) -> Any:
    """The first `n` steps, each as its positions and copies of its batches."""
    settings = CONFIG.model_copy(update={"batch_size": 48, "workers": 0} | config)
    order = of.stream.order(5, reading=settings.reading)
    steps = of.training(order, cursor, settings, rank, size)
    with contextlib.closing(steps):
        return [(s.positions, [copied(b) for b in s.chunks]) for s in itertools.islice(steps, n)]


def test_steps_go_on_from_any_cursor(loader: Loader) -> None:
    straight = _steps(loader, 0, 6)
    assert [len(positions) for positions, _ in straight] == [48, 48, 44, 48, 48, 44]
    later = _steps(loader, 96, 4)
    assert [positions for positions, _ in later] == [positions for positions, _ in straight[2:]]
    for (_, found), (_, want) in zip(later, straight[2:], strict=True):
        assert_same(found[0], want[0])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("reading", ["global", "block"])
def test_any_number_of_workers_gives_the_same_batches(
    loader: Loader, workers: int, reading: str
) -> None:
    config = {"micro_batch": 10, "reading": reading}
    want = _steps(loader, 96, 5, **config)
    found = _steps(loader, 96, 5, workers=workers, **config)
    assert [[len(b.index_B) for b in chunks] for _, chunks in found][:2] == [
        [10, 10, 10, 10, 4],
        [10, 10, 10, 10, 8],
    ]
    for (positions, chunks), (of_want, chunks_of_want) in zip(found, want, strict=True):
        assert positions == of_want
        for one, other in zip(chunks, chunks_of_want, strict=True):
            assert_same(one, other)


# A worker of torch's that is told to end may abort on its way out, when all batches are there; its
# parent raises that in a finalizer.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function _MultiProcessingDataLoaderIter.__del__"
    ":pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_plain_loader_gives_the_same_bits(loader: Loader, workers: int) -> None:
    config = {"micro_batch": 20}
    want = _steps(loader, 48, 4, 1, 2, **config)
    found = _steps(loader, 48, 4, 1, 2, workers=workers, loader="torch", **config)
    for (positions, chunks), (of_want, chunks_of_want) in zip(found, want, strict=True):
        assert positions == of_want
        for one, other in zip(chunks, chunks_of_want, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize(("size", "workers"), [(1, 1), (2, 0), (3, 2), (5, 0)])
def test_ranks_take_each_sample_once_an_epoch_in_batches_of_equal_shapes(
    loader: Loader, size: int, workers: int
) -> None:
    config = {"batch_size": 36, "micro_batch": 5, "workers": workers}
    of_rank = [_steps(loader, 0, 4, rank, size, **config) for rank in range(size)]
    shapes = [[[len(b.index_B) for b in chunks] for _, chunks in steps] for steps in of_rank]
    assert shapes == shapes[:1] * size
    seen = [b.index_B[b.weight_B.numpy() > 0] for steps in of_rank for _, c in steps for b in c]
    assert sorted(np.concatenate(seen).tolist()) == list(range(140))
    for steps in of_rank:
        for _, chunks in steps:
            for b in chunks:
                padding = b.index_B < 0
                assert not b.weight_B[torch.from_numpy(padding)].any()
                assert not b.image_BHWC[torch.from_numpy(padding)].any()
                assert not padding[b.row_N.numpy()].any()


def test_neighbors_are_read_where_they_are_asked_for(tiny_dataset: Path) -> None:
    stream = read_stream([tiny_dataset], "train")
    vocabulary = Vocabulary.union(stream.panels)
    assert Loader(stream, vocabulary).read(np.arange(3)).neighbors is None
    loader = Loader(stream, vocabulary, neighbors_k=2)
    batch = loader.read(np.arange(3)).to(CPU)
    found_BKG, present_BK = dense_neighbors(batch, loader.places, len(vocabulary.genes), 2)
    assert present_BK.tolist() == [[True, False]] * 3
    assert found_BKG.nonzero().tolist() == [[b, 0, 3] for b in range(3)]


def test_once_gives_every_sample_once_by_index(loader: Loader) -> None:
    assert [b.index_B.tolist() for b in loader.once(64)] == [
        b.index_B.tolist() for b in loader.once(64, workers=2)
    ]
    assert np.concatenate([b.index_B for b in loader.once(64)]).tolist() == list(range(140))


def _spoilt(samples: list[Sample]) -> list[Sample]:
    off_panel = np.array([[3, 40], [1, 1]], dtype=np.uint16)
    small = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))
    return [
        samples[0],
        replace(samples[1], image_jpeg=samples[1].image_jpeg[:300]),
        replace(samples[2], image_jpeg=small),
        replace(samples[3], counts=None),
        replace(samples[4], counts=off_panel),
        samples[5],
    ]


FAULTS = {
    1: "run0__run000001-1",
    2: "16 × 16 px",
    3: "a sample without them",
    4: "genes of the panel",
    5: "crc32",
}


@pytest.mark.parametrize(
    "config", [{"workers": 0}, {"workers": 2}, {"loader": "torch"}], ids=["own", "workers", "plain"]
)
def test_a_bad_sample_is_a_fault_of_its_row(tmp_path: Path, config: dict[str, Any]) -> None:
    root = write_tiny_dataset(tmp_path, {"D1": "train"}, n_per_donor=6, changed=_spoilt)
    stream = read_stream([root], "train")
    loader = Loader(stream, Vocabulary.union(stream.panels), neighbors_k=1)
    tar = stream.shards[0].tar
    image = bytes(stream.read(5)[0].jpeg)
    tar.write_bytes(tar.read_bytes().replace(image, image[:200] + bytes(len(image) - 200)))
    ((_, chunks),) = _steps(loader, 0, 1, batch_size=6, micro_batch=4, **config)
    faults = {fault.index: fault.message for batch in chunks for fault in batch.faults}
    assert faults.keys() == FAULTS.keys()
    for index, told in FAULTS.items():
        assert told in faults[index]
    for batch in chunks:
        bad = np.isin(batch.index_B, list(FAULTS))
        np.testing.assert_array_equal(batch.weight_B.numpy(), ~bad)
        assert not batch.image_BHWC[torch.from_numpy(bad)].any()
        assert not bad[batch.row_N.numpy()].any()
        assert batch.neighbors is not None
        assert not bad[batch.neighbors.row_M.numpy()].any()
    with pytest.raises(BadInput, match="run0__run000001-1"):
        list(loader.once(5))
