"""Sizes as a person reads them."""

from __future__ import annotations

_UNITS = ("B", "kB", "MB", "GB", "TB")


def in_words(n_bytes: int) -> str:
    """Such as `812 B` or `3.4 GB`: powers of 1000, one digit after the point."""
    power = min(len(_UNITS) - 1, (len(str(n_bytes)) - 1) // 3)
    return f"{n_bytes / 1000**power:.{1 if power else 0}f} {_UNITS[power]}"
