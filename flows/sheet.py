"""The sheet of `cellpair init`: a csv with one line a bundle, saying what no file can say."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.config import RUN_FILES
from shards.errors import BadInput, BadInputs

# Columns that name the bundle: by its path, or by the id that its run has in the config.
_NAMING = ("bundle", "run")
_FILES = tuple(key for key in RUN_FILES if key != "xenium")
_COLUMNS = (*_NAMING, "id", "image", "donor", "tissue", "species", "mpp", "source_id", *_FILES)
_REMEDY = (
    "save the sheet as csv in UTF-8, with a header such as bundle,slide,alignment,donor,tissue"
)


@dataclass(frozen=True, slots=True)
class SheetRow:
    """What one line says, by key of `[[runs]]`; files as absolute paths. Empty cells are absent."""

    where: str
    values: Mapping[str, str]


def read_sheet(path: Path, bundles: Sequence[Path], ids: Sequence[str]) -> dict[Path, SheetRow]:
    """The line of each bundle; of those that have none, nothing.

    `bundles` are absolute paths, `ids` the ids of their runs. Relative paths in the sheet start at
    its folder, those of bundles else where the command runs. Values may be parted by commas,
    semicolons or tabs. Raises BadInputs with every fault: unknown columns, lines that are of no
    bundle or of one that had a line, files that do not exist, pixel sizes that are none.
    """
    header, lines = _read(path)
    faults = list(_header_faults(path, header))
    if faults:
        raise BadInputs(faults)
    rows: dict[Path, SheetRow] = {}
    for number, cells in lines:
        where = f"{path}, line {number}"
        if len(cells) != len(header):
            expected = f"{len(header)} values, as the header has"
            remedy = 'mend the line; a value that holds the separator goes between " and "'
            faults.append(BadInput(where, expected=expected, found=str(len(cells)), remedy=remedy))
            continue
        values = {key: cell for key, cell in zip(header, cells, strict=True) if cell}
        bundle = _bundle_of(path, values, bundles, ids)
        if bundle is None or bundle in rows:
            named = ", ".join(f"{key} = {values[key]!r}" for key in _NAMING if key in values)
            already = f", which {rows[bundle].where} is of already" if bundle in rows else ""
            faults.append(
                BadInput(
                    where,
                    expected="one line for each bundle of the command: "
                    + ", ".join(f"{b} ({i})" for b, i in zip(bundles, ids, strict=True)),
                    found=(named or "neither bundle nor run") + already,
                    remedy="mend or remove the line, or name its bundle in the command too",
                )
            )
            continue
        for key in set(_FILES) & values.keys():
            if (key, values[key]) != ("alignment", "auto"):
                values[key] = str(path.absolute().parent / Path(values[key]).expanduser())
        faults += _value_faults(where, values)
        rows[bundle] = SheetRow(where, {k: v for k, v in values.items() if k not in _NAMING})
    if faults:
        raise BadInputs(faults)
    return rows


def _value_faults(where: str, values: Mapping[str, str]) -> Iterator[BadInput]:
    for key in _FILES:
        if key in values and values[key] != "auto" and not Path(values[key]).is_file():
            yield BadInput(
                f"{where}, {key}",
                expected="an existing file",
                found=f"no file at {values[key]}",
                remedy="mend the path; relative paths start at the sheet's folder",
            )
    if "mpp" in values and not re.fullmatch(r"\d+(\.\d+)?", values["mpp"]):
        yield BadInput(
            f"{where}, mpp",
            expected="µm per pixel, as 0.2738",
            found=repr(values["mpp"]),
            remedy="write it with a point, and without a unit",
        )


def _read(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            sign = max(",;\t", key=first.count)
            rows = csv.reader(file, delimiter=sign, strict=True)
            lines = [(rows.line_num, [cell.strip() for cell in row]) for row in rows if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(path, expected="a csv file", found=str(error), remedy=_REMEDY) from error
    if len(lines) < 2:
        found = "a header alone" if lines else "an empty file"
        raise BadInput(path, expected="a header and lines", found=found, remedy=_REMEDY)
    return [name.lower() for name in lines[0][1]], lines[1:]


def _header_faults(path: Path, header: list[str]) -> Iterator[BadInput]:
    known = f"columns of {', '.join(_COLUMNS)}"
    for name in dict.fromkeys(header):
        if name not in _COLUMNS:
            remedy = f"mend its spelling or remove it; {_REMEDY}"
            yield BadInput(path, expected=known, found=f"the column {name!r}", remedy=remedy)
        elif header.count(name) > 1:
            found = f"{name!r} {header.count(name)} times"
            yield BadInput(path, expected=known, found=found, remedy="keep one of them")
    if not set(header) & set(_NAMING):
        expected = "a column bundle or run, which says what a line is of"
        yield BadInput(path, expected=expected, found="neither", remedy=_REMEDY)


def _bundle_of(
    sheet: Path, values: Mapping[str, str], bundles: Sequence[Path], ids: Sequence[str]
) -> Path | None:
    """The bundle that a line is of; None where it names none, or two."""
    named: set[Path | None] = set()
    if "run" in values:
        named.add(dict(zip(ids, bundles, strict=True)).get(values["run"]))
    if "bundle" in values:
        places = [p.resolve() for p in (sheet.parent / values["bundle"], Path(values["bundle"]))]
        named.add(next((b for b in bundles if b.resolve() in places), None))
    return named.pop() if len(named) == 1 else None
