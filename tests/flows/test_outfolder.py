"""Whose an output folder is, and what it must not be."""

from __future__ import annotations

import errno
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows.outfolder import LOCK_FOLDER, OutFolder, claim_out, read_out
from shards.errors import BadInput
from shards.lock import hold


def test_a_new_folder_is_claimed_once(tmp_path: Path) -> None:
    out = tmp_path / "not" / "there yet"
    assert read_out(tmp_path) is None
    claim_out(out, "pilot", ())
    before = (out / "cellpair.json").stat()
    claim_out(out, "pilot", ())
    after = (out / "cellpair.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    claim_out(out, "pilot", ("D3",))
    assert read_out(out) == OutFolder(name="pilot", withdrawn=("D3",))
    claim_out(out, "pilot", ("D3", "D4"))
    # An older copy of the config must not bring back whom this folder must not hold.
    with pytest.raises(BadInput, match=r"(?s)without 'D4'.*remove their names from cellpair.json"):
        claim_out(out, "pilot", ("D3", "D5"))
    assert read_out(out) == OutFolder(name="pilot", withdrawn=("D3", "D4"))
    assert [p.name for p in out.iterdir()] == ["cellpair.json"]


def test_a_folder_with_a_config_is_free(tmp_path: Path) -> None:
    (tmp_path / "curate.toml").touch()
    (tmp_path / ".DS_Store").touch()
    claim_out(tmp_path, "pilot", ())


def test_the_folder_of_an_earlier_version_is_claimed(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "report").mkdir()
    with pytest.raises(BadInput, match=r"report, runs, and no cellpair\.json"):
        claim_out(tmp_path, "pilot", ())
    (tmp_path / "content-hashes.json").write_text("{}")
    claim_out(tmp_path, "pilot", ())
    assert read_out(tmp_path) == OutFolder(name="pilot", withdrawn=())


def test_of_many_configs_at_once_one_gets_the_folder(tmp_path: Path) -> None:
    def claim(name: str) -> bool:
        try:
            claim_out(tmp_path, name, ())
        except BadInput:
            return False
        return True

    names = [f"config {i}" for i in range(8)]
    with ThreadPoolExecutor(len(names)) as pool:
        got = [name for name, won in zip(names, pool.map(claim, names), strict=True) if won]
    owner = read_out(tmp_path)
    assert owner is not None
    assert got == [owner.name]
    assert [p.name for p in tmp_path.iterdir()] == ["cellpair.json"]


def test_a_folder_that_is_cleaned_is_waited_for(tmp_path: Path) -> None:
    claim_out(tmp_path, "pilot", ())
    with ThreadPoolExecutor(1) as pool:
        with hold(tmp_path / LOCK_FOLDER, "clean"):
            claimed = pool.submit(claim_out, tmp_path, "pilot", ("D3",))
            with pytest.raises(TimeoutError):
                claimed.result(timeout=0.5)
            assert read_out(tmp_path) == OutFolder(name="pilot", withdrawn=())
        claimed.result()
    assert read_out(tmp_path) == OutFolder(name="pilot", withdrawn=("D3",))


def test_another_configs_folder_is_refused(tmp_path: Path) -> None:
    claim_out(tmp_path, "pilot", ())
    with pytest.raises(BadInput, match=r"the one of 'second'[\s\S]*the folder of 'pilot'"):
        claim_out(tmp_path, "second", ())
    assert read_out(tmp_path) == OutFolder(name="pilot", withdrawn=())


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    for name in ("thesis.docx", "a", "b", "c"):
        (tmp_path / name).touch()
    with pytest.raises(BadInput, match=r"a, b, c …, and no cellpair.json"):
        claim_out(tmp_path, "pilot", ())
    assert not (tmp_path / "cellpair.json").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(BadInput, match="a file in the place of a folder"):
            claim_out(out, "pilot", ())


def test_a_broken_record_is_told(tmp_path: Path) -> None:
    (tmp_path / "cellpair.json").write_text("{")
    with pytest.raises(BadInput, match=r"cellpair\.json"):
        claim_out(tmp_path, "pilot", ())


# Rights alone stop no test that is run as root: the system is made to say no.
@pytest.mark.parametrize(
    ("number", "words"), [(errno.EROFS, "a read-only file system"), (errno.EACCES, "denied")]
)
def test_a_folder_that_is_read_only_is_told_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    claim_out(tmp_path, "pilot", ())
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}

    def refused(**where: Path) -> None:
        raise OSError(number, os.strerror(number), str(where["dir"]))

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(BadInput, match=f"{words}.*\n.*set out to another folder"):
        claim_out(tmp_path, "pilot", ())
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
