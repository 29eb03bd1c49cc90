"""The config as it is shown: every value, files by their names alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.config import RUN_FILES, CurateConfig, RunConfig


@dataclass(frozen=True, slots=True)
class Setting:
    key: str
    value: str


# What leads to a file, with the folders that hold it; the path of a web address is none.
_FOLDERS = re.compile(r"(?<![\w/:.~-])~?/(?:[^/\s'\"<>]+/)+")
_SECTIONS = ("patch", "cells", "segmentation", "registration", "filters", "split")


def dataset_settings(config: CurateConfig) -> dict[str, list[Setting]]:
    """The sections of a config that hold for all runs."""
    sections = {section: getattr(config, section).model_dump() for section in _SECTIONS}
    # The name of weights that ship, or a file of this machine.
    sections["segmentation"]["model"] = Path(config.segmentation.model)
    # A page must not name whom `cellpair clean` has removed.
    split, withdrawn = sections["split"], set(config.split.withdrawn_names)
    for key in ("assign", "aliases"):
        split[key] = {name: of for name, of in split[key].items() if name not in withdrawn}
    split["withdraw"] = f"{len(config.split.withdraw)}, not named here" if withdrawn else ()
    return {section: _settings(values) for section, values in sections.items()}


def run_settings(config: CurateConfig, run: RunConfig) -> dict[str, list[Setting]]:
    """The config of one run: its own entry, then the sections that hold for all runs."""
    return {"run": _settings(dict(run)), **dataset_settings(config)}


def without_folders(text: str, config: CurateConfig) -> str:
    """A message without the folders of this machine; names of files stay.

    Folders of inputs and output are known as they are written, spaces and all; any other path is
    told by its slashes.
    """
    given = [
        p for run in config.runs for key in RUN_FILES if isinstance(p := getattr(run, key), Path)
    ]
    files = (*given, config.out, Path(config.segmentation.model))
    known = {folder for p in files for folder in (p.parent, p.resolve().parent)}
    for folder in sorted(known, key=lambda p: -len(p.parts)):
        if folder.is_absolute() and folder != folder.parent:
            text = text.replace(f"{folder}/", "")
    return _FOLDERS.sub("", text)


def _settings(values: dict[str, Any]) -> list[Setting]:
    return [Setting(key, _shown(value)) for key, value in values.items()]


def _shown(value: Any) -> str:
    match value:
        case None:
            return "not given"
        case Path():
            return value.name
        case dict():
            return ", ".join(f"{k} = {_shown(v)}" for k, v in value.items()) or "none"
        case list() | tuple():
            return ", ".join(_shown(v) for v in value) or "none"
        case bool():
            return str(value).lower()
        case _:
            return str(value)
