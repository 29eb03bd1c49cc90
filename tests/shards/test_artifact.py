"""An artifact is whole or absent, and made once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from shards.artifact import ContentHashes, build_artifact, fingerprint_of, read_artifact


def build(parent: Path, make: Any, config: dict[str, Any] | None = None) -> tuple[Path, bool]:
    folder, _, reused = build_artifact(
        parent,
        stage="cells",
        stage_version=1,
        config=config or {"a": 1},
        parents={},
        inputs={},
        provenance={},
        make=make,
    )
    return folder, reused


def write_one(out: Path) -> dict[str, Any]:
    (out / "x.txt").write_text("hello")
    return {"n": 1}


def test_the_second_build_reuses_the_first(tmp_path: Path) -> None:
    folder, reused = build(tmp_path, write_one)
    assert not reused
    record = read_artifact(folder)
    assert record is not None
    assert record.summary == {"n": 1}
    assert list(record.files) == ["x.txt"]

    def never(out: Path) -> dict[str, Any]:
        raise AssertionError("made twice")

    assert build(tmp_path, never) == (folder, True)
    assert build(tmp_path, write_one, {"a": 2})[0] != folder


def test_a_failed_stage_leaves_no_artifact(tmp_path: Path) -> None:
    def fail(out: Path) -> dict[str, Any]:
        write_one(out)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build(tmp_path, fail)
    assert not list(tmp_path.glob("*/artifact.json"))
    folder, reused = build(tmp_path, write_one)
    assert not reused
    assert sorted(p.name for p in folder.iterdir()) == ["artifact.json", "x.txt"]


def test_a_killed_stage_leaves_no_artifact_and_no_lock(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from shards.artifact import build_artifact
        def make(out):
            (out / "half").write_text("half")
            print("writing", flush=True)
            time.sleep(60)
        build_artifact(Path(sys.argv[1]), stage="cells", stage_version=1, config={"a": 1},
                       parents={}, inputs={}, provenance={}, make=make)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    folder, reused = build(tmp_path, write_one)
    assert not reused
    assert sorted(p.name for p in folder.iterdir()) == ["artifact.json", "x.txt"]


def test_the_fingerprint_hangs_on_all_that_it_is_made_from() -> None:
    base: tuple[Any, ...] = ("cells", 1, {"a": 1}, {"nuclei": "f"}, {"xenium": "h"})
    changes = [
        ("nuclei", *base[1:]),
        (base[0], 2, *base[2:]),
        (*base[:2], {"a": 2}, *base[3:]),
        (*base[:3], {"nuclei": "g"}, base[4]),
        (*base[:4], {"xenium": "i"}),
    ]
    fingerprints = {fingerprint_of(*args) for args in [base, *changes]}
    assert len(fingerprints) == 6
    assert fingerprint_of(*base) == fingerprint_of(*base)


def test_content_hashes_follow_content_and_are_remembered(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "a").write_text("1")
    (folder / "._a").write_text("left by macOS")
    memory = tmp_path / "hashes.json"
    hashes = ContentHashes(memory)
    before = hashes.of(folder)
    hashes.save()
    (folder / "._a").unlink()
    assert ContentHashes(memory).of(folder) == before
    (folder / "a").write_text("22")
    assert ContentHashes(memory).of(folder) != before
