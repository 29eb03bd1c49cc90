"""A second run of a finished dataset, and runs after a filter, a split or an alias was changed.

    python -m benchmarks.trust.again [--cells N] [--out DIR]

The second run has a limit of seconds and writes nothing; what it takes Python to load the pipeline
at all is told beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.trust.harness import DONE, Changes, Place, Promises, parser, place_of

LIMIT_S = 5.0
WORKERS = 2
CHANGES: dict[str, tuple[Changes, set[str]]] = {
    "filter": ({"min_counts": 60}, {"shards"}),
    "split": ({"split": "test"}, set()),
    "alias": ({"more": 'aliases = { "D" = ["D1"] }'}, set()),
}

# Inode and times of a file: a file that was written anew under its name has another one.
Facts = dict[str, tuple[int, int, int]]


def facts(out: Path) -> Facts:
    """Of every file that is no page, no log and not hidden."""
    return {
        p.relative_to(out).as_posix(): (s.st_ino, s.st_mtime_ns, s.st_size)
        for folder in ("runs", "panels", "datasets")
        for p in sorted((out / folder).rglob("*"))
        if p.is_file() and (s := p.stat())
    } | {
        name: (s.st_ino, s.st_mtime_ns, s.st_size)
        for name in ("dataset.json",)
        if (s := (out / name).stat())
    }


def rewritten(before: Facts, after: Facts) -> list[str]:
    return [name for name, was in before.items() if after.get(name) != was]


def new_stages(before: Facts, after: Facts) -> set[str]:
    """Stages of which an artifact is there that was not."""
    new = after.keys() - before.keys()
    return {name.split("/")[2] for name in new if name.startswith("runs/")}


def second_run(place: Place, out: Path, promises: Promises) -> None:
    before = facts(out)
    # Twice: the first may find what the run before left open, as times of raw files not settled.
    for name in ("second run", "third run"):
        with place.curate(out, WORKERS) as command:
            seconds = command.wait_or_fail()
        promises.add(f"{name}, s", f"{seconds:.2f}", f"<= {LIMIT_S:g}", seconds <= LIMIT_S)
        promises.nothing(f"{name}: files rewritten", rewritten(before, facts(out)))
        promises.nothing(f"{name}: files new", sorted(facts(out).keys() - before.keys()))
    with place.python("-c", "import flows.local") as command:
        print(f"python -c 'import flows.local': {command.wait_or_fail():.2f} s", flush=True)


def changed(place: Place, out: Path, promises: Promises) -> None:
    for name, (change, stages) in CHANGES.items():
        before = facts(out)
        with place.curate(out, WORKERS, **change) as command:
            code, seconds = command.wait()
        after = facts(out)
        promises.add(f"another {name}: exit code", code, DONE)
        print(f"after another {name}: {seconds:.2f} s", flush=True)
        promises.add(f"another {name}: stages made", new_stages(before, after), stages)
        gone = [n for n in rewritten(before, after) if n != "dataset.json"]
        promises.nothing(f"another {name}: files rewritten", gone)
        moved = before["dataset.json"] != after["dataset.json"]
        promises.add(f"another {name}: dataset.json points to a new one", moved, True)
        with place.curate(out, WORKERS) as command:
            command.wait_or_fail()


def show(args: argparse.Namespace) -> int:
    promises = Promises()
    with place_of(args) as place:
        out = place.fresh("finished")
        with place.curate(out, WORKERS) as command:
            print(f"first run of {args.cells:,} cells: {command.wait_or_fail():.1f} s", flush=True)
        second_run(place, out, promises)
        changed(place, out, promises)
    return promises.verdict()


def main() -> int:
    return show(parser(__doc__, 20_000).parse_args())


if __name__ == "__main__":
    sys.exit(main())
