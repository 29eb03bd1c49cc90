"""Text that goes into a TOML file, whatever is in it."""

from __future__ import annotations

from pathlib import Path

from shards.errors import BadInput


def quoted(text: str) -> str:
    """A TOML basic string; what is not printable is escaped.

    Raises BadInput on text that no TOML holds, such as file names that are no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            ascii(text),
            expected="a name in UTF-8, which a TOML file can hold",
            found=f"{error.reason} at position {error.start}",
            remedy="rename it",
        ) from error
    return '"' + _escaped(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def comment(text: str) -> str:
    """A line of comment, whatever lines `text` has."""
    return f"# {_escaped(text)}".rstrip()


def path_from(folder: Path, path: Path) -> str:
    """An absolute path as a config in `folder` says it: relative where it lies below."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
