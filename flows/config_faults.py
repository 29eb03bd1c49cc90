"""Every fault of a `curate` config, found on the tables as a person wrote them.

A record refuses a table at its first layer of faults; here the layers behind it are looked at too,
so that one reading tells all. Tables may hold anything: what is not of its kind is told by the
record, and passed over here.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.hold_out import contradictions, held_out_donors, unknown_names
from flows.split import SplitSection, split_faults
from pairing.annotations import CSV_SUFFIX, GEOJSON_SUFFIXES
from shards.errors import BadInput
from shards.remote import is_url, remote_path

# Keys of a run that name files or folders.
RUN_FILES = ("xenium", "slide", "alignment", "donors", "labels")

# A value that no config takes, where `cellpair init` can't tell one: { TODO = "what it is" }.
MARK = "TODO"

# What a person reads in place of the words of the library.
_EXPECTED = {"string_pattern_mismatch": "letters, digits, _ and - only"}


def at(path: Path, *keys: object) -> str:
    """Where a fault lies: the file, and the key in dots."""
    return f"{path}: {'.'.join(map(str, keys))}" if keys else str(path)


def tables_of(raw: Mapping[str, Any], key: str) -> list[tuple[int, dict[str, Any]]]:
    """The tables of an array of tables, with their places."""
    listed = raw.get(key)
    listed = listed if isinstance(listed, list) else []
    return [(i, table) for i, table in enumerate(listed) if isinstance(table, dict)]


def url_faults(path: Path, raw: Mapping[str, Any]) -> Iterator[BadInput]:
    """URLs that hold credentials or are of no known kind, and an output inside an input."""
    out = raw.get("out")
    tables: list[tuple[tuple[object, ...], str, Any]] = [((), "out", out)]
    for i, run in tables_of(raw, "runs"):
        tables += [(("runs", i), key, run.get(key)) for key in RUN_FILES]
    for loc, key, given in tables:
        if isinstance(given, str) and is_url(given):
            where = at(path, *loc, key)
            try:
                remote = remote_path(given)
            except BadInput as fault:
                yield BadInput(
                    where,
                    expected=fault.expected,
                    found=f"{fault.found}: {fault.where}",
                    remedy=fault.remedy,
                )
                continue
            if key != "out" and isinstance(out, str) and f"{out}/".startswith(f"{remote}/"):
                yield BadInput(
                    at(path, "out"),
                    expected="a URL outside of the inputs, which are only read",
                    found=f"one in {key} of run {i}",
                    remedy="give another URL",
                )


def run_faults(run: Mapping[str, Any]) -> Iterator[str]:
    """What the keys of one `[[runs]]` say against each other, in words."""
    has = {key for key, value in run.items() if value is not None}
    if ("slide" in has) == ("image" in has):
        yield 'give either slide = "…" or image = "morphology"'
    elif "slide" in has and "alignment" not in has:
        yield (
            "alignment is missing: give the 10x matrix csv or the keypoints csv that Xenium "
            'Explorer exports for this slide, or "auto"'
        )
    elif "image" in has and has & {"alignment", "mpp"}:
        yield 'image = "morphology" needs neither alignment nor mpp'
    if ("donor" in has) == ("donors" in has):
        yield (
            'give either donor = "…" or, for a run with several, donors = "….geojson" or '
            'donors = "….csv"'
        )
    files = (*GEOJSON_SUFFIXES, CSV_SUFFIX)
    donor = run.get("donor")
    if isinstance(donor, str) and donor.lower().endswith(files):
        yield f"donor = {donor!r} is the name of a file: write donors for several donors"
    for key, suffixes in (("donors", files), ("labels", (CSV_SUFFIX,))):
        path = run.get(key)
        if isinstance(path, str | Path) and Path(path).suffix.lower() not in suffixes:
            yield f"{key} = {Path(path).name!r} does not end in {' or '.join(suffixes)}"


def cells_faults(raw: Mapping[str, Any]) -> Iterator[str]:
    """What `[cells]` says against the other tables of the config, in words."""
    sections = {key: raw.get(key) for key in ("cells", "segmentation", "patch")}
    cells, segmentation, patch = (
        section if isinstance(section, dict) else {} for section in sections.values()
    )
    if cells.get("unit") != "he_nuclei":
        return
    if segmentation.get("model") == "none":
        yield 'unit = "he_nuclei" counts for nuclei that segmentation.model = "none" does not find'
    if patch.get("center") == "cell":
        yield 'unit = "he_nuclei" centres patches on nuclei: patch.center = "cell" has no meaning'
    for _, run in tables_of(raw, "runs"):
        if run.get("image") is not None:
            yield (
                f'unit = "he_nuclei" counts for nuclei of a slide: run {run.get("id")} has '
                'image = "morphology"'
            )
        donors = run.get("donors")
        if isinstance(donors, str | Path) and Path(donors).suffix.lower() == CSV_SUFFIX:
            yield (
                f'unit = "he_nuclei" has other cells than those that {Path(donors).name} of run '
                f'{run.get("id")} names: give its donors as polygons, donors = "….geojson"'
            )


def runs_faults(runs: Any, out: Any, split: Any) -> Iterator[str]:
    """What the runs say against each other, the folder to write to and `[split]`, in words.

    `runs` are tables of `[[runs]]`, `out` an absolute path, `split` a table.
    """
    tables = [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []
    if runs == []:
        yield "there is no [[runs]]"
    ids = Counter(run["id"] for run in tables if isinstance(run.get("id"), str))
    twice = [run for run, n in ids.items() if n > 1]
    if twice:
        yield f"run ids are used twice: {', '.join(twice)}"
    for run in tables:
        bundle, paths = run.get("xenium"), str | Path
        if not isinstance(out, paths) or not isinstance(bundle, paths):
            continue
        if Path(bundle) in (Path(out), *Path(out).parents):  # what is written would be read
            yield f"out lies in the bundle of run {run.get('id')}: give another folder"
    yield from _hold_out_faults(tables, split)
    if tables and all(is_withdrawn(run, split) for run in tables):
        yield "split.withdraw leaves no run: name fewer donors, or `cellpair clean` the folder"


def _hold_out_faults(runs: list[dict[str, Any]], split: Any) -> Iterator[str]:
    """Misspelt names, and donors that are assigned elsewhere; donors by file are not read here."""
    try:
        section = SplitSection.model_validate(split)
    except ValidationError:
        return
    samples = [
        (run.get("source_id"), [donor] if isinstance(donor := run.get("donor"), str) else [])
        for run in runs
        if isinstance(run.get("source_id"), str | None)
    ]
    misspelt, _ = unknown_names(section.hold_out, [s for s, _ in samples if s is not None])
    for name, known in misspelt.items():
        yield f"split.hold_out: {name!r} is neither a list nor a source_id: did you mean {known!r}?"
    yield from contradictions(held_out_donors(samples, section), section)


def is_withdrawn(run: Mapping[str, Any], split: Any) -> bool:
    """Whether the one donor of a run must go; nothing is withdrawn by a section with faults."""
    try:
        section = SplitSection.model_validate(split)
    except ValidationError:
        return False
    donor = run.get("donor")
    return isinstance(donor, str) and section.is_withdrawn(donor)


def missing_inputs(path: Path, raw: Mapping[str, Any]) -> Iterator[BadInput]:
    """Files and folders of the runs, and of the model, that are not there or not of their kind.

    Inputs of withdrawn donors are not looked for: they may have gone already.
    """
    segmentation = raw.get("segmentation")
    model = segmentation.get("model") if isinstance(segmentation, dict) else None
    if isinstance(model, str) and Path(model).is_absolute():
        yield from _wrong_path(at(path, "segmentation.model"), model, "file")
    for i, run in tables_of(raw, "runs"):
        if is_withdrawn(run, raw.get("split", {})):
            continue
        for key in RUN_FILES:
            given = run.get(key)
            if isinstance(given, str) and not (key == "alignment" and given == "auto"):
                kind = "file or folder" if key == "xenium" else "file"
                yield from _wrong_path(at(path, "runs", i, key), given, kind)


def _wrong_path(where: str, given: str, kind: str) -> Iterator[BadInput]:
    remedy = "mend the path; relative paths start at the config's folder"
    if is_url(given):
        yield from _wrong_url(where, given, kind)
        return
    try:
        mode = os.stat(given).st_mode
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            found = f"nothing at {given}"
        else:
            found = f"{error.strerror if isinstance(error, OSError) else error}: {given}"
    else:
        if stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and kind != "file"):
            return
        found = f"{'a folder' if stat.S_ISDIR(mode) else 'neither file nor folder'}: {given}"
    yield BadInput(where, expected=f"an existing {kind}", found=found, remedy=remedy)


def _wrong_url(where: str, given: str, kind: str) -> Iterator[BadInput]:
    try:
        remote = remote_path(given)
        there = remote.is_file() or (kind != "file" and remote.is_dir())
        found = f"nothing at {given}"
    except PermissionError as error:
        there, found = False, f"{error.strerror}: {given}"
    except BadInput:
        return  # told by `url_faults`
    if not there:
        remedy = "mend the URL, or the rights of the credentials"
        yield BadInput(where, expected=f"an existing {kind}", found=found, remedy=remedy)


def faults_of_records(
    path: Path, error: ValidationError, raw: Mapping[str, Any], keys: Mapping[str, Iterable[str]]
) -> Iterator[BadInput]:
    """What the records refuse, and what they would refuse next.

    `keys` are the known keys of each section, those of the top under "".
    """
    for fault in error.errors():
        # Of a key with several kinds of values, each kind has its fault, a step further down.
        loc = fault["loc"][:3] if fault["loc"][:1] == ("runs",) else fault["loc"]
        match fault["type"]:
            case "keys_together":
                continue  # found below, whether or not the record came as far
            case "extra_forbidden":
                words = ("a key of the interface", "an unknown key", _nearest(loc, keys))
            case "missing":
                words = ("a value, since nothing can stand for it", "no such key", "give it")
            case _ if isinstance(todo := fault["input"], dict) and list(todo) == [MARK]:
                words = (str(todo[MARK]), f"a mark, {MARK}", "write it in place of the mark")
            case kind:
                expected = _EXPECTED.get(kind, fault["msg"].removeprefix("Input should be "))
                words = (expected, _short(fault["input"]), "mend the value")
        yield BadInput(at(path, *loc), expected=words[0], found=words[1], remedy=words[2])
    split = raw.get("split", {})
    together = [
        ((), runs_faults(raw.get("runs"), raw.get("out"), split)),
        (("cells", "unit"), cells_faults(raw)),
        (("split",), split_faults(split) if isinstance(split, dict) else ()),
        *((("runs", i), run_faults(run)) for i, run in tables_of(raw, "runs")),
    ]
    for loc, faults in together:
        if found := "; ".join(faults):
            expected = "keys that go together"
            yield BadInput(at(path, *loc), expected=expected, found=found, remedy="mend them")


def _nearest(loc: tuple[int | str, ...], keys: Mapping[str, Iterable[str]]) -> str:
    key, section = str(loc[-1]), str(loc[0]) if len(loc) > 1 else ""
    for name in (section, *keys):
        known = list(keys.get(name, ()))
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6 if name == section else 1.0)
        if near:
            place = "" if name == section else f" of {f'[{name}]' if name else 'the top'}"
            return f"did you mean {near[0]}{place}?"
    return "remove it, or mend its spelling"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "…"
