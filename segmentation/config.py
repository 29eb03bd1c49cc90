"""What decides the nuclei that are found, told without torch: a run that is done never loads it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

from shards.errors import BadInput
from shards.schema import Record

STAGE_VERSION = 3
NUCLEI_FILE = "nuclei.parquet"
COMPACT_PATH: Final = Path(__file__).parent / "weights" / "compact.pt"
# The strides of networks multiply to 16: their windows are multiples of it.
GRID_PX = 16
# Nuclei are found block by block, in pixels of the network's mpp; larger ones spend less on halos,
# smaller ones less memory.
BLOCK_PX = 1024


class SegmentationConfig(Record):
    """What changes the nuclei that are found: `model`, "compact" or a path to Cellpose 4 weights.

    The size of blocks doesn't, nor do workers, their order or the device's batch.
    """

    model: str = "compact"

    def fingerprint_config(self) -> dict[str, Any]:
        """Nothing yet: the content of the weights enters by `weights_digest`, not their path."""
        return self.model_dump(exclude={"model"})


def weights_path(model: str) -> Path:
    """The file of the weights that `model` names. Raises BadInput where there is none."""
    path = COMPACT_PATH if model == "compact" else Path(model)
    if not path.is_file():
        raise BadInput(
            f"model = {model!r}",
            expected="compact, or the path of Cellpose 4 weights",
            found="no such file",
            remedy="download the weights yourself and give their path; nothing is fetched here",
        )
    return path


def weights_digest(model: str) -> str:
    """SHA-256 of the weights that `model` names, for fingerprints. Raises as `weights_path`."""
    return hashlib.sha256(weights_path(model).read_bytes()).hexdigest()
