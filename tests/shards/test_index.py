"""The index cache: made from the tables, thrown away and made again, never trusted blindly."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.artifact import sha256_of
from shards.errors import BadInput, BadSetting
from shards.index import Shard, build_index, default_cache, index_file, open_index, span_at
from shards.mix import Parts
from shards.reader import GlobalReader
from shards.schema import Manifest, Totals
from shards.stream import Stream, read_stream
from shards.write import write_shards
from tests.shards.tiny import PATCH, tiny_panel, tiny_samples, write_tiny_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("dataset"), {"D1": "train", "D2": "train"})


@pytest.fixture
def stream(dataset: Path, tmp_path: Path) -> Stream:
    return read_stream([dataset], "train", index_cache=tmp_path / "cache")


def shard_of(folder: Path, run: str, n: int = 5) -> Shard:
    """One shard as the writer writes it."""
    panel = tiny_panel()
    (info,) = write_shards(folder, tiny_samples(run, "D1", n, panel, 0), run=run, max_samples=n)
    manifest = Manifest(
        run=run,
        source_id=None,
        tissue=None,
        species="human",
        panel_id=panel.panel_id,
        patch=PATCH,
        totals=Totals(seen=n, kept=n, dropped={}),
        shards=(info,),
    )
    return Shard(folder / f"{info.name}.tar", manifest, info, 0)


def test_made_at_the_first_touch_of_a_shard_20_bytes_a_sample(stream: Stream) -> None:
    assert not stream.index_cache.exists()
    stream.read(0)
    (file,) = stream.index_cache.iterdir()
    assert file == index_file(stream.shards[0], stream.index_cache)
    assert file.stat().st_size == 16 + 20 * 20


def test_made_before_for_all_shards_and_once(stream: Stream) -> None:
    assert stream.build_index() == len(stream.shards) == 6
    assert stream.build_index() == 0
    assert len(list(stream.index_cache.iterdir())) == 6
    times = {path: path.stat().st_mtime_ns for path in stream.index_cache.iterdir()}
    stream.read(range(len(stream)))
    assert times == {path: path.stat().st_mtime_ns for path in stream.index_cache.iterdir()}


def test_tells_what_the_table_tells(stream: Stream) -> None:
    for shard in stream.shards:
        rows = open_index(shard, stream.index_cache)
        for number, row in enumerate(pq.read_table(shard.table).to_pylist()):
            span = span_at(rows, 16 + 20 * number)
            assert (span.start, span.jpg_size, span.crc32) == (
                row["jpg_offset"],
                row["jpg_size"],
                row["crc32"],
            )
            assert (span.start + span.counts_at, span.counts_size) == (
                row["counts_offset"],
                row["counts_size"],
            )
            assert (span.start + span.neighbors_at, span.neighbors_size) == (
                row["neighbors_offset"],
                row["neighbors_size"],
            )
        rows.close()


def _flipped(content: bytes) -> bytes:
    return content[:40] + bytes([content[40] ^ 1]) + content[41:]


@pytest.mark.parametrize(
    "damage",
    [_flipped, lambda c: c[:-1], lambda c: c + b"\0", lambda c: b"", lambda c: b"x" + c[1:]],
    ids=["a bit", "cut", "longer", "empty", "another version"],
)
def test_a_damaged_file_is_made_again(
    stream: Stream, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    stream.build_index()
    pairs = [bytes(pair.jpeg) for pair in stream.read(range(30))]
    file = index_file(stream.shards[0], stream.index_cache)
    right = file.read_bytes()
    file.write_bytes(damage(right))
    assert [bytes(pair.jpeg) for pair in stream.read(range(30))] == pairs
    assert file.read_bytes() == right
    assert "damaged; made again" in caplog.text
    file.write_bytes(damage(right))
    assert build_index(stream.shards, stream.index_cache) == 1


def test_no_table_is_read_once_it_is_made(dataset: Path, tmp_path: Path) -> None:
    root = shutil.copytree(dataset, tmp_path / "dataset")
    stream = read_stream([root], "train", index_cache=tmp_path / "cache")
    stream.build_index()
    for shard in stream.shards:
        shard.table.write_bytes(b"")
    assert len(stream.read(range(len(stream)))) == 100


def test_a_table_that_is_gone_or_not_the_manifests_is_told(dataset: Path, tmp_path: Path) -> None:
    root = shutil.copytree(dataset, tmp_path / "dataset")
    stream = read_stream([root], "train", index_cache=tmp_path / "cache")
    table = stream.shards[0].table
    pq.write_table(pq.read_table(table).slice(0, 19), table)
    with pytest.raises(BadInput, match=rf"{table.name}[\s\S]*the manifest names"):
        stream.read(0)
    table.unlink()
    with pytest.raises(BadInput, match=rf"{table.name}[\s\S]*no such file"):
        stream.build_index()
    assert len(stream.read(range(20, 40))) == 20


def _moved(column: str) -> Callable[[pa.Table], pa.Table]:
    def changed(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[2] += 512
        field = table.schema.field(column)
        place = table.column_names.index(column)
        return table.set_column(place, field, pa.array(values, field.type))

    return changed


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_moved("counts_offset"), "row 2 tells otherwise"),
        (_moved("neighbors_offset"), "row 2 tells otherwise"),
        (_moved("jpg_size"), "row 2 tells otherwise"),
        (lambda table: table.slice(0, 4), "4 rows"),
        (lambda table: table.drop_columns("crc32"), "crc32"),
        (lambda table: table.take([1, 0, 2, 3, 4]), "row 0 tells otherwise"),
    ],
    ids=["counts", "neighbors", "jpg", "rows", "column", "order"],
)
def test_a_table_of_another_layout_is_refused(
    tmp_path: Path, change: Callable[[pa.Table], pa.Table], found: str
) -> None:
    shard = shard_of(tmp_path, "run0")
    pq.write_table(change(pq.read_table(shard.table)), shard.table)
    info = shard.info.model_copy(update={"table_sha256": sha256_of(shard.table)})
    changed = Shard(shard.tar, shard.manifest, info, 0)
    with pytest.raises(BadInput, match=found):
        open_index(changed, tmp_path / "cache")


@pytest.mark.parametrize("n_letters", [1, 70, 75, 80, 90, 120])
def test_members_with_long_names_are_found(tmp_path: Path, n_letters: int) -> None:
    # Beyond 100 bytes a member's name takes two blocks more; those of one sample differ in length.
    shard = shard_of(tmp_path, "r" * n_letters)
    written = tiny_samples("r" * n_letters, "D1", 5, tiny_panel(), 0)
    with GlobalReader([shard], Parts.of([5], [1]), tmp_path / "cache", "crc32") as reader:
        for place, pair in reader.each(range(5)):
            assert not isinstance(pair, BadInput)
            assert pair.jpeg == written[place].image_jpeg
            assert pair.counts is not None
            assert pair.neighbors is not None
            assert (pair.counts == written[place].counts).all()
            assert (pair.neighbors == written[place].neighbors).all()


def test_a_cache_that_cannot_be_written_is_no_fault_of_a_sample(
    dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    stream = read_stream([dataset], "train", index_cache=tmp_path / "file" / "cache")
    for reading in ("global", "block"):
        with (
            stream.reader(reading) as reader,
            pytest.raises(BadSetting, match="CELLPAIR_CACHE"),
        ):
            list(reader.each([0]))


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("CELLPAIR_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache() == Path("/home/someone/.cache/cellpair/index")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache() == Path("/xdg/cellpair/index")
    monkeypatch.setenv("CELLPAIR_CACHE", "/scratch")
    assert default_cache() == Path("/scratch/index")
