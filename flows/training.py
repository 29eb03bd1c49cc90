"""Starts the trainer as a process of its own and reads what it leaves; it is never imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from flows.report import write_evaluation_page

EVALUATION_FILE = "evaluation.json"


def run_trainer(module: str, *args: str) -> int:
    """`python -m trainer.<module> ARGS`; returns its exit code, which is ours."""
    process = subprocess.Popen([sys.executable, "-m", f"trainer.{module}", *args])
    try:
        return process.wait()
    except KeyboardInterrupt:
        # It has had the signal too where it came from the terminal; it saves and ends by itself.
        process.terminate()
        return process.wait()


def evaluate(checkpoint: Path, dataset: Path, out: Path) -> Path:
    """Evaluate a checkpoint into `out` and render its page; returns the page."""
    code = run_trainer("evaluate", str(checkpoint), str(dataset), "--out", str(out))
    if code:
        raise SystemExit(code)
    metrics = checkpoint.resolve().parent / "metrics.csv"
    return write_evaluation_page(out, out / EVALUATION_FILE, metrics if metrics.exists() else None)
