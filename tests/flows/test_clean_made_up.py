"""`cellpair clean` on made-up folders: whatever lies there, datasets stay sound, the rest goes."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.clean import clean
from flows.outfolder import LOCK_FOLDER, claim_out
from shards.artifact import Identity, build_artifact, write_atomically
from shards.check import validate
from shards.dataset import dataset_path, publish_dataset, read_dataset
from shards.lock import this_process
from shards.schema import Dataset, Split
from tests.shards.tiny import write_tiny_dataset

DONORS: dict[str, Split] = {"D1": "train", "D2": "train", "D3": "test"}
FP = "0123456789abcdef0123"

State = dict[str, tuple[int, int, bytes]]


def state(out: Path) -> State:
    """Every file below a folder: inode, time of change, content."""
    return {
        str(p.relative_to(out)): (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes())
        for p in sorted(out.rglob("*"))
        if p.is_file()
    }


def tree(out: Path) -> dict[str, bytes | None]:
    """Every file with its content, and every folder."""
    return {
        str(p.relative_to(out)): p.read_bytes() if p.is_file() else None for p in out.rglob("*")
    }


def dataset_of(full: Dataset, donors: set[str]) -> Dataset:
    """The part of a dataset that is of these donors; a run has one donor each."""
    runs = [run for run, donor in zip(full.runs, full.donors, strict=True) if donor in donors]
    paths = tuple(f"{run.path}/" for run in runs)
    return Dataset.of(
        full.name,
        runs,
        full.panels,
        {d: s for d, s in full.donors.items() if d in donors},
        {s: tuple(n for n in ns if n.startswith(paths)) for s, ns in full.shards.items()},
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "out"
    claim_out(out, "tiny", ())
    write_tiny_dataset(out, DONORS, n_per_donor=4, max_samples=3)
    for run in ("run0", "run1", "run2"):
        write_atomically(out / "report" / f"{run}.html", b"<p>a page</p>")
        write_atomically(out / "logs" / f"{run}.log", b"a line\n")
    write_atomically(out / "report" / "index.html", b"<p>the index</p>")
    return out


@pytest.fixture
def out(tiny: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny, tmp_path / "out")
    return tmp_path / "out"


def add_artifact(out: Path, run: str, stage: str, **parents: str) -> str:
    """An artifact that nothing points to; returns its fingerprint."""

    def make(folder: Path, blocks: Path) -> dict[str, str]:
        (folder / "data").write_bytes(bytes(1000))
        return {}

    identity = Identity(stage=stage, stage_version=1, config={}, parents=parents, inputs={})
    folder, *_ = build_artifact(
        out / "runs" / run / stage, identity, make, provenance={}, check_inputs=lambda: None
    )
    return folder.name


def leave_everything(out: Path) -> None:
    """All that processes which were killed, and stages that were superseded, can leave."""
    stage = out / "runs" / "run0" / "patches"
    for name in ("7.partial", "blocks", "damaged-12ab34cd", "late-12ab34cd", "gone-12ab34cd"):
        write_atomically(stage / f".{FP}.{name}" / "part.jpgs", bytes(500))
    dead = this_process().model_copy(update={"pid": 2**22 + 1}).model_dump_json().encode()
    write_atomically(stage / f".{FP}.lock" / "000001.json", dead)
    write_atomically(out / ".scratch" / "4194305-abc" / "owner.json", dead)
    add_artifact(out, "run0", "patches")
    add_artifact(out, "never finished", "registration")
    write_atomically(out / "panels" / "panel-0000.json", b"{}")
    write_atomically(out / "report" / "never finished.html", b"<p>a page</p>")
    for folder in (out, out / "datasets", out / "panels", out / "report", stage):
        (folder / ".dataset.json.0a1b2c3d.partial").write_bytes(b"{")


def test_a_sound_folder_stays_as_it_is(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state(out)
    assert clean(out, dry_run=False) == 0
    assert state(out) == before
    assert capsys.readouterr().out == "removed 0 B in all\n"


def test_what_a_dataset_was_made_of_stays(out: Path) -> None:
    registration = add_artifact(out, "run0", "registration")
    cells = add_artifact(out, "run0", "cells", registration=registration)
    shards = add_artifact(out, "run0", "shards", cells=cells)
    full, _ = read_dataset(out)
    run = full.runs[0].model_copy(
        update={"path": f"runs/run0/shards/{shards}", "fingerprint": shards}
    )
    older = Dataset.of("older", [run], full.panels, {"D1": "train"}, {})
    path = out / dataset_path(older.fingerprint)
    write_atomically(path, older.model_dump_json(indent=1).encode())
    before = state(out)
    clean(out, dry_run=False)
    assert state(out) == before
    path.unlink()
    clean(out, dry_run=False)
    assert {p.name for p in (out / "runs" / "run0").iterdir()} == {"shards"}
    assert validate(out) == []


def test_files_of_others_stay(out: Path) -> None:
    for name in ("notes.txt", "runs/notes.txt", "runs/run0/notes.txt", "runs/run0/shards/old"):
        (out / name).write_text("mine")
    (out / "model").mkdir()
    (out / "model" / "last.ckpt").touch()
    before = state(out)
    clean(out, dry_run=False)
    assert state(out) == before


def test_a_link_goes_and_what_it_names_stays(out: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    (out / "runs" / "run0" / "patches").mkdir()
    (out / "runs" / "run0" / "patches" / FP).symlink_to(elsewhere)
    (out / "runs" / "run0" / "patches" / f".{FP}.blocks").symlink_to(elsewhere)
    assert clean(out, dry_run=False) == 0
    assert not (out / "runs" / "run0" / "patches").exists()
    assert (elsewhere / "precious").exists()


def test_aliases_of_an_older_dataset_name_the_person_too(out: Path) -> None:
    full, _ = read_dataset(out)
    older = Dataset.of(
        "older", full.runs, full.panels, full.donors, full.shards, {"D3": "patient 7"}
    )
    write_atomically(
        out / dataset_path(older.fingerprint), older.model_dump_json(indent=1).encode()
    )
    publish_dataset(out, dataset_of(full, {"D1"}))
    claim_out(out, "tiny", ("patient 7",))
    assert clean(out, dry_run=False) == 0
    assert not (out / dataset_path(older.fingerprint)).exists()


def test_pages_logs_and_history_lose_the_donor(out: Path) -> None:
    full, _ = read_dataset(out)
    publish_dataset(out, dataset_of(full, {"D1", "D2"}))
    pages = {
        "run0": b"<th>D3</th>",
        "run1": b'<td>D30</td><img src="data:image/png;base64,D3/D3+D3=">',
    }
    for run, page in pages.items():
        write_atomically(out / "report" / f"{run}.html", page)
    write_atomically(out / "logs" / "curate.log", "a line\nno pair of donor 'D3'\nµ\n".encode())
    write_atomically(out / "history.jsonl", b'{"run":"D3"}\n{"run":"r1"}\n')
    write_atomically(out / "content-hashes.json", b'{"/raw/D3/he.tif|1|2":"ab","/raw/x|1|2":"cd"}')
    claim_out(out, "tiny", ("D3",))
    assert clean(out, dry_run=False) == 0
    assert sorted(p.name for p in (out / "report").iterdir()) == ["index.html", "run1.html"]
    assert sorted(p.name for p in (out / "logs").iterdir()) == [
        "curate.log",
        "run0.log",
        "run1.log",
    ]
    assert (out / "logs" / "curate.log").read_text("utf-8") == "a line\nµ\n"
    assert (out / "history.jsonl").read_bytes() == b'{"run":"r1"}\n'
    assert b"D3" not in (out / "content-hashes.json").read_bytes()
    before = state(out)
    assert clean(out, dry_run=False) == 0
    assert state(out) == before


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    older=st.lists(st.sets(st.sampled_from(sorted(DONORS)), min_size=1), max_size=3),
    newest=st.sets(st.sampled_from(sorted(DONORS)), min_size=1),
    withdrawn=st.sets(st.sampled_from(sorted(DONORS))),
    littered=st.booleans(),
)
def test_after_it_every_dataset_is_sound_and_holds_nobody_withdrawn(
    tiny: Path,
    tmp_path_factory: pytest.TempPathFactory,
    older: list[set[str]],
    newest: set[str],
    withdrawn: set[str],
    littered: bool,
) -> None:
    out = tmp_path_factory.mktemp("made up") / "out"
    shutil.copytree(tiny, out)
    full, _ = read_dataset(out)
    (out / dataset_path(full.fingerprint)).unlink()
    datasets = [dataset_of(full, donors) for donors in (*older, newest)]
    for dataset in datasets:
        publish_dataset(out, dataset)
    claim_out(out, "tiny", tuple(sorted(withdrawn)))
    if littered:
        leave_everything(out)
    assert clean(out, dry_run=False) == 0

    want = {dataset_path(d.fingerprint) for d in datasets if not withdrawn & d.donors.keys()}
    assert {f"datasets/{p.name}" for p in (out / "datasets").iterdir()} == want
    for name in want:
        assert validate(out / name) == []
    assert not list(out.rglob("*.partial"))
    assert not (out / ".scratch").exists()
    assert (out / "dataset.json").exists() == (not withdrawn & newest)
    for table in out.rglob("*.parquet"):
        assert withdrawn.isdisjoint(pq.read_table(table)["donor"].to_pylist())
    held = {donor for d in datasets if dataset_path(d.fingerprint) in want for donor in d.donors}
    runs = {p.name for p in (out / "runs").iterdir()}
    assert {f"run{sorted(DONORS).index(donor)}" for donor in held} <= runs
    before = state(out)
    assert clean(out, dry_run=False) == 0
    assert state(out) == before


def test_two_at_once_do_what_one_does(out: Path, tmp_path: Path) -> None:
    leave_everything(out)
    shutil.copytree(out, tmp_path / "alone")
    clean(tmp_path / "alone", dry_run=False)
    with ThreadPoolExecutor(3) as pool:
        codes = list(pool.map(lambda _: clean(out, dry_run=False), range(3)))
    assert codes == [0, 0, 0]
    assert tree(out) == tree(tmp_path / "alone")
    assert not (out / LOCK_FOLDER).exists()
