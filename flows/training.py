"""Starts the trainer as a process of its own and reads what it leaves; it is never imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from shards.errors import BadInput
from shards.remote import Location

EVALUATION_FILE = "evaluation.json"
METRICS_FILE = "metrics.csv"


def run_trainer(module: str, *args: str, tell: Callable[[str], None] | None = None) -> int:
    """`python -m trainer.<module> ARGS`; returns its exit code, which is ours.

    Its output is ours too, or goes line by line to `tell`.
    """
    with subprocess.Popen(
        [sys.executable, "-m", f"trainer.{module}", *args],
        stdout=None if tell is None else subprocess.PIPE,
        stderr=None if tell is None else subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            for line in process.stdout or ():
                assert tell is not None
                tell(line.rstrip())
            return process.wait()
        except BaseException as stop:
            # The signal reached it too where it came from the terminal; it saves and ends itself.
            process.terminate()
            process.communicate()  # what it still says, lest a full pipe hold it
            if isinstance(stop, KeyboardInterrupt):
                return process.returncode
            raise


def train(config: Path, *how: str, tell: Callable[[str], None] | None = None) -> int:
    """Train a config, as `run_trainer`; if this process is killed, the trainer saves and ends."""
    return run_trainer("train", str(config), "--with-parent", *how, tell=tell)


def evaluate(checkpoint: Path, dataset: Location, out: Path) -> Path:
    """Evaluate a checkpoint into `out` and render its page; returns the page."""
    code = run_trainer("evaluate", str(checkpoint), str(dataset), "--out", str(out))
    if code:
        raise SystemExit(code)
    # The pages know every stage: seconds of imports that neither training nor a fault needs.
    from flows.report import write_evaluation_page

    metrics = checkpoint.resolve().parent.parent / METRICS_FILE
    return write_evaluation_page(out, out / EVALUATION_FILE, metrics if metrics.exists() else None)


def newest_checkpoint(run_out: Path) -> Path:
    """The newest whole checkpoint of a training run's output folder."""
    whole = sorted(p.parent for p in run_out.glob("checkpoints/step-*/meta.json"))
    if not whole:
        raise BadInput(
            run_out,
            expected="a checkpoint",
            found="none",
            remedy="train first: cellpair train CONFIG.toml",
        )
    return whole[-1]
