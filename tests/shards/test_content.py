"""Content hashes follow the content, and are remembered only where that is safe."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from shards.content import ContentHashes
from shards.errors import BadInput

LONG_AGO = (1e9, 1e9)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "a").write_text("1")
    os.utime(folder / "a", LONG_AGO)
    return folder


def test_they_are_remembered(bundle: Path, tmp_path: Path) -> None:
    memory = tmp_path / "hashes.json"
    hashes = ContentHashes(memory)
    before = hashes.of(bundle)
    hashes.save()
    (key,) = json.loads(memory.read_text())
    assert key.startswith(str(bundle / "a"))
    # As the memory says so, the file is not read: another content at the same time is not seen.
    (bundle / "a").write_text("2")
    os.utime(bundle / "a", LONG_AGO)
    assert ContentHashes(memory).of(bundle) == before
    assert ContentHashes(tmp_path / "none").of(bundle) != before


def test_what_is_remembered_is_told_without_reading(bundle: Path, tmp_path: Path) -> None:
    memory = tmp_path / "hashes.json"
    hashes = ContentHashes(memory)
    before = hashes.of(bundle)
    hashes.save()
    again = ContentHashes(memory)
    assert again.paths() == [bundle / "a"]
    assert again.remembered(bundle) == before
    (bundle / "b").write_text("one more")
    assert again.remembered(bundle) is None
    (bundle / "a").unlink()
    assert again.remembered(bundle / "a") is None


def test_they_follow_names_content_and_linked_folders(bundle: Path, tmp_path: Path) -> None:
    def now() -> str:
        return ContentHashes(tmp_path / "none").of(bundle)

    seen = {now()}
    (bundle / "._a").write_text("left by macOS")
    assert now() in seen
    (bundle / "a").write_text("22")
    assert now() not in seen
    seen.add(now())
    (bundle / "a").rename(bundle / "b")
    assert now() not in seen
    seen.add(now())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "c").write_text("3")
    (bundle / "linked").symlink_to(elsewhere)
    (bundle / "circle").symlink_to(bundle)
    assert now() not in seen
    seen.add(now())
    (elsewhere / "c").write_text("4")
    assert now() not in seen


def test_a_file_of_just_now_is_not_remembered(bundle: Path, tmp_path: Path) -> None:
    """It may change again within the tick of its file system's clock."""
    (bundle / "a").touch()
    hashes = ContentHashes(tmp_path / "hashes.json")
    hashes.of(bundle)
    hashes.save()
    assert json.loads((tmp_path / "hashes.json").read_text()) == {}


def test_two_processes_share_the_memory(bundle: Path, tmp_path: Path) -> None:
    memory = tmp_path / "hashes.json"
    other = tmp_path / "slide.tif"
    other.write_text("slide")
    os.utime(other, LONG_AGO)
    first, second = ContentHashes(memory), ContentHashes(memory)
    first.of(bundle)
    second.of(other)
    first.save()
    second.save()
    assert len(json.loads(memory.read_text())) == 2


@pytest.mark.parametrize("spoilt", ["{", "[]", '{"a": 1}', ""])
def test_a_spoilt_memory_is_told_and_not_used(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, spoilt: str
) -> None:
    memory = tmp_path / "hashes.json"
    memory.write_text(spoilt)
    hashes = ContentHashes(memory)
    assert "hashed again" in caplog.text
    hashes.of(bundle)
    hashes.save()
    assert len(json.loads(memory.read_text())) == 1


def test_an_input_that_changes_meanwhile_is_named(bundle: Path, tmp_path: Path) -> None:
    hashes = ContentHashes(tmp_path / "hashes.json")
    hashes.of(bundle)
    hashes.check_unchanged(bundle)
    (bundle / "new").write_text("still being copied")
    with pytest.raises(BadInput, match=r"bundle/new[\s\S]*copied whole"):
        hashes.check_unchanged(bundle)
    hashes.of(bundle)
    hashes.check_unchanged(bundle)
    time.sleep(0.01)
    (bundle / "a").write_text("1")
    with pytest.raises(BadInput, match="bundle/a"):
        hashes.check_unchanged(bundle)


def test_a_link_to_nothing_is_bad_input(bundle: Path, tmp_path: Path) -> None:
    (bundle / "lost").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"bundle/lost[\s\S]*No such file"):
        ContentHashes(tmp_path / "hashes.json").of(bundle)
