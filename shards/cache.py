"""Copies of what lies behind URLs: folders below the user's cache, within a bound of bytes.

An entry is a folder. Whoever uses it holds it; the entries that nobody holds go, the longest unused
first, when another needs room. Holds are locks of the system (`flock`), which end with the process
that has them, so the cache has to lie on a local disk.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from shards.errors import BadSetting

CACHE_BYTES: Final = 200 * 10**9
_BOUND: Final = "CELLPAIR_CACHE_BYTES"
_ENTRY_FILE: Final = ".entry"  # its content: the bytes that the entry may take
_FILL_FILE: Final = ".filling"
_LOCK_FILE: Final = ".lock"
_GONE: Final = ".gone-"


def cache_folder() -> Path:
    """$CELLPAIR_CACHE, else the user's cache folder."""
    if given := os.environ.get("CELLPAIR_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cellpair"


def cache_bytes() -> int:
    """The bound: $CELLPAIR_CACHE_BYTES, else 200 GB. Raises BadSetting where it is no number."""
    given = os.environ.get(_BOUND)
    if given is None:
        return CACHE_BYTES
    if not given.isdecimal():
        raise BadSetting(
            _BOUND,
            expected="a number of bytes, as 200000000000",
            found=repr(given),
            remedy="mend it, or leave it out",
        )
    return int(given)


class Cache:
    """The copies below `folder`, of no more than `limit_bytes` in all."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder / "copies"
        self.limit_bytes = limit_bytes

    @classmethod
    def of_user(cls) -> Cache:
        return cls(cache_folder(), cache_bytes())

    def entry(self, name: str) -> Entry:
        """The entry of this name (letters, digits, `-`), made if need be, and held until closed."""
        folder = self.folder / name
        with self._alone():
            folder.mkdir(exist_ok=True)
            marker = os.open(folder / _ENTRY_FILE, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(marker, fcntl.LOCK_SH)
            os.utime(marker)
        return Entry(self, folder, marker)

    def make_room(self, entry: Entry, n_bytes: int, what: object, *, is_here: bool = False) -> None:
        """Let the entry grow to `n_bytes`, of `what`; what nobody holds goes as far as is needed.

        Raises BadSetting where those that are held leave too little room, unless the bytes take
        their room already (`is_here`).
        """
        with self._alone():
            if n_bytes <= entry.n_bytes:
                return
            sizes = {f: _n_bytes(f) for f in self._entries() if f != entry.folder}
            n_held = sum(sizes.values())
            for folder in sorted(sizes, key=_used_ns):
                if n_held + n_bytes <= self.limit_bytes:
                    break
                if self._dropped(folder):
                    n_held -= sizes[folder]
            if n_held + n_bytes > self.limit_bytes and not is_here:
                held = f", beside {n_held} that are in use" if n_held else ""
                raise BadSetting(
                    _BOUND,
                    expected=f"room for {n_bytes} bytes of {what}{held}, below {self.folder}",
                    found=f"{self.limit_bytes} in all",
                    remedy=f"raise {_BOUND}, set CELLPAIR_CACHE to a larger disk, or copy the "
                    "input to a local folder",
                )
            os.pwrite(entry.marker, f"{n_bytes:>20}".encode(), 0)

    def drop(self, name: str) -> bool:
        """Remove an entry, unless somebody holds it; whether it is gone."""
        with self._alone():
            folder = self.folder / name
            return not folder.exists() or self._dropped(folder)

    def clear(self) -> None:
        """Remove every entry that nobody holds."""
        with self._alone():
            for folder in self._entries():
                self._dropped(folder)

    def _entries(self) -> list[Path]:
        return [p for p in self.folder.iterdir() if not p.name.startswith(".")]

    def _dropped(self, folder: Path) -> bool:
        try:
            marker = os.open(folder / _ENTRY_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            # Hidden whole before it is deleted: a process killed here leaves no half of an entry.
            gone = folder.rename(folder.with_name(f"{_GONE}{secrets.token_hex(4)}"))
            shutil.rmtree(gone)
            return True
        finally:
            os.close(marker)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK_FILE).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for gone in self.folder.glob(f"{_GONE}*"):
                shutil.rmtree(gone)
            yield


class Entry:
    """A folder of the cache, held: it stays until it is closed."""

    def __init__(self, cache: Cache, folder: Path, marker: int) -> None:
        self.folder = folder
        self.marker = marker
        self._cache = cache

    @property
    def n_bytes(self) -> int:
        """The bytes that it may take."""
        return int(os.pread(self.marker, 20, 0) or b"0")

    def make_room(self, n_bytes: int, what: object, *, is_here: bool = False) -> None:
        """Let it grow to so many bytes, of `what`. Raises BadSetting as `Cache.make_room`."""
        self._cache.make_room(self, n_bytes, what, is_here=is_here)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """While this goes on no other process fills the entry."""
        with (self.folder / _FILL_FILE).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def close(self) -> None:
        if self.marker >= 0:
            os.close(self.marker)
            self.marker = -1


class Holding:
    """Entries that one user of the cache needs, by what they are copies of; until `close`."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, Entry] = {}

    def get(self, key: Hashable) -> Entry | None:
        return self._entries.get(key)

    def add(self, key: Hashable, entry: Entry) -> None:
        """Hold it, and no more another one of the same."""
        before = self._entries.get(key)
        self._entries[key] = entry
        if before is not None:
            before.close()

    def close(self) -> None:
        """None of them is needed any more. Others may be added then."""
        for entry in self._entries.values():
            entry.close()
        self._entries.clear()


def _n_bytes(folder: Path) -> int:
    try:
        return int((folder / _ENTRY_FILE).read_bytes() or b"0")
    except FileNotFoundError:
        return 0


def _used_ns(folder: Path) -> int:
    try:
        return (folder / _ENTRY_FILE).stat().st_mtime_ns
    except FileNotFoundError:
        return 0
