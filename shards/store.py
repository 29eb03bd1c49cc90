"""Where artifacts and datasets are kept: an output folder, or a URL with a working copy of it.

Stages write local files, whatever the store. Behind a URL there is no rename, so the record is the
commit: an artifact's files are uploaded, then `artifact.json`; a dataset's, then `dataset.json`.
What is there of an artifact without its record is nothing, and is put again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Final, TypeVar

from pydantic import ValidationError

from shards.artifact import (
    RECORD_FILE,
    ArtifactRecord,
    Identity,
    Make,
    build_artifact,
    find_artifact,
    sha256_of,
    write_atomically,
)
from shards.cache import Cache, Entry, Holding, cache_folder
from shards.claim import CLAIM_SUFFIX, claimed
from shards.copies import fetch_checked
from shards.dataset import POINTER_FILE, publish_dataset
from shards.lock import hold
from shards.remote import ObjectFacts, RemotePath
from shards.schema import Dataset, digest

log = logging.getLogger("cellpair")

T = TypeVar("T")

_UPLOADS: Final = 4
# Texts of a working copy, by folder: what other runs of `curate` need to know, and people read.
_TEXTS: Final = {"": (".json", ".jsonl", ".toml"), "logs": (".log",), "report": (".html", ".says")}
_SAYS: Final = "report/.says"  # what the pages were written of
_PULLED_PAGES: Final = ("report/index.html", _SAYS)
# What must not outlive its removal there; a memory of hashes may.
_GONE_TOO: Final = (POINTER_FILE, "cellpair.json")
_GROWING: Final = (".jsonl", ".log")  # by appending: the longer one has more


class Store:
    """An output folder on a local or mounted file system: `root` is all there is."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self) -> list[str]:
        """Learn what other runs of `curate` left; names of files and folders that lie there."""
        return os.listdir(self.root)

    def claim(self, name: str, data: bytes) -> None:
        """Write a text at the root, and so find out whether this store can be written."""

    def find(self, directory: Path) -> ArtifactRecord | None:
        """The record of the artifact at `directory`, if it is there and whole by its sizes."""
        return find_artifact(directory)

    def build(
        self,
        parent: Path,
        identity: Identity,
        make: Make,
        *,
        provenance: Mapping[str, str],
        check_inputs: Callable[[], None],
        held: Holding,
    ) -> tuple[Path, ArtifactRecord, bool]:
        """As `build_artifact`; what the folder holds is for `at_hand` to see to."""
        return build_artifact(
            parent, identity, make, provenance=provenance, check_inputs=check_inputs
        )

    def at_hand(self, folder: Path, held: Holding, *, texts: bool = False) -> Path:
        """The folder of an artifact, as `build` gave it, with its files, or its JSON files only.

        They stay for as long as they are `held`.
        """
        return folder

    def publish(self, dataset: Dataset) -> None:
        publish_dataset(self.root, dataset)

    def save(self) -> None:
        """Have the texts of the working copy (log, history, pages) where others read them."""

    def told(self, path: Path) -> str:
        """Where a person finds a file of `root`."""
        return str(path)


class RemoteStore(Store):
    """What lies behind a URL. `root` is the working copy: stages are made there, then uploaded.

    Artifacts that were uploaded, or fetched since a later stage reads them, are entries of `cache`.
    Several processes of a machine may share `root` and `cache`; on several machines those that make
    the same artifact at once lose time, never bytes: see docs/storage.md.
    """

    def __init__(self, root: Path, remote: RemotePath, cache: Cache) -> None:
        super().__init__(root)
        self.remote = remote
        self._cache = cache
        self._known: dict[Path, tuple[RemotePath, ArtifactRecord]] = {}
        self._saved: dict[str, str] = {}  # SHA-256 of texts as they lie there

    def open(self) -> list[str]:
        there: dict[str, ObjectFacts] = {}
        for folder, suffixes in _TEXTS.items():
            found = (self.remote / folder if folder else self.remote).files(depth=1)
            names = {f"{folder}/{name}" if folder else name: facts for name, facts in found.items()}
            there |= {n: f for n, f in names.items() if n.endswith(suffixes)}
        says = self._text(_SAYS)
        pages = {n for n in there if n.startswith("report/")} - set(_PULLED_PAGES)
        for name in there.keys() - pages:
            path = self.root / name
            if name.endswith(_GROWING) and _n_bytes(path) >= there[name].st_size:
                continue
            data = (self.remote / name).read_bytes()
            write_atomically(path, data)
            self._saved[name] = sha256_of(path)
        for name in (*_GONE_TOO, *_PULLED_PAGES):
            if name not in there:
                (self.root / name).unlink(missing_ok=True)
        if says is not None and self._text(_SAYS) == says:  # the pages here are those there
            self._saved |= {n: sha256_of(self.root / n) for n in pages if self._text(n) is not None}
        return self.remote.names()

    def claim(self, name: str, data: bytes) -> None:
        (self.remote / name).write_bytes(data)

    def find(self, directory: Path) -> ArtifactRecord | None:
        at = self._behind(directory)
        try:
            record = ArtifactRecord.model_validate_json((at / RECORD_FILE).read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            log.warning("%s: not a record of this version; made again", at / RECORD_FILE)
            return None
        there = at.files()
        for name, facts in record.files.items():
            n_bytes = there[name].st_size if name in there else None
            if n_bytes != facts.n_bytes:
                found = "missing" if n_bytes is None else f"{n_bytes} bytes"
                log.warning("%s: %s, not %d bytes; made again", at / name, found, facts.n_bytes)
                return None
        return record

    def build(
        self,
        parent: Path,
        identity: Identity,
        make: Make,
        *,
        provenance: Mapping[str, str],
        check_inputs: Callable[[], None],
        held: Holding,
    ) -> tuple[Path, ArtifactRecord, bool]:
        directory = parent / identity.fingerprint
        if (record := self.find(directory)) is not None:
            return self._place_of(directory, record), record, True
        parent.mkdir(parents=True, exist_ok=True)
        lock = directory.with_name(f".{directory.name}.upload.lock")
        what = f"{parent.parent.name} {identity.stage}"
        claim = self._behind(directory.with_name(f".{directory.name}{CLAIM_SUFFIX}"))
        with hold(lock, what), claimed(claim, what):
            if (record := self.find(directory)) is not None:
                return self._place_of(directory, record), record, True
            _, record, reused = build_artifact(
                parent, identity, make, provenance=provenance, check_inputs=check_inputs
            )
            self._upload(directory, record)
            return self._moved(directory, record, held), record, reused

    def at_hand(self, folder: Path, held: Holding, *, texts: bool = False) -> Path:
        at, record = self._known[folder]
        names = [n for n in record.files if not texts or n.endswith(".json")]
        if (entry := held.get(folder)) is None:
            entry = self._cache.entry(folder.parent.name)
            held.add(folder, entry)
        with entry.filling():
            self._fetch(entry, folder, at, record, names)
        return folder

    def publish(self, dataset: Dataset) -> None:
        super().publish(dataset)
        for relative in (
            *dataset.panels.values(),
            *dataset.unions.values(),
            f"datasets/{dataset.fingerprint}.json",
        ):
            self._put(relative, may_be_there=True)
        self._put(POINTER_FILE, may_be_there=True)

    def save(self) -> None:
        for folder, suffixes in _TEXTS.items():
            paths = sorted((self.root / folder).glob("*"))
            for path in paths:
                name = path.relative_to(self.root).as_posix()
                if not path.is_file() or not name.endswith(suffixes) or name == POINTER_FILE:
                    continue
                self._put(name)

    def told(self, path: Path) -> str:
        return str(self._behind(path))

    def _text(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def _behind(self, path: Path) -> RemotePath:
        return self.remote / path.relative_to(self.root).as_posix()

    def _put(self, name: str, *, may_be_there: bool = False) -> None:
        """Put a text of the working copy, unless it is what this process knows to lie there."""
        path, there = self.root / name, self.remote / name
        sha256, data = sha256_of(path), path.read_bytes()
        if self._saved.get(name) == sha256:
            return
        if not (may_be_there and there.is_file() and there.read_bytes() == data):
            there.write_bytes(data)
        self._saved[name] = sha256

    def _upload(self, directory: Path, record: ArtifactRecord) -> None:
        """The files of an artifact, then its record; goes on from what an earlier try has put."""
        at = self._behind(directory)
        notes = directory.with_name(f".{directory.name}.uploaded.json")
        put = _read_notes(notes)
        there = at.files()
        if RECORD_FILE in there:  # of a damaged artifact: what follows is not whole until the end
            at.remove([RECORD_FILE])

        def upload(name: str) -> tuple[str, ObjectFacts]:
            if name not in put or there.get(name) != put[name]:
                return name, (at / name).upload(directory / name)
            return name, put[name]

        with ThreadPoolExecutor(_UPLOADS, thread_name_prefix="upload") as pool:
            for name, facts in _each(pool, upload, record.files):
                if facts.st_size != record.files[name].n_bytes:
                    raise ConnectionError(
                        f"{at / name}: {facts.st_size} bytes after an upload of "
                        f"{record.files[name].n_bytes}; run the same command again"
                    )
                if put.get(name) != facts:
                    put[name] = facts
                    _write_notes(notes, put)
        (at / RECORD_FILE).write_bytes((directory / RECORD_FILE).read_bytes())
        notes.unlink(missing_ok=True)

    def _moved(self, directory: Path, record: ArtifactRecord, held: Holding) -> Path:
        """An uploaded artifact as an entry of the cache, to be dropped once it is not held."""
        folder = self._place_of(directory, record)
        entry = self._cache.entry(folder.parent.name)
        held.add(folder, entry)
        with entry.filling():
            entry.make_room(_size(record), directory, is_here=True)
            shutil.rmtree(folder, ignore_errors=True)
            directory.rename(folder)
        return folder

    def _place_of(self, directory: Path, record: ArtifactRecord) -> Path:
        """Where an artifact lies in the cache, in as far as it does."""
        at = self._behind(directory)
        folder = self._cache.folder / f"artifact-{digest(at.url)}" / directory.name
        self._known[folder] = at, record
        return folder

    def _fetch(
        self,
        entry: Entry,
        folder: Path,
        at: RemotePath,
        record: ArtifactRecord,
        names: Iterable[str],
    ) -> None:
        """These files and the record, each whole and with the hash that the record says."""
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            there = at.files()
            here = [name for name in record.files if (folder / name).exists()]
            entry.make_room(sum(record.files[n].n_bytes for n in (*here, *missing)), at)
            for name in missing:
                fetch_checked(at / name, there.get(name), folder / name, record.files[name].sha256)
        if not (folder / RECORD_FILE).exists():
            text = record.model_dump_json(indent=1)
            write_atomically(folder / RECORD_FILE, text.encode())


def working_folder(remote: RemotePath) -> Path:
    """The folder of the working copy of what lies behind a URL; one for each URL."""
    return cache_folder() / "work" / digest(remote.url)


def store_of(root: Path, remote: RemotePath | None) -> Store:
    """The store of an output folder, or of the URL that it is the working copy of."""
    return Store(root) if remote is None else RemoteStore(root, remote, Cache.of_user())


def _each(pool: ThreadPoolExecutor, work: Callable[[str], T], names: Iterable[str]) -> Iterator[T]:
    """Results as they come; after an error those of what had begun, and then the error."""
    futures = [pool.submit(work, name) for name in names]
    failed: BaseException | None = None
    for future in as_completed(futures):
        if future.cancelled():
            continue
        if (error := future.exception()) is None:
            yield future.result()
        elif failed is None:
            failed = error
            for other in futures:
                other.cancel()
    if failed is not None:
        raise failed


def _size(record: ArtifactRecord) -> int:
    return sum(facts.n_bytes for facts in record.files.values())


def _n_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _read_notes(path: Path) -> dict[str, ObjectFacts]:
    try:
        noted = json.loads(path.read_bytes())
        return {name: ObjectFacts(*facts) for name, facts in noted.items()}
    except (FileNotFoundError, ValueError):
        return {}


def _write_notes(path: Path, put: Mapping[str, ObjectFacts]) -> None:
    noted = {name: [facts.st_size, facts.version] for name, facts in put.items()}
    write_atomically(path, json.dumps(noted).encode())
