"""Content hashes of raw inputs, remembered, so that the second run of a 60 GB bundle is quick."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import cached_property
from pathlib import Path

from shards.artifact import sha256_of, write_if_changed
from shards.cache import Cache, Holding
from shards.copies import Copies, Seen, look_at
from shards.errors import BadInput
from shards.remote import Location, ObjectFacts, RemotePath
from shards.schema import digest

log = logging.getLogger("cellpair")

# A file changed within this time before it was read may change again without a new mtime: file
# systems count in ticks of up to 2 s (FAT). Its hash is not remembered.
_SETTLED_NS = 3 * 10**9
_TELL_BYTES = 10**9

# Errors that a person mends; of others (a disk that fails, a server away) the system's words stand.
_MENDABLE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR)

_Seen = dict[Path, tuple[int, int]]  # size and mtime_ns


class ContentHashes:
    """Content hashes of files and folders, remembered by (path, size, mtime) in a file.

    A folder's hash is of its files' relative paths and hashes. The memory can be lost or shared by
    several processes: it only saves time. What lies behind a URL has the hash that it would have
    here; it is remembered by what the store says of its version, and fetched to know it.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known = _remembered(memory)
        self._seen: dict[Path, _Seen] = {}
        self._learnt = False
        self._seen_there: dict[RemotePath, Seen] = {}

    @cached_property
    def copies(self) -> Copies:
        """Local copies of the inputs behind URLs."""
        return Copies(Cache.of_user())

    def of(self, path: Location, held: Holding | None = None) -> str:
        """20 hex digits for a file or a folder.

        Where a copy has to be fetched to know them it is `held` then; without, it is let go.
        Raises BadInput where a file changes while it is read, or can't be read at all.
        """
        if isinstance(path, RemotePath):
            return self._of_remote(path, held)
        self._seen[path] = seen = _look_at(path)
        keys = {p: _key(p, s) for p, s in seen.items()}
        n_new_bytes = sum(s[0] for p, s in seen.items() if keys[p] not in self._known)
        if n_new_bytes > _TELL_BYTES:
            log.info("%s: reading %.1f GB to know its content", path, n_new_bytes / 1e9)
        hashes = {p: self._file(p, keys[p], s) for p, s in seen.items()}
        self.check_unchanged(path)
        if path.is_dir():
            return digest([[str(p.relative_to(path)), sha256] for p, sha256 in hashes.items()])
        return hashes[path][:20]

    def paths(self) -> list[Path]:
        """The files whose hashes are remembered, wherever they are now."""
        return [Path(key.rsplit("|", 2)[0]) for key in self._known]

    def remembered(self, path: Path) -> str | None:
        """As `of`, from memory alone; None where a file is gone, or not as it is remembered."""
        try:
            seen = _look_at(path)
        except BadInput:
            return None
        return self.of(path) if all(_key(p, s) in self._known for p, s in seen.items()) else None

    def _of_remote(self, source: RemotePath, held: Holding | None) -> str:
        self._seen_there[source] = seen = look_at(source)
        keys = {name: _key_there(source, name, facts) for name, facts in seen.items()}
        if any(key not in self._known for key in keys.values()):
            with closing(Holding()) as own:
                hashes = self.copies.sha256s(source, seen, held or own)
            self._learnt = True
            self._known |= {keys[n]: hashes[n] for n, facts in seen.items() if facts.version}
        else:
            hashes = {name: self._known[key] for name, key in keys.items()}
        if "" in hashes:
            return hashes[""][:20]
        return digest([[name, sha256] for name, sha256 in hashes.items()])

    def check_unchanged(self, path: Location) -> None:
        """Raise BadInput where a file has another size or time than when it was hashed.

        Of what lies behind a URL, a copy of what was hashed is what is worked on: it can't change.
        """
        if isinstance(path, RemotePath):
            return
        now = _look_at(path)
        before = self._seen[path]
        for changed in sorted(p for p in now.keys() | before.keys() if now.get(p) != before.get(p)):
            raise BadInput(
                changed,
                expected="an input that stays as it is while it is worked on",
                found="another size or time than when its content was hashed",
                remedy="wait until it is copied whole, then run again",
            )

    def place_of(self, path: Location) -> Path:
        """A hashed file or folder itself, or where the copy of what was hashed will be."""
        if isinstance(path, RemotePath):
            return self.copies.place(path, self._seen_there[path])
        return path

    def hold(self, paths: Iterable[Location], held: Holding) -> None:
        """Have the copies of what was hashed behind URLs there for as long as they are `held`.

        Raises BadInput where there is something else by now, BadSetting where the cache has no
        room.
        """
        for path in paths:
            if isinstance(path, RemotePath):
                self.copies.hold(path, self._seen_there[path], held)

    def save(self) -> None:
        """Write the memory, with what other processes have remembered meanwhile.

        Nothing is written where nothing was learnt since: of hundreds of runs that are as they
        were, the memory of all would be written for each.
        """
        if not self._learnt and self._memory.exists():
            return
        known = {**_remembered(self._memory), **self._known}
        data = json.dumps(known, indent=0, sort_keys=True).encode()
        write_if_changed(self._memory, data)
        self._learnt = False

    def _file(self, path: Path, key: str, seen: tuple[int, int]) -> str:
        sha256 = self._known.get(key)
        if sha256 is None:
            settled = time.time_ns() - seen[1] > _SETTLED_NS
            try:
                sha256 = sha256_of(path)
            except OSError as error:
                raise _mendable(path, error) from error
            if settled:
                self._known[key] = sha256
                self._learnt = True
        return sha256


def _look_at(path: Path) -> _Seen:
    seen = {}
    try:
        for file in sorted(_files_of(path)) if path.is_dir() else [path]:
            stat = file.stat()
            seen[file] = (stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise _mendable(path, error) from error
    return seen


def _files_of(folder: Path) -> Iterator[Path]:
    """Files below a folder, linked folders too; macOS `._*` leftovers are no content."""
    been = set()

    def fail(error: OSError) -> None:
        raise error

    for where, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        been.add(os.path.realpath(where))
        folders[:] = [f for f in folders if os.path.realpath(os.path.join(where, f)) not in been]
        yield from (Path(where, name) for name in names if not name.startswith("._"))


def _key(path: Path, seen: tuple[int, int]) -> str:
    return f"{path.resolve()}|{seen[0]}|{seen[1]}"


def _key_there(source: RemotePath, name: str, facts: ObjectFacts) -> str:
    at = source / name if name else source
    return f"{at}|{facts.st_size}|{facts.version}"


def _mendable(path: Path, error: OSError) -> Exception:
    if error.errno not in _MENDABLE:
        return error
    return BadInput(
        error.filename or path,
        expected="a file that can be read",
        found=error.strerror or str(error),
        remedy="mend its path or its rights",
    )


def _remembered(memory: Path) -> dict[str, str]:
    try:
        known = json.loads(memory.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        known = None
    if not isinstance(known, dict) or not all(isinstance(v, str) for v in known.values()):
        log.warning("%s: not readable; raw inputs are hashed again", memory)
        return {}
    return known
