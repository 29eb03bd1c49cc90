"""`cellpair curate --xenium …`: one run by options; their config lies in the output."""

from __future__ import annotations

import logging
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flows.beside import look_beside, run_ids
from flows.config import RUN_FILES, CurateConfig, read_curate_config
from flows.outfolder import claim_out
from flows.toml_text import quoted
from shards.artifact import write_atomically
from shards.errors import BadInput, BadInputs
from shards.remote import Location, RemotePath, is_url
from shards.store import store_of

log = logging.getLogger("cellpair")

CONFIG_FILE = "curate.toml"
_HEAD = """\
# Written by `cellpair curate --xenium`. The same command goes on; so does, after a change here,
# cellpair curate {name}
"""


def read_one_run(given: Mapping[str, str | float], out: Location) -> tuple[CurateConfig, str]:
    """The config of one run, `given` by key of `[[runs]]`, and its text; nothing is written.

    Relative paths start where the command runs; a run without `id` gets one from its bundle's
    name. Raises BadInputs with every fault, named by option.
    """
    run = {key: _absolute(key, value) for key, value in given.items()}
    (name,) = run_ids([Path(str(run["xenium"]))])
    run = {"id": name, **run}
    if "slide" in run and "alignment" not in run:
        run["alignment"] = _automatically(Path(str(run["xenium"])))
    told_out = out.url if isinstance(out, RemotePath) else "."
    lines = [f"name = {quoted(str(run['id']))}", f"out = {quoted(told_out)}", "", "[[runs]]"]
    lines += [f"{key} = {quoted(v) if isinstance(v, str) else repr(v)}" for key, v in run.items()]
    text = _HEAD.format(name=CONFIG_FILE) + "\n".join(lines) + "\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG_FILE
        path.write_text(text, encoding="utf-8")
        try:
            config = read_curate_config(path)
        except BadInputs as error:
            bundle = Path(str(run["xenium"]))
            raise BadInputs([_by_option(f, f"{path}: ", bundle) for f in error.faults]) from error
    if isinstance(out, Path):
        config = config.model_copy(update={"out": out.absolute()})
    return config, text


def _automatically(bundle: Path) -> str:
    """Says that the slide will be registered from the nuclei, and what could be given instead."""
    near = look_beside(bundle) if bundle.exists() else []
    files = [str(c.path) for c in near if c.kind in ("matrix", "keypoints")]
    told = f"; near the bundle lie: {', '.join(files)}" if files else ""
    log.warning("no --alignment: the slide is registered automatically%s", told)
    return "auto"


def keep_config(config: CurateConfig, text: str) -> Path:
    """Write the config into its output, or find it there; returns its path.

    Raises BadInput where the folder was made with other options, naming those that differ, and
    where it is in use for something else.
    """
    path = config.out / CONFIG_FILE
    if config.remote is not None or not path.exists():
        store = store_of(config.out, config.remote)
        claim_out(config.out, config.name, config.split.withdrawn_names, store)
    if not path.exists():
        write_atomically(path, text.encode())
        return path
    try:
        there = tomllib.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(
            path,
            expected="the config that an earlier run left",
            found=str(error),
            remedy="mend or remove the file, or give another --out",
        ) from error
    differing = list(_differing(there, tomllib.loads(text)))
    if differing:
        raise BadInput(
            path,
            expected="the options that the folder was made with",
            found="; ".join(differing),
            remedy=f"give the same options or another --out; or change that file, and run "
            f"cellpair curate {path}",
        )
    return path


def _absolute(key: str, value: str | float) -> str | float:
    if isinstance(value, str) and is_url(value):
        return value
    if key in RUN_FILES and isinstance(value, str) and (key, value) != ("alignment", "auto"):
        return str(Path(value).absolute())
    return value


def _by_option(fault: BadInput, before: str, bundle: Path) -> BadInput:
    """A fault of the config in words of options."""
    key = fault.where.removeprefix(before).removeprefix("runs.0").removeprefix(".")
    if key:
        where = f"--{key.replace('_', '-')}"
        remedy = fault.remedy.removesuffix("; relative paths start at the config's folder")
    else:  # of several keys, such as one that is missing
        near = look_beside(bundle) if bundle.exists() else []
        where = "cellpair curate --xenium"
        remedy = "give what is missing, and not more; see cellpair curate --help"
        if near:
            remedy += f". Near the bundle lie: {', '.join(str(c.path) for c in near)}"
    return BadInput(where, expected=fault.expected, found=fault.found, remedy=remedy)


def _differing(there: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    flat_there, flat_given = dict(_flat(there)), dict(_flat(given))
    for key in sorted(flat_there.keys() | flat_given.keys()):
        was, now = flat_there.get(key, "nothing"), flat_given.get(key, "nothing")
        if was != now:
            yield f"{key} is {was} there, and {now} here"


def _flat(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{at}.{key}" if at else key)
    elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{at}.{i}")
    else:
        yield at, repr(value)
