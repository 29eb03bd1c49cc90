"""kill -9 at random moments of a run, and of its Dask workers; then the run again.

    python -m benchmarks.trust.kill [--cells N] [--kills N] [--worker-kills N] [--out DIR]

Each output is killed at moments drawn uniformly over an undisturbed run, and then let finish, with
1, 2 and 3 workers in turn. Its bytes must be those of an undisturbed run with one worker.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmarks.trust.harness import (
    DONE,
    WAITED,
    Command,
    Place,
    Promises,
    difference,
    in_shared_memory,
    limit_s,
    listing,
    made_in,
    parser,
    place_of,
    stop_hard,
)
from flows import pipeline
from flows.config import read_curate_config
from flows.outfolder import claim_out

WORKERS = (1, 2, 3)
# So many kills an output: more, and most of the time goes into starting Python.
KILLS_EACH = 4
WORKER_KILLS_EACH = 2


@dataclass(slots=True)
class Undisturbed:
    """A run that nobody disturbs: its bytes, what lies in its folder after `clean`, its seconds."""

    made: dict[str, str]
    names: list[str]
    seconds: float
    start_s: float


@dataclass(slots=True)
class Found:
    """What was found over all kills."""

    hits: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    left_in_out: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    waited: list[str] = field(default_factory=list)
    blocks_kept: int = 0
    stages_kept: int = 0
    outputs: int = 0

    def tell(self, command: Command, code: int) -> None:
        """Of a run that was to complete."""
        if code != DONE:
            self.failed.append(f"exit {code}, see {command.path}")
            print(f"{self.failed[-1]}:\n{command.text}", flush=True)


def undisturbed(place: Place, workers: int) -> Undisturbed:
    out = place.fresh("undisturbed")
    with place.curate(out, workers) as command:
        while not command.text and command.process.poll() is None:
            time.sleep(0.02)
        start_s = time.monotonic() - command.started_s
        seconds = command.wait_or_fail()
    made = made_in(out)
    _clean(place, out.name)
    print(f"undisturbed, {workers} workers: {seconds:.1f} s", flush=True)
    return Undisturbed(made, listing(out), seconds, start_s)


def kill_runs(place: Place, reference: Undisturbed, n_kills: int, rng: random.Random) -> Found:
    """Kill until it has happened `n_kills` times; every output is let finish and compared."""
    found = Found()
    times = {1: reference}
    while found.hits.total() < n_kills:
        workers = WORKERS[found.outputs % len(WORKERS)]
        if workers not in times:
            times[workers] = undisturbed(place, workers)
            found.differing += difference(times[workers].made, reference.made)
        each = min(KILLS_EACH, n_kills - found.hits.total())
        _kill_one(place, times[workers], workers, each, rng, found)
        _compare(place, reference, found)
        done = found.hits.total()
        print(f"{done} of {n_kills} kills, {workers} workers, {found.outputs} outputs", flush=True)
    return found


def _kill_one(
    place: Place, usual: Undisturbed, workers: int, n: int, rng: random.Random, found: Found
) -> None:
    out = place.fresh("killed")
    moments = sorted(rng.uniform(0.0, usual.seconds) for _ in range(n))
    before_s = 0.0
    commands: list[Command] = []
    try:
        for moment_s in [*moments, None]:
            command = place.curate(out, workers)
            commands.append(command)
            if moment_s is not None:
                # A second run starts again, and then goes on where the first was.
                again_s = usual.start_s if len(commands) > 1 else 0.0
                if not command.ends_within(again_s + moment_s - before_s):
                    stop_hard(command)
                    found.hits[command.at()] += 1
                    before_s = moment_s
                    continue
            code, _ = command.wait(limit_s(usual.seconds))
            found.tell(command, code)
            break
        for command in commands:
            found.orphans += [f"{p.pid} {p.name()}" for p in command.left()]
            text = command.text if command is not commands[0] else ""
            found.stages_kept += len(re.findall(r"^\S+ \w+: reused", text, re.MULTILINE))
            found.waited += WAITED.findall(text)
            found.blocks_kept += sum(map(int, re.findall(r"going on: (\d+) of", text)))
    finally:
        for command in commands:
            command.__exit__()


def _compare(place: Place, reference: Undisturbed, found: Found) -> None:
    out = place.folder / "killed"
    found.outputs += 1
    found.differing += difference(made_in(out), reference.made)
    code = _clean(place, out.name)
    if code != DONE:
        found.failed.append(f"clean: exit {code}")
    found.left_in_out += sorted(set(listing(out)) ^ set(reference.names))


def _clean(place: Place, name: str) -> int:
    with place.cellpair("clean", str(place.folder / name)) as command:
        return command.wait()[0]


def kill_workers(place: Place, reference: Undisturbed, n_kills: int, rng: random.Random) -> Found:
    """kill -9 of Dask workers at work on blocks; the run must complete by itself."""
    found = Found()
    while found.hits.total() < n_kills:
        out = place.fresh("killed")
        with place.curate(out, 2) as command:
            for _ in range(min(WORKER_KILLS_EACH, n_kills - found.hits.total())):
                victim = _worker_at_work(command, rng.uniform(0.0, reference.seconds / 3), rng)
                if victim is None:  # the run was faster
                    break
                found.hits[command.at()] += 1
                victim.kill()
            code, _ = command.wait(limit_s(reference.seconds))
            found.tell(command, code)
            found.orphans += [f"{p.pid} {p.name()}" for p in command.left()]
        _compare(place, reference, found)
        print(f"{found.hits.total()} of {n_kills} kills of a worker", flush=True)
    return found


def _worker_at_work(command: Command, after_s: float, rng: random.Random) -> psutil.Process | None:
    """A Dask worker, so long after workers were seen at a stage that needs them, or None."""
    while not (command.at() in ("nuclei", "patches") and command.children()):
        if command.ends_within(0.05):
            return None
    if command.ends_within(after_s):
        return None
    return rng.choice(command.children() or [None])


class Shuffled:
    """A block map in this process that works in an order of its own and hands back in another."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def __call__(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        results = [fn(item) for item in self._shuffled(items)]
        return self._shuffled(results)

    on_gpu = __call__

    def _shuffled(self, items: Iterable[Any]) -> list[Any]:
        left = list(items)
        self._rng.shuffle(left)
        return left


def other_order(place: Place, rng: random.Random) -> dict[str, str]:
    """The bytes of a run whose blocks come in a random order."""
    out = place.fresh("shuffled")
    config = read_curate_config(place.config(out, {}))
    claim_out(config.out, config.name, ())
    curated = pipeline.curate(config, Shuffled(rng), device="cpu")
    if curated.dataset is None:
        raise RuntimeError(f"no dataset: {curated.failures}")
    return made_in(out)


def show(args: argparse.Namespace) -> int:
    promises = Promises()
    rng = random.Random(args.seed)
    with place_of(args) as place:
        memory = in_shared_memory()
        reference = undisturbed(place, 1)
        promises.nothing(
            "other block order: differing files",
            difference(other_order(place, rng), reference.made),
        )
        killed = kill_runs(place, reference, args.kills, rng)
        workers = kill_workers(place, reference, args.worker_kills, rng)
        for name, found, n in (
            ("curate", killed, args.kills),
            ("a Dask worker", workers, args.worker_kills),
        ):
            print(f"\nkills of {name}, by what was at work: {dict(found.hits)}")
            print(
                f"{found.outputs} outputs; kept from killed runs: {found.stages_kept} stages, "
                f"{found.blocks_kept} blocks"
            )
            promises.add(f"kills of {name}", found.hits.total(), n)
            promises.nothing(f"kills of {name}: runs that did not complete", found.failed)
            promises.nothing(f"kills of {name}: differing files", found.differing)
            promises.nothing(f"kills of {name}: left in OUT after clean", found.left_in_out)
            promises.nothing(f"kills of {name}: processes left", found.orphans)
            promises.nothing(f"kills of {name}: waited for an owner that is gone", found.waited)
        promises.nothing("left in the temporary folder", listing(place.temp))
        promises.nothing("left in /dev/shm", sorted(in_shared_memory() - memory))
    return promises.verdict()


def main() -> int:
    options = parser(__doc__, 5000)
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--worker-kills", type=int, default=10)
    return show(options.parse_args())


if __name__ == "__main__":
    sys.exit(main())
