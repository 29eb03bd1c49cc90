"""Inputs behind URLs as local copies: fetched whole, hashed on the way, only ever read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

from shards.artifact import write_atomically
from shards.cache import Cache, Holding
from shards.errors import BadInput
from shards.remote import ObjectFacts, RemotePath
from shards.schema import digest

log = logging.getLogger("cellpair")

_HASHES_FILE: Final = ".sha256.json"  # written last: with it the copy is whole
_TELL_BYTES: Final = 10**8
_DOWNLOADS: Final = 4  # files at a time: a folder may hold thousands of small ones

# Files by their paths in a folder; a source that is a file itself has the path "".
Seen = dict[str, ObjectFacts]


def look_at(source: RemotePath) -> Seen:
    """What lies there now. Raises BadInput where nothing does."""
    try:
        return {"": source.stat()}
    except FileNotFoundError as error:
        with suppress(FileNotFoundError):  # no such bucket
            if seen := source.files():
                return seen
        raise BadInput(
            source,
            expected="an object, or a folder of objects",
            found="nothing there",
            remedy="mend the URL",
        ) from error


class Copies:
    """Copies of inputs, entries of `cache`.

    A copy is of one version of each object: one that was changed since is another copy.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def place(self, source: RemotePath, seen: Seen) -> Path:
        """Where the copy of a file or folder as it was `seen` is, or will be."""
        named = {name: [facts.st_size, facts.version] for name, facts in seen.items()}
        return self._cache.folder / f"input-{digest([source.url, named])}" / source.name

    def hold(self, source: RemotePath, seen: Seen, held: Holding) -> None:
        """Have the copy there for as long as it is `held`. Raises as `sha256s`."""
        if held.get(source) is None:
            self.sha256s(source, seen, held)

    def sha256s(self, source: RemotePath, seen: Seen, held: Holding) -> dict[str, str]:
        """The hashes of the files that were `seen`, which are fetched where they are not here.

        The copy is `held` then.

        Raises BadInput where one is another by now, BadSetting where the cache has no room.
        """
        copy = self.place(source, seen)
        entry = self._cache.entry(copy.parent.name)
        try:
            with entry.filling():
                found = entry.folder / _HASHES_FILE
                if not found.exists():
                    n_bytes = sum(facts.st_size for facts in seen.values())
                    entry.make_room(n_bytes, source)
                    if n_bytes > _TELL_BYTES:
                        log.info("%s: fetching %.1f GB", source, n_bytes / 1e9)
                    hashes = _fetch(source, seen, copy)
                    write_atomically(found, json.dumps(hashes).encode())
                hashes = json.loads(found.read_bytes())
        except BaseException:
            entry.close()
            raise
        held.add(source, entry)
        return {name: hashes[name] for name in seen}


def _fetch(source: RemotePath, seen: Mapping[str, ObjectFacts], copy: Path) -> dict[str, str]:
    def fetch(name: str) -> str:
        target, remote = (copy / name, source / name) if name else (copy, source)
        target.parent.mkdir(parents=True, exist_ok=True)
        # The copy is of these versions alone: what a stopped process left of a file is theirs.
        return remote.download(seen[name], target)

    with ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="files") as pool:
        return dict(zip(seen, pool.map(fetch, seen), strict=True))


def fetch_checked(source: RemotePath, facts: ObjectFacts | None, target: Path, sha256: str) -> None:
    """A file with the content that a record says, aside and then renamed to `target`.

    `facts` as the store tells them now, None where it has none. Raises BadInput where there is
    nothing, or another content.
    """
    found = "no such object"
    if facts is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{digest([source.url, facts.version])}.partial")
        if (got := source.download(facts, aside)) == sha256:
            aside.rename(target)
            return
        aside.unlink()
        found = f"sha256 {got} of {facts.st_size} bytes"
    raise BadInput(
        source,
        expected=f"the file that its record names, sha256 {sha256}",
        found=found,
        remedy=f"remove {source.parent} there, and run `cellpair curate` again",
    )
