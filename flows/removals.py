"""What `cellpair clean` removes, found by looking: nothing is changed here."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from flows.history import HISTORY_FILE
from flows.log import LOGS_FOLDER
from flows.naming import Naming
from flows.scratch import dead_folders
from shards.artifact import RECORD_FILE, ArtifactRecord, read_artifact
from shards.dataset import POINTER_FILE, read_record
from shards.schema import Dataset, DatasetPointer

REPORT_FOLDER = "report"
HASHES_FILE = "content-hashes.json"
_ROW_SUFFIX = ".row.json"  # of what is kept of a run beside its page
_STATE_FILE = ".says"  # while it is there, `curate` takes the pages for written

_ARTIFACT = re.compile(r"[0-9a-f]{20}")
_BESIDE = re.compile(r"\.[0-9a-f]{20}\.(lock|blocks|\d+\.partial|(damaged|late|gone)-[0-9a-f]+)")
_ASIDE = re.compile(r"\..+\.[0-9a-f]{8}\.partial")  # of `written_aside`
_UNFINISHED = "unfinished work"
_WITHDRAWN = "holds a withdrawn donor"
_WHY_BESIDE = {
    "lock": "lock of a process that is gone",
    "damaged": "damaged artifact",
    "late": "half removed",
    "gone": "half removed",
}


@dataclass(frozen=True, slots=True)
class Removal:
    """A file or folder that goes, and why; of a text that loses lines, the `rest` that stays."""

    path: Path
    why: str
    n_bytes: int
    rest: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    """The datasets by file, the newest of them, and the records of the whole shard sets.

    `tainted` shard sets are of cells of which some have a withdrawn donor; `bad` datasets hold one.
    """

    datasets: dict[Path, Dataset]
    newest: Path | None
    shard_sets: dict[Path, ArtifactRecord]
    tainted: set[Path]
    bad: set[Path]


def plan_removals(out: Path, withdrawn: Collection[str]) -> list[Removal]:
    """What goes, in the order in which it must.

    Raises BadInput where a dataset, or what one points to, can't be read.
    """
    found = _look(out, set(withdrawn))
    good = {path: dataset for path, dataset in found.datasets.items() if path not in found.bad}
    roots = {out / run.path for dataset in good.values() for run in dataset.runs}
    if found.newest not in good:
        # There is none yet, or it goes: of which shard sets the next one is made nobody says.
        roots |= found.shard_sets.keys() - found.tainted
    kept = _with_parents(roots)
    kept_runs = set(map(_run_of, roots))
    artifacts = [p for p in sorted(out.glob("runs/*/*/*")) if _ARTIFACT.fullmatch(p.name)]
    panels = {
        out / path
        for dataset in good.values()
        for path in (*dataset.panels.values(), *dataset.unions.values())
    }
    of_one_donor = {_run_of(p) for p in found.tainted if found.shard_sets[p].config.get("donor")}
    naming = Naming.of(withdrawn)
    return [
        *_pages(out, {p.name for p in out.glob("runs/*")} - kept_runs, naming),
        *_texts(out, of_one_donor - kept_runs, naming),
        *([_whole(out / POINTER_FILE, _WITHDRAWN)] if found.newest in found.bad else []),
        *(_whole(path, _WITHDRAWN) for path in sorted(found.bad)),
        *(
            _whole(path, _WITHDRAWN if path in found.tainted else "no dataset points to it")
            for path in artifacts
            if path not in kept
        ),
        *(
            _whole(path, "no dataset names it")
            for path in sorted((*out.glob("panels/panel-*.json"), *out.glob("panels/union-*.json")))
            if path not in panels
        ),
        *_leftovers(out),
    ]


def _look(out: Path, withdrawn: set[str]) -> _Found:
    files = sorted(out.glob("datasets/[!.]*.json"))
    datasets = {path: read_record(path, Dataset) for path in files}
    newest = None
    if (out / POINTER_FILE).exists():
        newest = out / read_record(out / POINTER_FILE, DatasetPointer).dataset
        read_record(newest, Dataset)
    shard_sets = dict(_records(sorted(out.glob("runs/*/shards/*"))))
    tainted = {path for path, record in shard_sets.items() if withdrawn & _donors_of(record)}
    bad = {
        path
        for path, dataset in datasets.items()
        if withdrawn & {*dataset.donors, *dataset.aliases.values()}
        or tainted & {out / run.path for run in dataset.runs}
    }
    return _Found(datasets, newest, shard_sets, tainted, bad)


def _records(folders: Iterable[Path]) -> Iterator[tuple[Path, ArtifactRecord]]:
    """Of the artifacts that are whole; what a dataset points to is read again, and must be."""
    for folder in folders:
        if _ARTIFACT.fullmatch(folder.name):
            try:
                record = read_artifact(folder)
            except ValidationError:
                continue
            if record is not None:
                yield folder, record


def _donors_of(shards: ArtifactRecord) -> set[str]:
    """The donors of a shard set's cells, those without a pair too."""
    return {str(shards.config.get("donor")), *shards.summary.get("n_cells_of_donor", ())}


def _with_parents(roots: set[Path]) -> set[Path]:
    """These shard sets, and what they were made from as far as it is there."""
    kept: set[Path] = set()
    left = sorted(roots)
    while left:
        folder = left.pop()
        if folder not in kept and (folder in roots or folder.exists()):
            kept.add(folder)
            record = read_record(folder / RECORD_FILE, ArtifactRecord)
            run = folder.parent.parent
            left += [run / stage / fingerprint for stage, fingerprint in record.parents.items()]
    return kept


def _pages(out: Path, strays: set[str], naming: Naming) -> Iterator[Removal]:
    """Pages of runs that are in no dataset, and those that name a withdrawn donor."""
    pages = [
        page
        for page in sorted(out.glob(f"{REPORT_FOLDER}/*.html"))
        if page.stem in strays or naming.is_in_page(page.read_text(encoding="utf-8"))
    ]
    state = out / REPORT_FOLDER / _STATE_FILE
    if pages and state.exists():
        yield _whole(state, "lets `curate` write the pages anew")
    for page in pages:
        yield _whole(page, "of no dataset" if page.stem in strays else "names a withdrawn donor")
    left = set(out.glob(f"{REPORT_FOLDER}/*.html")).difference(pages)
    for row in sorted(out.glob(f"{REPORT_FOLDER}/.*{_ROW_SUFFIX}")):
        if row.with_name(f"{row.name[1:].removesuffix(_ROW_SUFFIX)}.html") not in left:
            yield _whole(row, "of a page that is not there")


def _texts(out: Path, gone_runs: set[str], naming: Naming) -> Iterator[Removal]:
    """Logs of runs whose only donor is withdrawn; of the other texts, the lines that name one."""
    for path in sorted(out.glob(f"{LOGS_FOLDER}/*.log")):
        if path.stem in gone_runs:
            yield _whole(path, "of a withdrawn donor")
        else:
            yield from _without(path, naming.without_lines)
    yield from _without(out / HISTORY_FILE, naming.without_lines)
    yield from _without(out / HASHES_FILE, naming.without_keys)


def _without(path: Path, rest_of: Callable[[bytes], bytes]) -> Iterator[Removal]:
    if path.exists():
        data = path.read_bytes()
        rest = rest_of(data)
        if rest != data:
            yield Removal(path, "name a withdrawn donor", len(data) - len(rest), rest)


def _leftovers(out: Path) -> Iterator[Removal]:
    """What killed processes left."""
    for path in sorted(out.glob("runs/*/*/.*")):
        if told := _BESIDE.fullmatch(path.name):
            yield _whole(path, _WHY_BESIDE.get(told[1].partition("-")[0], _UNFINISHED))
    for folder in (out, *out.glob("*"), *out.glob("runs/*"), *out.glob("runs/*/*")):
        for path in sorted(folder.glob(".*.partial")):
            if _ASIDE.fullmatch(path.name) and path.is_file():
                yield _whole(path, _UNFINISHED)
    for path in dead_folders(out):
        yield _whole(path, "temporary folder of a process that is gone")


def _whole(path: Path, why: str) -> Removal:
    files = [path]
    if path.is_dir() and not path.is_symlink():
        files = [p for p in path.rglob("*") if p.is_file()]
    return Removal(path, why, sum(p.lstat().st_size for p in files))


def _run_of(artifact: Path) -> str:
    return artifact.parent.parent.name
