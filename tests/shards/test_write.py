"""Shards as any reader sees them: plain webdataset, the index table, the same bytes twice."""

from __future__ import annotations

import dataclasses
import io
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
import webdataset
from hypothesis import example, given
from hypothesis import strategies as st

from shards.errors import BadInput
from shards.write import member_header, narrow_counts, npy_header, write_shards
from tests.shards.tiny import PATCH, tiny_panel, tiny_samples


def write(folder: Path, n: int = 7, max_samples: int = 3) -> list[str]:
    samples = tiny_samples("run", "Donor É 1", n, tiny_panel(), seed=4)
    return [info.name for info in write_shards(folder, samples, run="run", max_samples=max_samples)]


def test_plain_webdataset_reads_what_was_written(tmp_path: Path) -> None:
    names = write(tmp_path)
    assert len(names) == 3
    urls = [str(tmp_path / f"{name}.tar") for name in names]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    wrote = tiny_samples("run", "Donor É 1", 7, tiny_panel(), seed=4)
    assert [s["__key__"] for s in read] == [f"run__{s.cell_id}" for s in wrote]
    for got, want in zip(read, wrote, strict=True):
        assert got["jpg"].shape == (PATCH.size_px, PATCH.size_px, 3)
        np.testing.assert_array_equal(got["jpg"], simplejpeg.decode_jpeg(want.image_jpeg))
        np.testing.assert_array_equal(got["counts.npy"], want.counts)
        np.testing.assert_array_equal(got["neighbors.npy"], want.neighbors)


def test_the_index_finds_every_member_by_one_positioned_read(tmp_path: Path) -> None:
    (name,) = write(tmp_path, n=5, max_samples=10)
    wrote = tiny_samples("run", "Donor É 1", 5, tiny_panel(), seed=4)
    with (tmp_path / f"{name}.tar").open("rb") as tar:
        for row, want in zip(
            pq.read_table(tmp_path / f"{name}.parquet").to_pylist(), wrote, strict=True
        ):
            members = [
                os.pread(tar.fileno(), row[f"{m}_size"], row[f"{m}_offset"])
                for m in ("jpg", "counts", "neighbors")
            ]
            assert members[0] == want.image_jpeg
            assert zlib.crc32(b"".join(members)) == row["crc32"]
            assert (row["run"], row["cell_id"], row["donor"]) == ("run", want.cell_id, want.donor)
            assert {k: row[k] for k in want.row} == want.row


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        write(tmp_path / side)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("cell_id", ["", "a.b", "a/b", "a\\b"])
def test_a_cell_id_that_breaks_a_tar_key_is_refused(tmp_path: Path, cell_id: str) -> None:
    (sample,) = tiny_samples("run", "D", 1, tiny_panel(), seed=0)
    with pytest.raises(BadInput, match="names members of a tar"):
        write_shards(
            tmp_path, [dataclasses.replace(sample, cell_id=cell_id)], run="run", max_samples=9
        )


def test_a_repeated_cell_id_is_refused(tmp_path: Path) -> None:
    (sample,) = tiny_samples("run", "D", 1, tiny_panel(), seed=0)
    with pytest.raises(BadInput, match="every cell id once"):
        write_shards(tmp_path, [sample, sample], run="run", max_samples=9)


@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1),
    st.integers(0, 8**11 - 1),
)
@example("a" * 100, 8**11 - 1)
@example("a" * 99 + "é", 0)
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o644
    assert member_header(name.encode(), size) == info.tobuf(tarfile.GNU_FORMAT)


@given(st.sampled_from([2, 3]), st.integers(0, 5000), st.sampled_from([np.uint16, np.uint32]))
def test_arrays_are_as_numpy_saves_them(n_rows: int, n: int, dtype: type[np.generic]) -> None:
    array = np.ones((n_rows, n), dtype)
    saved = io.BytesIO()
    np.save(saved, array, allow_pickle=False)
    assert npy_header(array.dtype.str, array.shape) + array.tobytes() == saved.getvalue()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9))
def test_counts_are_never_clipped(values: list[int]) -> None:
    rows = np.array([values], dtype=np.int64)
    narrow = narrow_counts(rows)
    np.testing.assert_array_equal(narrow.astype(np.int64), rows)
    assert narrow.dtype == (np.uint16 if max(values) < 2**16 else np.uint32)


@pytest.mark.parametrize("value", [-1, 2**32])
def test_counts_beyond_the_format_are_an_error(value: int) -> None:
    with pytest.raises(ValueError, match="indices and counts"):
        narrow_counts(np.array([[value]], dtype=np.int64))
