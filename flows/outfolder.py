"""The output folder knows whose it is."""

from __future__ import annotations

from pathlib import Path


def claim_out(out: Path, name: str, withdraw: tuple[str, ...]) -> None:
    """Make the folder."""
    out.mkdir(parents=True, exist_ok=True)
