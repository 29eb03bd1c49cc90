"""The raw files of one run: hashed, and fetched where they lie behind URLs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from flows.config import RUN_FILES, GivenRun, RunConfig
from pairing.xenium import open_xenium
from shards.cache import Holding
from shards.content import ContentHashes
from shards.remote import RemotePath


class RunFiles:
    """`inputs` are the hashes of a run's files by their key in the config.

    `run` names where the files, or copies of them, are while they are held. So are artifacts that
    are needed of a store behind a URL, by the same `held`.
    """

    def __init__(self, given: GivenRun, hashes: ContentHashes, held: Holding) -> None:
        paths = {key: getattr(given, key) for key in RUN_FILES}
        self._hashes = hashes
        self.held = held
        self._files = {k: path for k, path in paths.items() if isinstance(path, Path | RemotePath)}
        self.inputs = {key: hashes.of(path, self.held) for key, path in self._files.items()}
        places = {key: hashes.place_of(path) for key, path in self._files.items()}
        self.run = RunConfig.model_construct(**{**dict(given), **places})

    def hold(self) -> None:
        """Have copies of the files behind URLs there."""
        self._hashes.hold(self._files.values(), self.held)

    def check_unchanged(self, inputs: Iterable[str]) -> None:
        """Raises BadInput where one of these, by key, is not as it was when it was hashed."""
        for key in inputs:
            if key in RUN_FILES:
                self._hashes.check_unchanged(self._files[key])

    def cell_ids(self) -> pd.Series[str]:
        """Of all of the instrument's cells, in their order."""
        self.hold()
        with open_xenium(self.run.xenium) as xenium:
            return xenium.read_cells()["cell_id"]
