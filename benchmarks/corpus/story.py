"""The corpus of a dozen runs: composed, one more, another alias, a donor less."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.corpus.files import facts, naming
from benchmarks.corpus.runs import (
    ALIASES,
    LARGE,
    LATER,
    MEDIUM,
    RENAMED,
    RUNS,
    SMALL,
    VERSIONED,
    cells_of,
    simulate_runs,
    write_config,
)
from benchmarks.registration.limits import Limits
from flows.cli import main
from shards.check import describe, validate
from shards.dataset import read_dataset, read_manifest, read_record
from shards.schema import Dataset
from shards.unions import PanelUnion

ARTIFACTS = "runs/*/*/*/*"
SHARDS = "runs/*/shards/*/*"


class Told(logging.Handler):
    """Warnings, as a person reads them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def n_with(self, words: str) -> int:
        return sum(words in line for line in self.lines)


def corpus(folder: Path, n_cells: int, limits: Limits) -> None:
    """Simulate, curate, change and prove, printing each figure beside what it must be."""
    start_s = time.monotonic()
    simulate_runs(folder, n_cells, [*RUNS, LATER])
    limits.head("corpus of 12 runs")
    limits.told("simulating 13 runs, s", f"{time.monotonic() - start_s:.0f}")
    out = folder / "out"

    told, wall_s = _curated(write_config(folder, RUNS))
    limits.told("curating 12 runs, s", f"{wall_s:.0f}")
    _composed(out, told, limits)
    before, shards = facts(out, ARTIFACTS), facts(out, SHARDS)
    pages = facts(out, *(f"report/{run.id}.html" for run in RUNS))

    told, wall_s = _curated(write_config(folder, RUNS))
    limits.told("again, with nothing to make, s", f"{wall_s:.1f}")
    limits.none("files of artifacts that changed", _changed(before, out), len(before))

    limits.head("a 13th run")
    told, wall_s = _curated(write_config(folder, [*RUNS, LATER]))
    limits.told("curating it, s", f"{wall_s:.0f}")
    limits.none(
        "earlier shards, tables and manifests with another inode, time or hash",
        _changed(shards, out),
        len(shards),
    )
    limits.none("files of earlier artifacts that changed", _changed(before, out), len(before))
    rewritten = [name for name, was in pages.items() if facts(out, name).get(name) != was]
    limits.none("pages of earlier runs written anew", rewritten, len(pages))
    exactly(limits, "warnings that its donor looks like another", told.n_with("PAT-4004"), 1)
    apart, _ = read_dataset(out)
    now = facts(out, ARTIFACTS)
    names = {**ALIASES, "PAT4004": ("PAT-4004",)}
    told, _ = _curated(write_config(folder, [*RUNS, LATER], aliases=names))
    joined, _ = read_dataset(out)
    limits.none("files that the alias changed", _changed(now, out), len(now))
    exactly(limits, "warnings left", told.n_with("PAT-4004"), 0)
    exactly(limits, "split of the 13th run is its donor's", _split(joined, "PAT-4004"), "val")
    exactly(limits, "datasets are two", apart.fingerprint != joined.fingerprint, True)
    limits.none("faults that check finds", validate(out), 1)

    _withdrawn(folder, names, limits)


def exactly(limits: Limits, what: str, found: object, wanted: object) -> None:
    limits.met &= found == wanted
    verdict = "ok" if found == wanted else "NOT MET"
    print(f"| {what} | {found} | = {wanted} | {verdict} |", flush=True)


def _curated(config: Path) -> tuple[Told, float]:
    told = Told()
    log = logging.getLogger("cellpair")
    log.addHandler(told)
    start_s = time.monotonic()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            code = main(["curate", str(config), "--workers", "1"])
    finally:
        log.removeHandler(told)
    assert code == 0, told.lines
    return told, time.monotonic() - start_s


def _changed(before: dict[str, tuple[int, int, str]], out: Path) -> list[str]:
    now = facts(out, ARTIFACTS)
    return [name for name, was in before.items() if now.get(name) != was]


def _split(dataset: Dataset, donor: str) -> str | None:
    return dataset.donors.get(donor)


def _composed(out: Path, told: Told, limits: Limits) -> None:
    dataset, _ = read_dataset(out)
    told_of_it = describe(out)
    canonical = {dataset.canonical(donor) for donor in dataset.donors}
    exactly(limits, "runs", len(dataset.runs), 12)
    exactly(limits, "donors, by canonical names", len(canonical), 7)
    sizes = sorted(told_of_it["genes"].values())
    exactly(limits, "genes of the panels", sizes, [SMALL, MEDIUM, LARGE])
    exactly(
        limits,
        "genes of the unions, by species",
        told_of_it["unions"],
        {"human": LARGE, "mouse": MEDIUM},
    )
    for species, path in dataset.unions.items():
        union = read_record(out / path, PanelUnion)
        measured = sorted(len(set(places)) for places in union.places.values())
        wanted = [SMALL, LARGE] if species == "human" else [MEDIUM]
        exactly(limits, f"genes measured of the {species} union", measured, wanted)
    names = " ".join(told_of_it["gene_names"])
    exactly(
        limits,
        "genes of other names told: the renamed one as gene and as symbol",
        (len(told_of_it["gene_names"]), RENAMED[0] in names, VERSIONED[0] in names),
        (2, True, False),
    )
    exactly(limits, "warnings of them", told.n_with("panels name 2 genes differently"), 1)
    exactly(limits, "held out", told_of_it["held_out"], {"PAT2002": ["TENX95"]})
    splits = {donor: _split(dataset, donor) for donor in sorted(dataset.donors)}
    wanted_splits = {
        "MUS1001": "train",
        "MUS2002": "test",
        "PAT1001 left": "train",
        "PAT1001 right": "train",
        "PAT2002": "test",
        "PAT3003": "train",
        "PAT4004": "val",
        "PAT5005": splits["PAT5005"],
    }
    exactly(limits, "splits", splits, wanted_splits)
    limits.told("of the one that its hash sends", str(splits["PAT5005"]))
    limits.none("faults that check finds", validate(out), 1)


def _withdrawn(folder: Path, names: dict[str, tuple[str, ...]], limits: Limits) -> None:
    limits.head("a donor withdrawn: a core of the microarray, and two runs")
    out, runs = folder / "out", [*RUNS, LATER]
    gone = ("PAT4004", "PAT-4004")
    cell_ids = [c for run in runs for donor in gone for c in cells_of(folder, run, donor)]
    held = naming(out, gone, cell_ids)
    limits.line("files that held them before", len(held), "≥", 20)
    stages = {name.split("/")[2] for name in held if name.startswith("runs/")}
    # Patches lie by row and name nobody: those are told below, by how many there are.
    exactly(limits, "in stages", sorted(stages), ["cells", "registration", "shards"])
    others = _shards_of_others(out, gone)
    config = write_config(folder, runs, aliases=names, withdraw=["PAT4004"])
    _, wall_s = _curated(config)
    limits.told("curating without them, s", f"{wall_s:.0f}")
    start_s = time.monotonic()
    with redirect_stdout(io.StringIO()) as said:
        code = main(["clean", str(out)])
    limits.told("clean, s", f"{time.monotonic() - start_s:.1f}")
    limits.told("it says", said.getvalue().splitlines()[-1])
    exactly(limits, "exit code of clean", code, 0)
    # The file that says whom the folder must not hold has to name them.
    left = [name for name in naming(out, gone, cell_ids) if name != "cellpair.json"]
    limits.none("files of any stage that hold them or their cells", left, len(held))
    theirs = [run.id for run in runs if run.donor in gone]
    there = [run for run in theirs if (out / "runs" / run).exists()]
    limits.none("folders of their own runs", there, len(theirs))
    of_others = [c for d in ("PAT3003", "PAT5005") for c in cells_of(folder, RUNS[6], d)]
    rows = [pq.read_metadata(p).num_rows for p in out.glob("runs/tma/patches/*/index.parquet")]
    exactly(limits, "patches of the microarray, for cells of others", rows, [len(of_others)])
    after = _shards_of_others(out, gone)
    limits.none(
        "shards and tables of other donors with other bytes",
        [name for name, sha256 in others.items() if after.get(name) != sha256],
        len(others),
    )
    limits.none("faults that check finds", validate(out), 1)


def _shards_of_others(out: Path, gone: Sequence[str]) -> dict[str, str]:
    """SHA-256 by the names of files, whatever the folder of their shard set."""
    dataset, _ = read_dataset(out)
    found = {}
    for run in dataset.runs:
        for shard in read_manifest(out / run.path).shards:
            if shard.donor not in gone:
                for suffix in (".tar", ".parquet"):
                    name = f"{run.path}/{shard.name}{suffix}"
                    found[f"{shard.name}{suffix}"] = facts(out, name)[name][2]
    return found
