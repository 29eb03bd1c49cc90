"""`cellpair curate` with its output behind a URL: the bytes of one in a folder, come what may."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.remote import remote_path
from tests.flows.test_curate import curate
from tests.s3 import Line


def objects(url: str) -> dict[str, bytes]:
    """All that lies behind a URL."""
    remote = remote_path(url)
    return {name: (remote / name).read_bytes() for name in remote.files()}


def datasets(content: dict[str, bytes]) -> dict[str, bytes]:
    """What a curation must leave to the byte: artifacts, panels, datasets and the pointer."""
    kept = ("runs/", "panels/", "datasets/", "dataset.json")
    return {name: data for name, data in content.items() if name.startswith(kept)}


def local(folder: Path) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def in_a_folder(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("local")
    assert curate(folder, simulated) == 0
    return datasets(local(folder / "out dir"))


def test_a_curation_behind_a_url_has_the_bytes_of_one_in_a_folder(
    simulated: Path,
    in_a_folder: dict[str, bytes],
    bucket: str,
    s3: Line,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert curate(tmp_path, simulated, out=bucket) == 0
    content = objects(bucket)
    assert datasets(content) == in_a_folder
    assert {"cellpair.json", "history.jsonl", "logs/r1.log", "report/index.html"} <= content.keys()
    assert f"report: {bucket}/report/index.html" in capsys.readouterr().out
    s3.clear()
    assert curate(tmp_path, simulated, out=bucket) == 0
    assert len(objects(bucket)["history.jsonl"].splitlines()) == 2
    put = [path for method, path in s3.requests if method == "PUT"]
    assert not [path for path in put if "/runs/" in path or "/datasets/" in path]
