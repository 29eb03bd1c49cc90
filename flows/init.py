"""`cellpair init`: looks at bundles and writes a config for them; what it cannot tell is marked.

A mark is a value that no config takes, `donor = { TODO = "…" }`, so that `curate` refuses the file
and names each mark until all are replaced. Nothing is guessed: of several candidates none is
picked, they are named in comments.
"""

from __future__ import annotations

import os
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows.beside import run_ids
from flows.config import read_curate_config
from flows.config_faults import MARK
from flows.run_table import look_at, run_table
from flows.sheet import SheetRow, read_sheet
from flows.toml_text import quoted
from shards.errors import BadInput, BadInputs

_HEAD = """\
# Written by `cellpair init` from what lies on disk. Relative paths start at this file's folder.
# Replace each {{ {mark} = "…" }} by a value: until then `cellpair curate` refuses this file and
# names them. Next: cellpair curate {file} --plan
name = {name}
out = "curated"

# All else has its default, unless it is set, as in
# [patch]
# fov_um = 56.0
# [filters]
# min_counts = 10
# [split]
# assign = {{ "the name of a donor" = "test" }}    # train, val or test; else a hash of it decides
"""


def init(bundles: Sequence[Path], sheet: Path | None, out: Path) -> int:
    """Write a config for these bundles to `out`; prints what is left to fill in; returns 0.

    `sheet` is a csv that says what no file does (`flows.sheet`). Raises BadInput(s) with every
    fault of bundles and sheet, and where `out` is there already; then nothing is written.
    """
    out = out.absolute()
    _check_out(out)
    paths = [Path(os.path.normpath(bundle.absolute())) for bundle in bundles]
    ids = run_ids(paths)
    faults: list[BadInput] = []
    with _collected(faults):
        _refuse_twice(paths)
    looks = []
    for path in dict.fromkeys(paths):
        with _collected(faults):
            looks.append(look_at(path))
    rows: dict[Path, SheetRow] = {}
    if sheet is not None:
        with _collected(faults):
            rows = read_sheet(sheet, paths, ids)
    tables = []
    for run_id, bundle in zip(ids, looks, strict=False):
        with _collected(faults):
            row = rows.get(bundle.path, SheetRow("", {}))
            tables.append(run_table(bundle, run_id, row, out.parent.resolve()))
    if faults:
        raise BadInputs(faults)
    name = quoted(out.parent.resolve().name or "dataset")
    text = _HEAD.format(mark=MARK, file=out.name, name=name) + "".join(tables)
    marks = _marks(text, out)
    with out.open("x", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
        except OSError:  # of a full disk, half a config would be left
            out.unlink()
            raise
    print(f"{out}: {len(tables)} run{'s' if len(tables) > 1 else ''}")
    print("\n".join(f"to fill in: {mark}" for mark in marks) or "nothing to fill in")
    return 0


@contextmanager
def _collected(faults: list[BadInput]) -> Iterator[None]:
    try:
        yield
    except BadInput as fault:
        faults.append(fault)
    except BadInputs as error:
        faults += error.faults


def _check_out(out: Path) -> None:
    if os.path.lexists(out):
        raise BadInput(
            out,
            expected="no file there yet, since none is overwritten",
            found="a folder" if out.is_dir() else "a file",
            remedy="move it away, or give another name by --out",
        )
    if not out.parent.is_dir():
        raise BadInput(
            out,
            expected="a file in a folder that exists",
            found=f"no folder {out.parent}",
            remedy="make the folder, or give another by --out",
        )


def _refuse_twice(bundles: Sequence[Path]) -> None:
    counted = Counter(bundle.resolve() for bundle in bundles)
    if twice := [str(bundle) for bundle, n in counted.items() if n > 1]:
        raise BadInput(
            "cellpair init",
            expected="each bundle once",
            found=f"several times: {', '.join(twice)}",
            remedy="name it once; one bundle is one run",
        )


def _marks(text: str, out: Path) -> list[str]:
    """What is left to fill in, as `run: key` with words; the text is read as `curate` will.

    Raises BadInputs with what else is wrong, such as an id in the sheet that is none.
    """
    # Beside `out`, since relative paths start there.
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=out.parent, prefix=".cellpair-", suffix=".toml"
    ) as aside:
        aside.write(text)
        aside.flush()
        try:
            read_curate_config(Path(aside.name))
        except BadInputs as error:
            others = [fault for fault in error.faults if MARK not in fault.found]
            for fault in others:
                fault.where = fault.where.replace(aside.name, f"{out}, which was not written")
            if others:
                raise BadInputs(others) from error
    runs = tomllib.loads(text)["runs"]
    return [
        f"{run['id']}: {key} ({value[MARK]})"
        for run in runs
        for key, value in run.items()
        if isinstance(value, dict)
    ]
