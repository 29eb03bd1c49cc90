"""Batches: the union of panels, what reaches the device, reading ahead."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch

from shards.errors import BadInput
from shards.schema import Gene, Panel
from shards.stream import Order, read_stream
from tests.shards.tiny import tiny_panel, tiny_samples, write_tiny_dataset
from trainer.data import Loader, Vocabulary, dense_counts, expression


def _panel(species: str, *genes: tuple[str, str | None]) -> Panel:
    return Panel.of(species, [Gene(symbol=s, ensembl=e) for s, e in genes])


def test_union_of_panels_knows_a_gene_by_ensembl_then_by_symbol() -> None:
    first = _panel("human", ("A", "E1"), ("B", "E2"), ("C", None))
    second = _panel("human", ("A-renamed", "E1"), ("B", None), ("C", "E3"), ("B", "E9"))
    third = _panel("mouse", ("A", None))
    union = Vocabulary.union([first, second, third])
    assert [(g.species, g.symbol, g.ensembl) for g in union.genes] == [
        ("human", "A", "E1"),
        ("human", "B", "E2"),
        ("human", "C", None),
        ("human", "B", "E9"),
        ("mouse", "A", None),
    ]
    index, unknown = Vocabulary.union([first]).places(second)
    assert index.tolist() == [0, 1, 2, -1]
    assert unknown == ["B"]


def test_batches_hold_the_samples_in_order(tiny_dataset: Path) -> None:
    stream = read_stream([tiny_dataset], "train")
    vocabulary = Vocabulary.union(stream.panels)
    written = tiny_samples("run0", "D1", 70, tiny_panel(), 0)
    batch = Loader(stream, vocabulary).read(np.array([3, 0, 11]))
    counts_BG = dense_counts(batch, 40).numpy()
    for row, i in enumerate([3, 0, 11]):
        want = np.zeros(40)
        counts = written[i].counts
        assert counts is not None
        want[counts[0]] = counts[1]
        np.testing.assert_array_equal(counts_BG[row], want)
        image = simplejpeg.decode_jpeg(written[i].image_jpeg, colorspace="RGB")
        np.testing.assert_array_equal(batch.image_BHWC[row].numpy(), image)


def test_expression_is_log1p_per_ten_thousand() -> None:
    found = expression(torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0]]))
    want = torch.log1p(torch.tensor([[2500.0, 7500.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(found, want)


def test_a_gene_off_the_vocabulary_is_left_out_and_one_off_the_panel_is_unmeasured(
    tiny_dataset: Path,
) -> None:
    stream = read_stream([tiny_dataset], "train")
    known = [Gene(symbol="NEW", ensembl=None), *tiny_panel().genes[10:]]
    vocabulary = Vocabulary.union([Panel.of("human", known)])
    loader = Loader(stream, vocabulary)
    assert loader.measured_PG.tolist() == [[False] + [True] * 30]
    full = dense_counts(Loader(stream, Vocabulary.union(stream.panels)).read(np.arange(5)), 40)
    torch.testing.assert_close(dense_counts(loader.read(np.arange(5)), 31)[:, 1:], full[:, 10:])


def test_a_vocabulary_that_shares_nothing_is_refused(tiny_dataset: Path) -> None:
    stream = read_stream([tiny_dataset], "train")
    mouse = Vocabulary.union([_panel("mouse", ("Actb", None))])
    with pytest.raises(BadInput, match="genes that the model knows"):
        Loader(stream, mouse)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    root = write_tiny_dataset(tmp_path, {"D1": "train"}, n_per_donor=5)
    stream = read_stream([root], "val")
    with pytest.raises(BadInput, match="no samples"):
        Loader(stream, Vocabulary.union(stream.panels))


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_ahead_keeps_the_order_from_any_cursor(tiny_dataset: Path, threads: int) -> None:
    stream = read_stream([tiny_dataset], "train")
    loader = Loader(stream, Vocabulary.union(stream.panels))
    order = Order(len(stream), 5, stream.fingerprint)

    def indices(cursor: int, n: int) -> list[list[int]]:
        batches = loader.training(order, cursor, 48, threads)
        return [b.index_B.tolist() for b in itertools.islice(batches, n)]

    straight = indices(0, 6)
    assert [len(b) for b in straight] == [48, 48, 44, 48, 48, 44]
    assert sorted(itertools.chain(*straight[:3])) == list(range(140))
    assert indices(96, 4) == straight[2:]


def test_a_patch_that_is_no_jpeg_is_named(tmp_path: Path) -> None:
    root = write_tiny_dataset(tmp_path, {"D1": "train"}, n_per_donor=5)
    stream = read_stream([root], "train")
    loader = Loader(stream, Vocabulary.union(stream.panels))
    tar = stream.shards[0].tar
    image = stream.read(2)[0].jpeg
    tar.write_bytes(tar.read_bytes().replace(image, image[:200] + bytes(len(image) - 200)))
    with pytest.raises(BadInput, match="run0__run000002-1"):
        list(loader.once(5))
