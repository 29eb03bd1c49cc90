"""What decides the nuclei that are found, told without torch: a run that is done never loads it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

from pydantic import Field

from shards.errors import BadInput
from shards.schema import Record

STAGE_VERSION = 2
NUCLEI_FILE = "nuclei.parquet"
COMPACT_PATH: Final = Path(__file__).parent / "weights" / "compact.pt"
# The network's strides multiply to 16: on a grid of multiples of it every block sees the same.
GRID_PX = 16


class SegmentationConfig(Record):
    """What changes the nuclei that are found.

    `model` is "compact" or a path to Cellpose 4 weights; block and halo are in pixels of the
    network's mpp. A halo of 64 px holds a nucleus and the way its pixels flow.
    """

    model: str = "compact"
    block_px: int = Field(default=1024, ge=GRID_PX, multiple_of=GRID_PX)
    halo_px: int = Field(default=64, ge=0, multiple_of=GRID_PX)

    def fingerprint_config(self) -> dict[str, Any]:
        """All of it but the path of the weights: their content enters by `weights_digest`."""
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
