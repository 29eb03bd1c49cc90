"""`cellpair clean`: what nothing points to goes, and withdrawn donors; all else stays as it is."""

from __future__ import annotations

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from benchmarks.corpus.files import naming
from flows.cli import main
from flows.naming import Naming
from flows.scratch import scratch
from pairing.simulate import SimulationParams, SlideParams, simulate
from shards.artifact import find_artifact
from shards.check import validate
from shards.dataset import read_dataset
from shards.lock import hold
from shards.schema import donor_slug

CONFIG = """
name = "clean"
out = "out"
[patch]
fov_um = 32
size_px = 64
[filters]
min_counts = {min_counts}
[segmentation]
model = "none"
[split]
assign = {{ D1 = "train", "{person}" = "val", D3 = "test" }}
aliases = {{ "{person}" = ["{in_file}", "née Ünal"] }}
withdraw = [{withdraw}]
[[runs]]
id = "cores"
xenium = "{cores}/outs"
slide = "{cores}/he.ome.tif"
alignment = "{cores}/he_imagealignment.csv"
donors = "donors.{kind}"
labels = "labels.csv"
[[runs]]
id = "one"
xenium = "{one}/outs"
slide = "{one}/he.ome.tif"
alignment = "{one}/he_imagealignment.csv"
donor = "Patient 7"
"""
# One person of the microarray, by the name that is one, and as the file of donors says it.
PERSON, IN_FILE = "Zoë <Ünal>", "core & 22"
Listing = dict[str, tuple[int, int, int]]


def write_config(
    folder: Path, runs: Path, *, min_counts: int = 10, withdraw: str = "", kind: str = "geojson"
) -> Path:
    path = folder / "curate.toml"
    text = CONFIG.format(
        person=PERSON,
        in_file=IN_FILE,
        cores=runs / "cores",
        one=runs / "one",
        min_counts=min_counts,
        withdraw=withdraw,
        kind=kind,
    )
    path.write_text(text, encoding="utf-8")
    return path


def curate(config: Path, *options: str) -> int:
    return main(["curate", str(config), "--workers", "1", *options])


def clean(folder: Path, *options: str) -> int:
    return main(["clean", str(folder / "out"), *options])


def listing(out: Path) -> Listing:
    """Inode, time of change and size of everything below a folder."""
    return {
        str(p.relative_to(out)): (p.stat().st_ino, p.stat().st_mtime_ns, p.stat().st_size)
        for p in sorted(out.rglob("*"))
    }


def artifacts(out: Path) -> set[str]:
    return {str(p.parent.relative_to(out / "runs")) for p in out.glob("runs/*/*/*/artifact.json")}


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A microarray of three donors, and a run of one."""
    folder = tmp_path_factory.mktemp("runs")
    small = SlideParams(mpp=0.5)
    simulate(folder / "cores", SimulationParams(n_cells=150, n_donors=3, seed=2, slide=small))
    simulate(folder / "one", SimulationParams(n_cells=60, seed=3, slide=small))
    return folder


@pytest.fixture(scope="module")
def curated(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curated")
    truth = runs / "cores" / "truth"
    for kind in ("geojson", "csv"):
        text = (truth / f"donors.{kind}").read_text(encoding="utf-8")
        assert "D2" in text
        (folder / f"donors.{kind}").write_text(text.replace("D2", IN_FILE), encoding="utf-8")
    cells = pd.read_parquet(truth / "cells.parquet")
    labels = cells.rename(columns={"type": "label"})[["cell_id", "label"]]
    labels.to_csv(folder / "labels.csv", index=False)
    assert curate(write_config(folder, runs)) == 0
    return folder


@pytest.fixture
def work(curated: Path, tmp_path: Path) -> Path:
    """A copy of the curated folder for one test."""
    return Path(shutil.copytree(curated, tmp_path / "work"))


@pytest.fixture(scope="module")
def superseded_once(curated: Path, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("superseded") / "work"
    shutil.copytree(curated, folder)
    assert curate(write_config(folder, runs, min_counts=40)) == 0
    for path in curated.glob("out/datasets/*.json"):
        (folder / "out" / "datasets" / path.name).unlink()
    return folder


@pytest.fixture
def superseded(superseded_once: Path, tmp_path: Path) -> Path:
    """A copy of the folder curated again with another filter, and the older dataset given up."""
    return Path(shutil.copytree(superseded_once, tmp_path / "work"))


def test_older_datasets_keep_what_they_are_made_of(
    work: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert curate(write_config(work, runs, min_counts=40)) == 0
    before = listing(work / "out")
    capsys.readouterr()
    assert clean(work) == 0
    assert capsys.readouterr().out == "removed 0 B in all\n"
    assert listing(work / "out") == before


def test_superseded_shards_go_and_patches_stay(
    superseded: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = superseded / "out"
    dataset, _ = read_dataset(out)
    before, all_of_it = artifacts(out), listing(out)
    old = {p for p in before if "/shards/" in p and p not in {r.path[5:] for r in dataset.runs}}
    assert len(old) == 2
    capsys.readouterr()
    assert clean(superseded) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": no dataset points to it, ")[0] for line in lines[:-1]] == [
        f"removed runs/{name}" for name in sorted(old)
    ]
    assert artifacts(out) == before - old
    now = listing(out)
    folders = {"runs/cores/shards", "runs/one/shards"}
    assert {k: v for k, v in now.items() if k not in folders} == {
        k: v
        for k, v in all_of_it.items()
        if k not in folders and not any(k.startswith(f"runs/{name}") for name in old)
    }

    assert clean(superseded) == 0
    assert listing(out) == now
    assert validate(out) == []
    assert curate(superseded / "curate.toml") == 0
    assert artifacts(out) == before - old


def test_a_dry_run_says_the_same_and_changes_nothing(
    superseded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(superseded)
    capsys.readouterr()
    assert clean(superseded, "--dry-run") == 0
    told = capsys.readouterr().out
    assert listing(superseded) == before
    assert clean(superseded) == 0
    assert told.replace("would remove", "removed") == capsys.readouterr().out


KILLED_BY_ITSELF = """
import os, signal, sys
from flows.cli import main
left = int(sys.argv[1])
def count(event, args):
    global left
    if event in ("os.rename", "os.remove", "os.rmdir"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
sys.exit(main(["clean", sys.argv[2]]))
"""


def test_killed_at_any_step_it_leaves_nothing_half(
    superseded: Path, runs: Path, tmp_path: Path
) -> None:
    write_config(superseded, runs, withdraw='"Patient 7"')
    assert curate(superseded / "curate.toml") == 0
    want = Path(shutil.copytree(superseded, tmp_path / "want"))
    assert clean(want) == 0
    for n_steps in (1, 3, 8, 20, 40):
        folder = Path(shutil.copytree(superseded, tmp_path / f"killed-{n_steps}"))
        out = folder / "out"
        command = [sys.executable, "-c", KILLED_BY_ITSELF, str(n_steps), str(out)]
        killed = subprocess.run(command, capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        for path in out.glob("runs/*/*/[!.]*"):
            assert find_artifact(path) is not None, path
        for path in out.glob("datasets/[!.]*.json"):
            for run in read_dataset(path)[0].runs:
                assert find_artifact(out / run.path) is not None
        assert validate(out) == []
        assert clean(folder) == 0
        assert contents(out) == contents(want / "out")
        assert not (out / ".clean.lock").exists()


def test_what_a_killed_curate_left_goes_and_no_sooner(
    work: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = work / "out"
    shutil.rmtree(out)
    command = [sys.executable, "-m", "flows.cli", "curate", str(work / "curate.toml")]
    process = subprocess.Popen(
        [*command, "--workers", "1"],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not list(out.glob("runs/*/*/.*.partial")) and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGSTOP)
        before = listing(out)
        assert clean(work) == 2
        assert f"process {process.pid}" in capsys.readouterr().err
        assert {k: v for k, v in listing(out).items() if k != "."} == before
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert clean(work) == 0
    told = capsys.readouterr().out
    assert "unfinished work" in told
    assert "lock of a process that is gone" in told
    assert "temporary folder of a process that is gone" in told
    left = {p.name for p in out.iterdir()}
    assert left <= {"cellpair.json", "content-hashes.json", "logs", "history.jsonl", "runs"}
    assert not [p for p in out.rglob("*") if p.name.startswith(".")]
    assert list(out.glob("runs/*")) == []


def test_every_kind_of_leftover_goes(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = work / "out"
    before = contents(out)
    cells = out / "runs" / "one" / "cells"
    (fingerprint,) = (p.name for p in cells.iterdir())
    for name in ("lock", "blocks", "000001.partial", "damaged-0123abcd", "late-0123abcd"):
        (cells / f".{fingerprint}.{name}").mkdir()
        (cells / f".{fingerprint}.{name}" / "file").write_bytes(b"12345")
    (out / "datasets" / ".x.json.0123abcd.partial").write_bytes(b"123")
    (out / ".dataset.json.0123abcd.partial").write_bytes(b"12")
    (out / "panels" / "panel-0123456789abcdef0123.json").write_bytes(b"{}")
    (out / "runs" / "gone" / "cells").mkdir(parents=True)
    (out / "report" / "gone.html").write_text("<p>")
    kept = [out / "notes.txt", cells / "notes.txt", cells / ".DS_Store", out / "report" / "my.html"]
    for path in kept:
        path.write_text("mine")
    capsys.readouterr()
    assert clean(work) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "removed 55 B in all"
    gone = {"report/.says"}
    mine = {str(path.relative_to(out)): b"mine" for path in kept}
    assert contents(out) == {k: v for k, v in before.items() if k not in gone} | mine
    assert not (out / "runs" / "gone").exists()


@pytest.mark.parametrize("holder", ["lock", "scratch"])
def test_while_a_process_works_there_nothing_goes(
    superseded: Path, capsys: pytest.CaptureFixture[str], holder: str
) -> None:
    out = superseded / "out"
    (stage,) = out.glob("runs/one/cells")
    lock = stage / ".0123456789abcdef0123.lock"
    with hold(lock, "a test") if holder == "lock" else scratch(out):
        before = listing(out)
        assert clean(superseded) == 2
        assert clean(superseded, "--dry-run") == 2
        assert capsys.readouterr().err.count(f"process {os.getpid()}") == 2
        assert listing(out) == before
    assert clean(superseded) == 0


def test_only_sound_folders_of_curate_are_cleaned(
    superseded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["clean", str(tmp_path)]) == 2
    assert "no cellpair.json in it" in capsys.readouterr().err
    out = superseded / "out"
    (dataset,) = out.glob("datasets/*.json")
    shard_set = out / json.loads(dataset.read_text())["runs"][0]["path"]
    for path in (dataset, out / "dataset.json", shard_set / "artifact.json"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-30])
        before = listing(out)
        assert clean(superseded) == 2
        assert path.name in capsys.readouterr().err
        assert listing(out).keys() == before.keys()
        path.write_bytes(whole)
    assert clean(superseded) == 0


def named_in(out: Path, *names: str) -> set[str]:
    """Files that hold a name in its bytes or path, as it is, in HTML, in JSON or as a slug."""
    spelt = {s for n in names for s in (n, html.escape(n), json.dumps(n)[1:-1], donor_slug(n))}
    return {
        path
        for path, data in contents(out).items()
        if any(s.encode() in data or s in path for s in spelt)
    }


@pytest.mark.parametrize("kind", ["geojson", "csv"])
def test_a_withdrawn_donor_is_found_nowhere_and_others_keep_their_bytes(
    work: Path, runs: Path, kind: str
) -> None:
    out = work / "out"
    gone = (PERSON, IN_FILE, "née Ünal", "Patient 7")
    with (out / "logs" / "curate.log").open("a", encoding="utf-8") as log:
        log.write(f"cores of {IN_FILE} and of D1\n")
    assert named_in(out, *gone) >= {"report/cores.html", "report/one.html", "logs/curate.log"}
    (old,) = out.glob("runs/cores/shards/*")
    shards = {p.name: p.read_bytes() for p in old.glob("cores-D*")}
    assert len(shards) == 4
    truth = pd.read_csv(work / "donors.csv").set_index("cell_id")["donor"]
    of_one = pd.read_csv(runs / "one" / "truth" / "donors.csv")["cell_id"]
    theirs = [*truth.index[truth == IN_FILE], *of_one]
    stages = {path.split("/")[2] for path in naming(out, gone, theirs) if path.startswith("runs/")}
    assert stages == {"registration", "cells", "shards"}

    config = write_config(work, runs, withdraw='"née Ünal", "Patient 7"', kind=kind)
    assert curate(config) == 0
    assert set(json.loads((out / "cellpair.json").read_text())["withdrawn"]) == set(gone)
    dataset, _ = read_dataset(out)
    new = out / dataset.runs[0].path
    assert new != old
    assert {p.name: p.read_bytes() for p in new.glob("cores-*")} == shards
    assert dataset.totals.seen == (truth != IN_FILE).sum()

    assert clean(work) == 0
    assert named_in(out, *gone) == {"cellpair.json"}
    assert naming(out, gone, theirs) == ["cellpair.json"]
    assert {p.parts[-3] for p in out.glob("runs/*/*/*")} == {"cores"}
    for path in out.glob("runs/cores/cells/*/cells.parquet"):
        cell_ids = pq.read_table(path)["cell_id"].to_pylist()
        assert truth[cell_ids].ne(IN_FILE).all()
        index = pq.read_table(next(out.glob("runs/cores/patches/*/index.parquet")))
        assert index.num_rows <= len(cell_ids) == dataset.totals.seen
    assert validate(out) == []
    made = artifacts(out)
    assert curate(config) == 0
    assert artifacts(out) == made
    now = contents(out)
    assert clean(work) == 0
    assert contents(out) == now


def test_when_the_newest_dataset_goes_the_shards_of_others_stay(
    work: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = work / "out"
    of_one = {name for name in artifacts(out) if name.startswith("one/")}
    config = write_config(work, runs, withdraw=f'"{PERSON}"')
    assert curate(config, "--plan") == 0  # which tells the folder whom to forget
    assert clean(work) == 0
    assert "`cellpair curate` makes one without" in capsys.readouterr().out
    assert not (out / "dataset.json").exists()
    assert artifacts(out) == of_one
    assert named_in(out, PERSON, IN_FILE) == {"cellpair.json"}
    before = contents(out)
    assert clean(work) == 0
    assert contents(out) == before
    assert curate(config) == 0
    assert {name for name in artifacts(out) if name.startswith("one/")} == of_one
    assert read_dataset(out)[0].donors == {"D1": "train", "D3": "test", "Patient 7": "train"}


def test_a_run_whose_every_donor_is_withdrawn_is_told(
    work: Path, runs: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config(work, runs, withdraw=f'"{PERSON}", "D1", "D3"')
    assert curate(config, "--plan") == 2
    assert "3 in donors.geojson, all withdrawn" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("D1", "of D1 and", True),
        ("D1", "of D12", False),
        ("Ä 1", "donor 'Ä 1'", True),
        ("a.b", "acb", False),
        ("B", "12 B", False),
        ("B", "donor 'B'", True),
        ("7", "7 cells", False),
        ("7", '{"run":"7"}', True),
        ("B", "<th>B</th>", True),
        ("x<y", "<th>x&lt;y</th>", True),
        ("AB", 'src="data:image/png;base64,x+AB+AB="', False),
    ],
)
def test_texts_name_donors_as_words(name: str, text: str, named: bool) -> None:
    naming = Naming.of([name, "somebody else"])
    assert naming.is_in_page(text) == named
    assert not Naming.of([]).is_in_page(text)


def test_lines_and_keys_that_name_nobody_stay() -> None:
    naming = Naming.of(["D1"])
    assert naming.without_lines(b"a\nof D1\nb\xff\n") == b"a\nb\xff\n"
    assert json.loads(naming.without_keys(b'{"/raw/D1/x|1": "a", "/raw/D2/x|1": "b"}')) == {
        "/raw/D2/x|1": "b"
    }
    for untouched in (b'{"/raw/D2/x|1":"b"}', b"{}"):
        assert naming.without_keys(untouched) == untouched
