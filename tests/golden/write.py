"""Write the golden records anew: `python -m tests.golden.write`.

Refuses, and writes nothing, where a stage changed and its version did not. Where not the stage but
the fixed input of these tests was changed, delete the records of the stages that it is of first.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from flows.built import Stage
from shards.dataset import read_record
from tests.golden.records import (
    VERSIONS,
    Golden,
    NetworkOutcome,
    RefinedOutcome,
    faults,
    network_faults,
    path_of,
    read_golden,
    refined_faults,
)
from tests.golden.stages import golden_of, network_outcome, refined_outcome


def write_records(
    found: dict[Stage, Golden], outcome: NetworkOutcome, refined: RefinedOutcome
) -> list[str]:
    """Write what was found in place of the records; or nothing, and the reasons why not."""
    refused: list[str] = []
    same_version: set[str] = set()
    for stage, now in found.items():
        was = read_golden(stage)
        if was is not None and now.version <= was.version:
            same_version.add(stage)
            refused += faults(stage, was, now)
    network = path_of("network")
    if network.is_file() and "nuclei" in same_version:
        old = read_record(network, NetworkOutcome)
        if old.weights_sha256 == outcome.weights_sha256:
            refused += network_faults(old, outcome)
            outcome = old  # what differs still is of this processor
    places = path_of("refined")
    if places.is_file() and "registration" in same_version:
        was_refined = read_record(places, RefinedOutcome)
        refused += refined_faults(was_refined, refined)
        refined = was_refined
    if not refused:
        for stage, now in found.items():
            path_of(stage).write_text(now.model_dump_json(indent=1) + "\n", encoding="utf-8")
        network.write_text(outcome.model_dump_json(indent=1) + "\n", encoding="utf-8")
        places.write_text(refined.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return refused


def main() -> int:
    """Run every stage and write its record; returns 1 where a version was not raised."""
    with tempfile.TemporaryDirectory() as folder:
        found: dict[Stage, Golden] = {s: golden_of(s, Path(folder) / s) for s in VERSIONS}
        outcome, refined = network_outcome(Path(folder)), refined_outcome(Path(folder))
    refused = write_records(found, outcome, refined)
    print(*refused, sep="\n", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
