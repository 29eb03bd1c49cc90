"""Where the bundle of a run lies: as its curation left it, or as it is given; told by content."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from flows.removals import HASHES_FILE
from pairing.xenium.files import MANIFEST
from shards.content import ContentHashes
from shards.errors import BadInput


class Bundles:
    """Finds bundles by their content: those that are given, else those that `curate` read."""

    def __init__(self, root: Path, given: Sequence[Path]) -> None:
        self._hashes = ContentHashes(root / HASHES_FILE)
        self._given = {self._hashes.of(path): path for path in given}

    def find(self, run: str, content: str) -> Path:
        """The bundle of this content hash; one that `curate` read must be as it was then.

        Raises BadInput where there is none.
        """
        if content in self._given:
            return self._given[content]
        if content in self._curated:
            return self._curated[content]
        raise BadInput(
            f"run {run}",
            expected="its Xenium bundle, for the outlines of its cells",
            found="none of its content"
            + (f" among {len(self._given)} given" if self._given else " where it was curated from"),
            remedy="name it by --xenium, or draw circles of the cells' areas by --outlines circles",
        )

    @cached_property
    def _curated(self) -> dict[str | None, Path]:
        """Bundles, zips and stores among the files that were hashed, by content."""
        found: dict[Path, None] = {}
        for file in self._hashes.paths():
            if file.name == MANIFEST:
                found[file.parent] = None
            elif file.suffix == ".zip":
                found[file] = None
            stores = [parent for parent in file.parents if parent.suffix == ".zarr"]
            found |= dict.fromkeys(stores)
        return {self._hashes.remembered(path): path for path in found}
