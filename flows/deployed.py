"""What both deployed flows ask of their one parameter."""

from __future__ import annotations

from pathlib import Path

from shards.errors import BadInput


def absolute_config(config: str) -> Path:
    """The config's path; BadInput where it is relative: a worker starts each run elsewhere."""
    path = Path(config)
    if not path.is_absolute():
        raise BadInput(
            "parameter config",
            expected="the absolute path of a config on the worker's machine",
            found=f"the relative path {config!r}",
            remedy="give the whole path: a worker starts every run in a new temporary folder, so "
            "a relative path leads nowhere",
        )
    return path
