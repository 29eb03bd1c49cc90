"""`cellpair curate` with its output behind a URL: the bytes of one in a folder, come what may."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.trust import disk, harness
from flows import transient
from flows.cli import main
from flows.config import read_curate_config
from shards.artifact import RECORD_FILE
from shards.errors import BadInputs
from shards.remote import RemotePath, remote_path
from tests.flows import test_curate
from tests.flows.test_curate import write_config
from tests.s3 import BUCKET, ENVIRONMENT, Line

Objects = dict[str, bytes]


def objects(url: str) -> Objects:
    """All that lies behind a URL."""
    remote = remote_path(url)
    return {name: (remote / name).read_bytes() for name in remote.files()}


def datasets(content: Objects) -> Objects:
    """What a curation must leave to the byte: artifacts, panels, datasets and the pointer."""
    kept = ("runs/", "panels/", "datasets/", "dataset.json")
    return {name: data for name, data in content.items() if name.startswith(kept)}


def local(folder: Path) -> Objects:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def records_are_whole(content: Objects) -> bool:
    """Whether every artifact that has a record has all its files, by what the record says."""
    for name, data in content.items():
        if name.endswith(f"/{RECORD_FILE}"):
            folder = name.removesuffix(RECORD_FILE)
            for file, facts in json.loads(data)["files"].items():
                if len(content.get(folder + file, b"")) != facts["n_bytes"]:
                    return False
    return True


def curate(folder: Path, run: Path | RemotePath, **changes: object) -> int:
    """As it is done everywhere, by the quickest way."""
    return test_curate.curate(folder, run, refine="false", **changes)


@pytest.fixture(scope="module")
def in_a_folder(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Objects:
    folder = tmp_path_factory.mktemp("local")
    assert curate(folder, simulated) == 0
    return datasets(local(folder / "out dir"))


@pytest.fixture(autouse=True)
def _own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLPAIR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transient, "PAUSES_S", (0.1,))


def test_a_curation_behind_a_url_has_the_bytes_of_one_in_a_folder(
    simulated: Path,
    in_a_folder: Objects,
    bucket: str,
    s3: Line,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert curate(tmp_path, simulated, out=bucket) == 0
    content = objects(bucket)
    assert datasets(content) == in_a_folder
    assert {"cellpair.json", "history.jsonl", "logs/r1.log", "report/index.html"} <= content.keys()
    told = capsys.readouterr()
    assert f"report: {bucket}/report/index.html" in told.out
    secret = ENVIRONMENT["AWS_SECRET_ACCESS_KEY"]
    assert secret not in told.out + told.err
    assert not [name for name, data in content.items() if secret.encode() in data]

    s3.clear()
    assert curate(tmp_path, simulated, out=bucket) == 0
    put = {path.rpartition("/")[2] for method, path in s3.requests if method == "PUT"}
    assert put <= {"cellpair.json", "history.jsonl", "r1.log", "curate.log"}

    # Another machine finds all of it: nothing of runs or datasets is put again, no slide is read.
    monkeypatch.setenv("CELLPAIR_CACHE", str(tmp_path / "another machine"))
    s3.clear()
    assert curate(tmp_path, simulated, out=bucket) == 0
    assert len(objects(bucket)["history.jsonl"].splitlines()) == 3
    put = [path for method, path in s3.requests if method == "PUT"]
    assert not [path for path in put if "/runs/" in path or "/datasets/" in path]
    got = [path for method, path in s3.requests if method == "GET" and path.endswith(".tar")]
    assert len(got) == len([name for name in content if name.endswith(".tar")])  # by `objects`
    assert main(["check", bucket]) == 0
    assert main(["info", bucket]) == 0
    assert "no faults" in capsys.readouterr().out


def uploaded(run: Path, bucket: str) -> RemotePath:
    """The raw files of a run, there too."""
    inputs = remote_path(f"{bucket}/raw run")
    for path in sorted(p for p in run.rglob("*") if p.is_file() and "truth" not in p.parts):
        (inputs / path.relative_to(run).as_posix()).upload(path)
    return inputs


@pytest.mark.slow
def test_inputs_behind_urls_are_the_same_inputs(
    simulated: Path, in_a_folder: Objects, bucket: str, s3: Line, tmp_path: Path
) -> None:
    inputs = uploaded(simulated, bucket)
    before = inputs.files()
    assert curate(tmp_path, inputs) == 0
    assert datasets(local(tmp_path / "out dir")) == in_a_folder
    assert inputs.files() == before
    s3.clear()
    assert curate(tmp_path, inputs) == 0
    assert not [m for m, path in s3.requests if m in ("PUT", "POST", "DELETE")]
    assert not [path for m, path in s3.requests if m == "GET" and path.endswith(".tif")]


@pytest.mark.slow
def test_h_e_nuclei_are_counted_from_transcripts_behind_a_url(
    simulated: Path, bucket: str, tmp_path: Path
) -> None:
    for folder, run in (("here", simulated), ("there", uploaded(simulated, bucket))):
        (tmp_path / folder).mkdir()
        assert curate(tmp_path / folder, run, model="compact", unit="he_nuclei") == 0
    here, there = (datasets(local(tmp_path / folder / "out dir")) for folder in ("here", "there"))
    assert here == there


def test_an_input_larger_than_the_cache_is_refused(
    simulated: Path,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    slide = remote_path(f"{bucket}/he.ome.tif")
    slide.upload(simulated / "he.ome.tif")
    monkeypatch.setenv("CELLPAIR_CACHE_BYTES", "1000")
    assert curate(tmp_path, simulated, slide=slide) == 2
    assert f"bytes of {slide}" in caplog.text
    assert "raise CELLPAIR_CACHE_BYTES" in caplog.text
    assert not list((tmp_path / "cache").rglob("*.tif"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["cells", "shards"])
def test_a_store_that_goes_in_the_middle(
    simulated: Path,
    in_a_folder: Objects,
    bucket: str,
    s3: Line,
    tmp_path: Path,
    stage: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    s3.cut_at = lambda method, path: (
        method == "PUT" and f"/{stage}/" in path and not path.endswith(".claim")
    )
    assert curate(tmp_path, simulated, out=bucket) == 1
    told = capsys.readouterr().err
    assert bucket in caplog.text
    assert "does not answer" in caplog.text
    assert "run the same command again to go on" in told
    s3.mend()
    half = objects(bucket)
    assert records_are_whole(half)
    assert "dataset.json" not in half
    assert curate(tmp_path, simulated, out=bucket) == 0
    assert datasets(objects(bucket)) == in_a_folder


@pytest.mark.slow
@pytest.mark.skipif(disk.NEEDS_ROOT, reason="a tmpfs needs Linux and root")
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_full_disk_of_the_cache(
    simulated: Path,
    in_a_folder: Objects,
    bucket: str,
    tmp_path: Path,
    share: float,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with disk.small_disk(harness.Place(tmp_path, simulated, "none")) as full:
        monkeypatch.setenv("CELLPAIR_CACHE", str(full.folder))
        full.leave(round(share * sum(map(len, in_a_folder.values()))))
        assert curate(tmp_path, simulated, out=bucket) == 1
        assert "No space left" in caplog.text + capsys.readouterr().err
        half = objects(bucket)
        assert records_are_whole(half)
        assert "dataset.json" not in half
        full.grow()
        assert curate(tmp_path, simulated, out=bucket) == 0
    assert datasets(objects(bucket)) == in_a_folder


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_uploads(
    simulated: Path, in_a_folder: Objects, bucket: str, s3: Line, tmp_path: Path
) -> None:
    config = write_config(tmp_path, simulated, out=bucket, refine="false")
    with subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "curate", str(config), "--workers", "1"],
        stderr=subprocess.DEVNULL,
    ) as process:

        def kill(method: str, path: str) -> bool:
            if method == "PUT" and "/patches/" in path and not path.endswith(".claim"):
                os.kill(process.pid, signal.SIGKILL)
                return True
            return False

        s3.cut_at = kill
        assert process.wait() == -signal.SIGKILL
    s3.mend()
    half = objects(bucket)
    assert records_are_whole(half)
    assert any(name.endswith(".claim") for name in half)
    assert curate(tmp_path, simulated, out=bucket) == 0
    assert datasets(objects(bucket)) == in_a_folder


def test_a_bucket_that_is_not_there_or_only_read(
    simulated: Path,
    bucket: str,
    s3: Line,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert curate(tmp_path, simulated, out="s3://no-such-bucket-here/x") == 2
    assert "a bucket or container that is there and can be written to" in capsys.readouterr().err
    s3.denies = lambda method, path: method == "PUT"
    assert curate(tmp_path, simulated, out=bucket) == 2
    told = capsys.readouterr().err
    assert "access denied" in told
    assert "rights of the credentials" in told
    assert objects(bucket) == {}


def test_a_place_that_is_in_use_for_something_else(
    simulated: Path, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (remote_path(bucket) / "somebody's thesis.doc").write_bytes(b"years of work")
    assert curate(tmp_path, simulated, out=bucket) == 2
    assert "somebody's thesis.doc, and no cellpair.json" in capsys.readouterr().err


def test_faults_of_urls_are_told_with_the_others(simulated: Path, s3: Line, tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        remote_path(f"s3://{BUCKET}/raw"),
        out=f"s3://{BUCKET}/raw/outs/dataset",
        slide="s3://name:secret@bucket/he.ome.tif",
    )
    with pytest.raises(BadInputs) as error:
        read_curate_config(config)
    told = str(error.value)
    assert "secret" not in told
    assert "a URL without a name, a password" in told
    assert "a URL outside of the inputs" in told
    assert f"nothing at s3://{BUCKET}/raw/outs" in told


@pytest.mark.slow
def test_clean_removes_there_what_no_dataset_points_to(
    simulated: Path, bucket: str, s3: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert curate(tmp_path, simulated, out=bucket) == 0
    remote = remote_path(bucket)
    before = objects(bucket)
    stray = f"runs/r1/cells/{'ab' * 10}/cells.parquet"
    claim = f"runs/r1/cells/.{'ab' * 10}.claim"
    (remote / stray).write_bytes(b"never whole")
    (remote / claim).write_bytes(
        b'{"owner": {"host": "far-away x", "pid": 7, "started_s": 1.0}, "beat": 3}'
    )
    assert main(["clean", bucket]) == 2
    assert "process 7 on far-away" in capsys.readouterr().err
    remote.remove([claim])
    assert main(["clean", bucket, "--dry-run"]) == 0
    assert f"would remove runs/r1/cells/{'ab' * 10}" in capsys.readouterr().out
    assert (remote / stray).is_file()
    assert main(["clean", bucket]) == 0
    assert objects(bucket) == before
    assert not list((tmp_path / "cache" / "work").glob("*"))
    assert main(["check", bucket]) == 0


@pytest.mark.slow
def test_clean_removes_a_withdrawn_donor_there(
    simulated: Path, bucket: str, s3: Line, tmp_path: Path
) -> None:
    assert curate(tmp_path, simulated, out=bucket) == 0
    remote = remote_path(bucket)
    owner = remote / "cellpair.json"
    owner.write_bytes(owner.read_bytes().replace(b'"withdrawn": []', b'"withdrawn": ["D1"]'))
    assert main(["clean", bucket]) == 0
    left = objects(bucket)
    assert not datasets(left)
    assert not [name for name, data in left.items() if b"D1" in data and name != "cellpair.json"]
