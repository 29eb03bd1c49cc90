"""Several `curate` at once on one config: one works, the others wait; the bytes are the same.

python -m benchmarks.trust.together [--cells N] [--out DIR]
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from contextlib import ExitStack

from benchmarks.trust.harness import (
    DONE,
    WAITED,
    Place,
    Promises,
    difference,
    limit_s,
    made_in,
    parser,
    place_of,
)

# When each process starts, as shares of an undisturbed run.
STARTS = ((0.0, 0.0), (0.0, 0.1), (0.0, 0.4), (0.0, 0.8), (0.0, 0.0, 0.0), (0.0, 0.2, 0.5))
WORKERS = 2


def at_once(
    place: Place, starts: tuple[float, ...], reference: dict[str, str], seconds: float
) -> Promises:
    """So many processes on one config, started at these shares of `seconds`."""
    out = place.fresh("together")
    promises = Promises()
    began_s = time.monotonic()
    with ExitStack() as stack:
        commands = []
        for share in starts:
            time.sleep(max(0.0, began_s + share * seconds - time.monotonic()))
            commands.append(stack.enter_context(place.curate(out, WORKERS)))
        codes = [command.wait(limit_s(seconds))[0] for command in commands]
        texts = [command.text for command in commands]
        left = [p for command in commands for p in command.left()]
    name = f"started at {', '.join(f'{share:.0%}' for share in starts)}"
    promises.add(f"{name}: exit codes", codes, [DONE] * len(starts))
    promises.nothing(f"{name}: differing files", difference(made_in(out), reference))
    made = Counter(
        stage for text in texts for stage in re.findall(r"^\S+ (\w+): made", text, re.MULTILINE)
    )
    twice = [stage for stage, n in made.items() if n > 1]
    promises.nothing(f"{name}: stages made by two", twice)
    promises.nothing(f"{name}: processes left", left)
    waited = [text for text in texts if WAITED.search(text)]
    print(f"{name}: {len(waited)} told for whom they waited", flush=True)
    return promises


def show(args: argparse.Namespace, starts: tuple[tuple[float, ...], ...] = STARTS) -> int:
    promises = Promises()
    with place_of(args) as place:
        alone = place.fresh("alone")
        with place.curate(alone) as command:
            command.wait_or_fail()
        reference = made_in(alone)
        with place.curate(place.fresh("alone"), WORKERS) as command:
            seconds = command.wait_or_fail()
        for shares in starts:
            promises.rows += at_once(place, shares, reference, seconds).rows
    return promises.verdict()


def main() -> int:
    return show(parser(__doc__, 2000).parse_args())


if __name__ == "__main__":
    sys.exit(main())
