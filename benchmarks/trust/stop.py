"""Ctrl-C and SIGTERM at random moments of a run, once and twice.

    python -m benchmarks.trust.stop [--cells N] [--stops N] [--out DIR]

The run must end with exit code 3 and say that it can go on; and then go on to the bytes of an
undisturbed one.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from collections import Counter
from dataclasses import dataclass

from benchmarks.trust.harness import (
    DONE,
    STOPPED,
    Command,
    Place,
    Promises,
    difference,
    limit_s,
    made_in,
    parser,
    place_of,
)

# Within this time of a signal a process must be gone: what waits, as a job's scheduler, kills then.
LIMIT_S = 10.0
# The command installs its handlers first of all, once Python itself has started.
FIRST_S = 0.5
WORDS = "run the same command again"


@dataclass(frozen=True, slots=True)
class Stop:
    """How a run is stopped; a terminal's Ctrl-C reaches the children too."""

    name: str
    signum: int
    group: bool
    twice_after_s: float | None = None


STOPS = (
    Stop("SIGINT", signal.SIGINT, group=False),
    Stop("Ctrl-C", signal.SIGINT, group=True),
    Stop("SIGTERM", signal.SIGTERM, group=False),
    Stop("SIGTERM to all", signal.SIGTERM, group=True),
    Stop("Ctrl-C twice", signal.SIGINT, group=True, twice_after_s=0.3),
)


@dataclass(slots=True)
class Found:
    codes: Counter[int]
    longest_s: float
    unsaid: list[str]
    left: list[str]
    differing: list[str]


def stopped(
    place: Place, stop: Stop, n: int, seconds: float, made: dict[str, str], rng: random.Random
) -> Found:
    """Stop `n` runs so, each at a moment of its own, and let them go on."""
    found = Found(Counter(), 0.0, [], [], [])
    while found.codes.total() < n:
        out = place.fresh("stopped")
        moment_s = rng.uniform(FIRST_S, seconds)
        with place.curate(out, 2) as command:
            if command.ends_within(moment_s):
                continue
            at = command.at()
            spent_s = _stop(command, stop)
            code = command.process.returncode
            found.left += [f"{p.pid} {p.name()}" for p in command.left()]
            said = WORDS in command.text and "Traceback" not in command.text
        found.codes[code] += 1
        found.longest_s = max(found.longest_s, spent_s)
        if not said or code != STOPPED:
            found.unsaid.append(f"{at}, {moment_s:.1f} s, exit {code}: {command.path}")
        print(f"{stop.name} at {moment_s:.1f} s, {at}: exit {code} in {spent_s:.1f} s", flush=True)
        with place.curate(out, 2) as again:
            code, _ = again.wait(limit_s(seconds))
        found.differing += difference(made_in(out), made) if code == DONE else [f"exit {code}"]
    return found


def _stop(command: Command, stop: Stop) -> float:
    """Send the signal; the seconds until the process has ended, or was ended."""
    command.signal(stop.signum, group=stop.group)
    before_s = 0.0
    if stop.twice_after_s is not None and not command.ends_within(stop.twice_after_s):
        before_s = stop.twice_after_s
        command.signal(stop.signum, group=stop.group)
    return before_s + command.wait_more(3 * LIMIT_S)


def show(args: argparse.Namespace) -> int:
    promises = Promises()
    rng = random.Random(args.seed)
    with place_of(args) as place:
        reference = place.fresh("reference")
        with place.curate(reference, 2) as command:
            seconds = command.wait_or_fail()
        made = made_in(reference)
        for stop in STOPS:
            found = stopped(place, stop, args.stops, seconds, made, rng)
            name = stop.name
            promises.add(f"{name}: exit codes", dict(found.codes), {STOPPED: args.stops})
            longest = f"{found.longest_s:.1f}"
            promises.add(
                f"{name}: longest, s", longest, f"<= {LIMIT_S:g}", found.longest_s <= LIMIT_S
            )
            promises.nothing(f"{name}: not said as promised", found.unsaid)
            promises.nothing(f"{name}: processes left", found.left)
            promises.nothing(f"{name}, gone on: differing files", found.differing)
    return promises.verdict()


def main() -> int:
    options = parser(__doc__, 1000)
    options.add_argument("--stops", type=int, default=4, help="of each kind")
    # A shell starts what it puts in the background with Ctrl-C ignored, and children inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return show(options.parse_args())


if __name__ == "__main__":
    sys.exit(main())
