"""What a curation says of itself beside its pages: Markdown for each run and for the whole."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

from flows.config import CurateConfig
from flows.local import INDEX_FILE, REPORT_FOLDER
from flows.pipeline import Curated, CuratedRun
from pairing.registration.record import judged, read_registration
from shards.schema import Dataset

_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_NO_KEY = re.compile(r"[^a-z0-9]+")


def n_stages(config: CurateConfig) -> int:
    """How many stages a curation of all runs of the config has."""
    with_nuclei = config.segmentation.model != "none"
    return sum(3 + (run.slide is not None) * (1 + with_nuclei) for run in config.active_runs)


def artifact_key(run: str) -> str:
    """`qc-<run>` of lower-case letters, digits and dashes, as the server asks for.

    A run that is not written so already gets 8 hex digits of its hash too, lest two meet.
    """
    slug = _NO_KEY.sub("-", run.lower()).strip("-")
    if slug != run:
        slug = f"{slug}-{hashlib.sha256(run.encode()).hexdigest()[:8]}".lstrip("-")
    return f"qc-{slug}"


def run_markdown(config: CurateConfig, run: CuratedRun) -> str:
    """Totals, verdict, drops and stages of a curated run, and where its page is."""
    shards = run.built["shards"].summary
    return _document(
        run.config.id,
        _verdict(config, run),
        _totals(shards["seen"], shards["kept"], shards["dropped"], shards["noted"]),
        _table(
            ("stage", "", "fingerprint"),
            [
                (stage, "reused" if built.reused else "made", built.fingerprint)
                for stage, built in run.built.items()
            ],
        ),
        _link("report", config.out / REPORT_FOLDER / f"{run.config.id}.html"),
    )


def failure_markdown(run: str, error: Exception) -> str:
    """Why a run failed, in its own words."""
    return _document(run, "Failed:", *(escaped(line.strip()) for line in str(error).splitlines()))


def dataset_markdown(config: CurateConfig, curated: Curated) -> str:
    """Totals of the dataset, by run, and where its page is; or that none was published."""
    failed = [f"{escaped(run)} failed" for run in curated.failures]
    link = _link("report", config.out / REPORT_FOLDER / INDEX_FILE)
    if curated.dataset is None:
        words = "No dataset was published; what was there before is unchanged."
        return _document(config.name, words, *failed, link)
    totals = curated.dataset.totals
    return _document(
        config.name,
        f"Dataset {curated.dataset.fingerprint}",
        *failed,
        _totals(totals.seen, totals.kept, totals.dropped, totals.noted),
        _runs(curated.dataset),
        link,
    )


def escaped(text: str) -> str:
    """The text on one line, with nothing in it that Markdown or HTML would take for its own."""
    line = "".join(
        " " if unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp") else letter
        for letter in text
    )
    return _PUNCTUATION.sub(r"\\\1", line)


def _document(title: str, *paragraphs: str) -> str:
    return "\n\n".join([f"# {escaped(title)}", *paragraphs]) + "\n"


def _verdict(config: CurateConfig, run: CuratedRun) -> str:
    if "registration" not in run.built:
        return "Patches of the morphology image: no registration to judge."
    record, _ = read_registration(run.built["registration"].folder)
    registration = judged(record, config.registration.max_median_error_um)
    reasons = "".join(f"\n- {escaped(reason)}" for reason in registration.reasons)
    return f"Registration: **{escaped(registration.verdict)}**{reasons}"


def _totals(seen: int, kept: int, dropped: Mapping[str, int], noted: Mapping[str, int]) -> str:
    rows = [("seen", seen), ("kept", kept)]
    rows += [(f"dropped: {reason}", n) for reason, n in dropped.items() if n]
    rows += [(f"noted: {what}", n) for what, n in noted.items() if n]
    return _table(("cells", "number"), rows)


def _runs(dataset: Dataset) -> str:
    return _table(
        ("run", "seen", "kept"),
        [(run.run, run.totals.seen, run.totals.kept) for run in dataset.runs],
    )


def _table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [header, ("---",) * len(header)]
    lines += [tuple(escaped(str(cell)) for cell in row) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _link(name: str, page: Path) -> str:
    # Most viewers refuse to lead from a server to a file: its path is there to copy.
    return f"[{name}]({page.as_uri()}): {escaped(str(page))}"
