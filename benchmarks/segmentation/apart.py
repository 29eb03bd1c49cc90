"""A module run in a process of its own: what it prints, and how much memory it took at most."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

_SAMPLE_S = 0.1


def run_apart(module: str, *arguments: str) -> tuple[str, float]:
    """The standard output of `python -m module …`, and its peak GiB, with all that it starts.

    Sampled: what the system keeps as the peak of a process begins with that of its parent.
    """
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        peak, tree = 0, psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, sum(map(_memory_of, [tree, *tree.children(recursive=True)])))
            time.sleep(_SAMPLE_S)
        told = process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return told, peak / 2**30


def _memory_of(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
