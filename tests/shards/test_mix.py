"""Caps and weights: an exact, fair, repeatable subset, and exact multiplicities."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.dataset import dataset_path, publish_dataset, read_dataset
from shards.errors import BadInput
from shards.index import Shard
from shards.mix import Mix, Parts, mixed
from shards.order import Indices
from shards.schema import Dataset, Manifest, ShardInfo, Totals
from shards.stream import Stream, read_stream
from tests.shards.tiny import PATCH, write_tiny_dataset


def shard(run: str, donor: str, tissue: str | None, n: int) -> Shard:
    info = ShardInfo(
        name=f"{run}-{donor}", donor=donor, n_samples=n, tar_bytes=1, tar_sha256="", table_sha256=""
    )
    manifest = Manifest(
        run=run,
        source_id=None,
        tissue=tissue,
        species="human",
        panel_id="p",
        patch=PATCH,
        totals=Totals(seen=n, kept=n, dropped={}),
        shards=(info,),
    )
    return Shard(Path(f"{run}-{donor}.tar"), manifest, info, 0)


SHARDS = st.lists(
    st.tuples(
        st.sampled_from(["r0", "r1", "r2"]), st.sampled_from(["d0", "d1"]), st.integers(1, 60)
    ),
    min_size=1,
    max_size=12,
).map(lambda given: [shard(run, donor, f"t{run}", n) for run, donor, n in given])


@given(shards=SHARDS, cap=st.integers(1, 100))
def test_a_cap_is_exact_and_in_proportion(shards: list[Shard], cap: int) -> None:
    n_kept, copies = mixed(shards, {}, Mix(cap={"run": cap}))
    assert set(copies) == {1}
    for run in {s.manifest.run for s in shards}:
        members = [i for i, s in enumerate(shards) if s.manifest.run == run]
        total = sum(shards[i].n_samples for i in members)
        assert sum(n_kept[i] for i in members) == min(cap, total)
        for i in members:
            assert abs(n_kept[i] - shards[i].n_samples * min(1, cap / total)) < 1


@given(shards=SHARDS, caps=st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60)))
def test_caps_go_by_run_then_donor_then_tissue(
    shards: list[Shard], caps: tuple[int, int, int]
) -> None:
    by_kind = dict(zip(("run", "donor", "tissue"), caps, strict=True))
    n_kept, _ = mixed(shards, {}, Mix(cap=by_kind))
    assert (n_kept, _) == mixed(shards, {}, Mix(cap=dict(reversed(by_kind.items()))))
    step = shards
    for kind, cap in by_kind.items():
        left, _ = mixed(step, {}, Mix(cap={kind: cap}))
        step = [
            shard(s.manifest.run, s.info.donor, s.manifest.tissue, n)
            for s, n in zip(step, left, strict=True)
            if n
        ]
    assert [n for n in n_kept if n] == [s.n_samples for s in step]


def test_ties_go_to_the_earlier_shard_and_aliases_are_one_donor() -> None:
    shards = [shard(f"r{i}", f"d{i}", "t", 10) for i in range(4)]
    assert mixed(shards, {}, Mix(cap={"tissue": 6}))[0] == [2, 2, 1, 1]
    assert mixed(shards, {"d1": "d0"}, Mix(cap={"donor": 10}))[0] == [5, 5, 10, 10]
    assert mixed(shards, {"d1": "d0"}, Mix(weight={"donor": {"d0": 3}}))[1] == [3, 3, 1, 1]
    with pytest.raises(BadInput, match="one of d0, d2, d3"):
        mixed(shards, {"d1": "d0"}, Mix(weight={"donor": {"d1": 3}}))


def test_weights_multiply_and_what_is_left_out_takes_no_room_under_a_cap() -> None:
    shards = [shard("r0", "d", "t0", 10), shard("r1", "d", "t1", 10)]
    weight = {"run": {"r0": 2}, "tissue": {"t0": 3, "t1": 5}, "donor": {"d": 1}}
    assert mixed(shards, {}, Mix(weight=weight)) == ([10, 10], [6, 5])
    assert mixed(shards, {}, Mix(weight={"run": {"r0": 0}}, cap={"donor": 7}))[0] == [0, 7]


def test_a_run_without_a_tissue_cannot_be_capped_by_it() -> None:
    shards = [shard("r0", "d", None, 10), shard("r1", "d", "t1", 10)]
    with pytest.raises(BadInput, match="run r0 without one"):
        mixed(shards, {}, Mix(cap={"tissue": 5}))
    assert mixed(shards, {}, Mix(weight={"tissue": {"t1": 0}}))[1] == [1, 0]
    with pytest.raises(BadInput, match="one of t1"):
        mixed(shards, {}, Mix(weight={"tissue": {"t2": 1}}))


@settings(max_examples=50)
@given(parts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=8))
def test_an_index_names_a_row_and_all_copies_of_it(parts: list[tuple[int, int]]) -> None:
    n, copies = zip(*parts, strict=True)
    of = Parts.of(n, copies)
    assert len(of) == sum(a * b for a, b in parts)
    everything = np.arange(len(of))
    shards, rows = of.locate(everything)
    found = Counter(zip(shards.tolist(), rows.tolist(), strict=True))
    assert found == {
        (s, row): times for s, (a, times) in enumerate(parts) for row in range(a) if times
    }
    first = of.sample_of(everything)
    assert len(set(first.tolist())) == len(found)
    for same, index in zip(of.locate(first), (shards, rows), strict=True):
        assert np.array_equal(same, index)
    for outside in (-1, len(of)):
        with pytest.raises(IndexError):
            of.locate(np.array([outside]))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    return write_tiny_dataset(root, {"D1": "train", "D2": "train", "D3": "train"}, n_per_donor=30)


def epoch(stream: Stream, **how: object) -> Indices:
    order = stream.order(5, pieces=3, piece_samples=7, **how)  # type: ignore[arg-type]
    return order.batch(range(order.n))


@pytest.mark.parametrize("reading", ["global", "block"])
@pytest.mark.parametrize("balanced", [False, True])
def test_an_epoch_holds_each_sample_as_often_as_it_weighs(
    dataset: Path, reading: str, balanced: bool
) -> None:
    mix = Mix(cap={"run": 25}, weight={"run": {"run0": 3, "run2": 0}})
    stream = read_stream([dataset], "train", mix)
    assert len(stream) == 3 * 25 + 25
    assert stream.runs == ("run0", "run1")
    found = epoch(stream, reading=reading, balanced=balanced)
    keys = Counter(stream.keys(found))
    assert Counter(keys.values()) == {3: 25, 1: 25}
    assert {key.split("__")[0] for key, times in keys.items() if times == 3} == {"run0"}
    by_sample = dict(zip(stream.sample_of(found).tolist(), stream.keys(found), strict=True))
    assert len(by_sample) == len(set(by_sample.values())) == 50
    runs = [stream.runs[r] for r in stream.run_of(found)]
    assert runs == [key.split("__")[0] for key in stream.keys(found)]
    assert stream.table(["key"])["key"].to_pylist() == stream.keys(range(len(stream)))
    # Read through its copies too, a sample is the same.
    with stream.reader(reading, piece_samples=7, cache_bytes=1 << 20) as reader:  # type: ignore[arg-type]
        images = {place: bytes(pair.jpeg) for place, pair in reader.each(found)}  # type: ignore[union-attr]
    assert len(set(images.values())) == 50


def test_a_mix_is_part_of_what_a_stream_is(dataset: Path) -> None:
    prints = {
        read_stream([dataset], "train", mix).fingerprint
        for mix in (Mix(), Mix(cap={"run": 9}), Mix(weight={"run": {"run0": 2}}))
    }
    assert len(prints) == 3
    capped = [read_stream([dataset], "train", Mix(cap={"donor": 9})) for _ in range(2)]
    assert capped[0].keys(range(27)) == capped[1].keys(range(27))
    with pytest.raises(BadInput, match=r"weight.run[\s\S]*one of run0, run1, run2[\s\S]*'run7'"):
        read_stream([dataset], "train", Mix(weight={"run": {"run7": 1}}))
    nothing = read_stream([dataset], "train", Mix(weight={"tissue": {"test": 0}}))
    assert len(nothing) == 0
    assert nothing.table(["key"]).num_rows == 0


def test_a_run_that_is_left_out_may_be_gone(dataset: Path) -> None:
    stream = read_stream([dataset], "train")
    tar = next(s.tar for s in stream.shards if s.manifest.run == "run1")
    elsewhere = tar.rename(tar.with_suffix(".elsewhere"))
    try:
        with pytest.raises(BadInput, match="no such file"):
            read_stream([dataset], "train")
        assert len(read_stream([dataset], "train", Mix(weight={"run": {"run1": 0}}))) == 60
    finally:
        elsewhere.rename(tar)


def test_donors_of_a_dataset_go_by_their_canonical_names(dataset: Path) -> None:
    whole, root = read_dataset(dataset)
    named = Dataset.of("named", whole.runs, whole.panels, whole.donors, whole.shards, {"D2": "D1"})
    publish_dataset(root, named)
    stream = read_stream([root / dataset_path(named.fingerprint)], "train", Mix(cap={"donor": 10}))
    runs = Counter(stream.runs[r] for r in stream.run_of(range(len(stream))))
    assert runs == {"run0": 5, "run1": 5, "run2": 10}
    publish_dataset(root, whole)
