"""`cellpair export` of a dataset behind a URL: the files of one in a folder, and its own words."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from flows.cli import main
from shards.remote import remote_path
from tests.flows import test_curate
from tests.s3 import Line
from tests.shards.tiny import write_tiny_dataset


@pytest.fixture(autouse=True)
def _own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLPAIR_CACHE", str(tmp_path / "cache"))


def upload(root: Path, bucket: str) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            (remote_path(bucket) / path.relative_to(root).as_posix()).upload(path)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def export(dataset: Path | str, to: str, out: Path, *options: str) -> int:
    return main(["export", str(dataset), "--to", to, "--out", str(out), *options])


@pytest.mark.parametrize("to", ["h5ad", "openclip"])
def test_an_export_from_a_bucket_has_the_bytes_of_one_from_a_folder(
    to: str, bucket: str, s3: Line, tmp_path: Path
) -> None:
    root = write_tiny_dataset(tmp_path / "in", {"D1": "train", "D2": "train", "D3": "test"})
    upload(root, bucket)
    s3.clear()
    assert export(bucket, to, tmp_path / "there") == 0
    assert export(root, to, tmp_path / "here") == 0
    assert files(tmp_path / "there") == files(tmp_path / "here") != {}
    assert not [method for method, _ in s3.requests if method not in ("GET", "HEAD")]
    assert not list((tmp_path / "cache").rglob("*.tar"))
    s3.clear()
    assert export(bucket, to, tmp_path / "some", "--split", "test") == 0
    tars = {path.rpartition("/")[2] for _, path in s3.requests if path.endswith(".tar")}
    assert tars == {p.name for p in root.rglob("*.tar") if p.name.startswith("run2-D3")} != set()


def test_faults_are_told_by_the_url(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(bucket, "h5ad", tmp_path / "out") == 2
    assert bucket in capsys.readouterr().err
    root = write_tiny_dataset(tmp_path / "in")
    table = min(root.rglob("runs/run1/**/*.parquet"))
    table.write_bytes(table.read_bytes()[:-1] + b"x")
    upload(root, bucket)
    assert export(bucket, "h5ad", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert f"{bucket}/{table.relative_to(root)}" in told
    assert "view" not in told
    tar = table.with_suffix(".tar")
    remote_path(bucket).remove([tar.relative_to(root).as_posix()])
    assert export(bucket, "openclip", tmp_path / "out") == 2
    assert f"{bucket}/{tar.relative_to(root)}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_texts_tell_is_told_before_anything_is_fetched(
    bucket: str, s3: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(write_tiny_dataset(tmp_path / "in"), bucket)
    s3.clear()
    assert export(bucket, "h5ad", tmp_path / "in") == 2
    assert export(bucket, "h5ad", tmp_path / "out", "--run", "run1", "--run", "other") == 2
    assert "found:    other" in capsys.readouterr().err
    assert not [path for _, path in s3.requests if path.endswith((".tar", ".parquet"))]


def test_a_cache_without_room_is_told(
    bucket: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upload(write_tiny_dataset(tmp_path / "in"), bucket)
    monkeypatch.setenv("CELLPAIR_CACHE_BYTES", "10000")
    assert export(bucket, "openclip", tmp_path / "out") == 2
    assert "raise CELLPAIR_CACHE_BYTES" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of spatialdata and its readers, about each other
def test_spatialdata_of_a_curation_behind_a_url(
    simulated: Path, bucket: str, tmp_path: Path
) -> None:
    """Its bundle is found where it was curated from; elsewhere, where one says."""
    run = shutil.copytree(simulated, tmp_path / "run")
    for path in run.rglob("*"):  # or hashes of the last seconds are not remembered
        os.utime(path, (1e9, 1e9))
    assert test_curate.curate(tmp_path, run, refine="false") == 0
    assert test_curate.curate(tmp_path, run, refine="false", out=bucket) == 0
    assert export(tmp_path / "out dir", "spatialdata", tmp_path / "here") == 0
    assert export(bucket, "spatialdata", tmp_path / "there") == 0
    assert files(tmp_path / "there") == files(tmp_path / "here") != {}
    moved = (run / "outs").rename(tmp_path / "moved")
    assert export(bucket, "spatialdata", tmp_path / "lost") == 2
    assert export(bucket, "spatialdata", tmp_path / "found", "--xenium", str(moved)) == 0
    assert files(tmp_path / "found") == files(tmp_path / "here")
