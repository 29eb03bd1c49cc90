"""A dataset behind a URL as a folder of this machine: its texts, and of other files the size alone.

What has to be read of the others is fetched when it is asked for, a shard at a time, so that a
dataset of any size is checked on a small disk.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from shards.artifact import write_atomically
from shards.cache import Cache, Entry
from shards.dataset import read_dataset
from shards.errors import BadInput
from shards.remote import ObjectFacts, RemotePath

_TEXTS: Final = (".json", ".jsonl", ".log", ".html", ".toml")


class View:
    """A folder, `root`, of what lies behind `remote`; `path` in it is what was asked for."""

    def __init__(self, remote: RemotePath, entry: Entry) -> None:
        self.remote = remote
        self.root = entry.folder / "view"
        self.root.mkdir()
        self._entry = entry
        self._facts: dict[str, ObjectFacts] = {}
        self._fetched: dict[str, int] = {}
        self._run = ""

    def add(self, folder: str = "", depth: int | None = None) -> dict[str, ObjectFacts]:
        """Put the files below a folder there: texts whole, others as holes of their size."""
        at = self.remote / folder if folder else self.remote
        found = {f"{folder}/{n}" if folder else n: f for n, f in at.files(depth).items()}
        for name, facts in found.items():
            if name.endswith(_TEXTS) or name.endswith(".says"):
                write_atomically(self.root / name, (self.remote / name).read_bytes())
            else:
                self._hole(name, facts)
        self._facts |= found
        return found

    def fetch_shard(self, run: str, name: str) -> None:
        """Have the tar and the table of a shard there; tars fetched before, and tables of another
        shard set, go."""
        for there in list(self._fetched):
            if there.endswith(".tar") or run != self._run:
                self._hole(there, self._facts[there])
                del self._fetched[there]
        self._run = run
        self.fetch((f"{run}/{name}.tar", f"{run}/{name}.parquet"))

    def fetch(self, names: Iterable[str]) -> None:
        """Have these files there too, in so far as they are behind the URL.

        Raises BadSetting where the cache has no room for all that was fetched.
        """
        wanted = [name for name in names if name in self._facts and not name.endswith(_TEXTS)]
        self._fetched |= {name: self._facts[name].st_size for name in wanted}
        self._entry.make_room(sum(self._fetched.values()), self.remote)
        for relative in wanted:
            path = self.root / relative
            path.unlink()
            (self.remote / relative).download(self._facts[relative], path)

    def told(self, text: str) -> str:
        """A text with the URL in the place of the view's folder."""
        return text.replace(str(self.root), str(self.remote))

    def _hole(self, name: str, facts: ObjectFacts) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(facts.st_size)


@contextmanager
def view_of(remote: RemotePath) -> Iterator[View]:
    """An empty view, in the cache; it is gone on leaving."""
    cache = Cache.of_user()
    name = f"view-{secrets.token_hex(8)}"
    entry = cache.entry(name)
    try:
        yield View(remote, entry)
    finally:
        entry.close()
        cache.drop(name)


@contextmanager
def dataset_view(asked: RemotePath) -> Iterator[tuple[View, Path]]:
    """The dataset at a URL as `read_dataset` takes it, and its path in the view.

    In so far as it is there and can be read: what is wrong with it is for the reader to find.
    """
    root = asked
    if asked.name.endswith(".json"):
        root = asked.parent if asked.parent.name != "datasets" else asked.parent.parent
    with view_of(root) as view:
        path = view.root / asked.url.removeprefix(root.url).lstrip("/")
        view.add(depth=1)
        view.add("datasets")
        view.add("panels")
        try:
            dataset, _ = read_dataset(path)
        except BadInput:
            pass  # told to whoever reads it next
        else:
            for run in dataset.runs:
                view.add(run.path)
        yield view, path
