"""What decides the nuclei that are found, told without torch: a run that is done never loads it."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from pairing.slide import Damage, Slide
from shards.errors import BadInput
from shards.schema import Record

STAGE_VERSION = 4
NUCLEI_FILE = "nuclei.parquet"
FACTS_FILE = "segmentation.json"
COMPACT_PATH: Final = Path(__file__).parent / "weights" / "compact.pt"
# The strides of networks multiply to 16: their windows are multiples of it.
GRID_PX = 16
# Nuclei are found block by block, in pixels of the network's mpp; larger ones spend less on halos,
# smaller ones less memory.
BLOCK_PX = 1024
# Finer than any light microscope sees, and so coarse that a nucleus is four pixels wide.
_USABLE_MPP: Final = (0.05, 2.0)
# The weights that Cellpose 4.2.1.1 itself downloads, by the names of their files.
CELLPOSE_NAMES: Final = ("cpsam_v2", "cpdino", "cpdino-vitb", "cpsam")


class SegmentationConfig(Record):
    """What changes the nuclei that are found.

    `model` is "compact", a name of `CELLPOSE_NAMES` or a path to Cellpose 4 weights. The size of
    blocks changes nothing, nor do workers, their order or how many windows are run at once.
    """

    model: str = "compact"

    def fingerprint_config(self) -> dict[str, Any]:
        """Nothing yet: the content of the weights enters by `weights_digest`, not their path."""
        return self.model_dump(exclude={"model"})


class SegmentationFacts(Record):
    """`segmentation.json` beside the table: how a slide was segmented, and where nothing was found.

    `slide_mpp` is of level 0, in whose pixels the table is, `network_mpp` that of label images;
    `n_windows` show tissue or its margin, and cover `looked_at_mm2`; in the middles of
    `n_empty_windows` of them no nucleus lies. In `damage` nothing was looked for.
    """

    slide_mpp: float
    network_mpp: float
    weights_sha256: str
    device: str
    n_nuclei: int
    n_windows: int
    n_empty_windows: int
    looked_at_mm2: float
    damage: tuple[Damage, ...]


def require_usable(slide: Slide) -> None:
    """Raises BadInput unless nuclei can be looked for: in colours, at a pixel size they show at."""
    slide.require_rgb()
    low, high = _USABLE_MPP
    if not low <= slide.mpp <= high:
        raise BadInput(
            slide.path,
            expected=f"a slide of {low:g} to {high:g} µm a pixel: a nucleus is some 8 µm wide",
            found=f"{slide.mpp:g} µm a pixel",
            remedy="give its true pixel size in µm: `mpp = …` of the run in the config, or --mpp",
        )


def weights_path(model: str) -> Path:
    """The file of the weights that `model` names: "compact", a name of Cellpose's, or a path.

    Cellpose's names mean files in the folder where it keeps them (CELLPOSE_LOCAL_MODELS_PATH, else
    .cellpose/models in the home); a file of such a name elsewhere is told by a path with a slash.
    Nothing is downloaded. Raises BadInput where there is no such file.
    """
    if model in CELLPOSE_NAMES:
        folder = os.environ.get("CELLPOSE_LOCAL_MODELS_PATH") or Path.home() / ".cellpose/models"
        path = Path(folder) / model
        expected = f"the file {path}, where Cellpose itself would keep it"
        remedy = (
            "on a machine with a network and Cellpose 4.2.1.1, run python -c "
            f"\"from cellpose.models import cache_model_path; cache_model_path('{model}')\" "
            f"and copy .cellpose/models/{model} from its home to here, or give their path; "
            "nothing is fetched here"
        )
    else:
        path = COMPACT_PATH if model == "compact" else Path(model)
        expected = f"compact, {', '.join(CELLPOSE_NAMES)}, or the path of Cellpose 4 weights"
        remedy = "check the name, or download weights and give their path: nothing is fetched here"
    if not path.is_file():
        raise BadInput(f"model = {model!r}", expected=expected, found="no such file", remedy=remedy)
    return path


def weights_digest(model: str) -> str:
    """SHA-256 of the weights that `model` names, for fingerprints. Raises as `weights_path`.

    Every run of a corpus asks for it: a file is read once, while its size and time are the same.
    """
    path = weights_path(model)
    stat = path.stat()
    return _digest_of_file(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def _digest_of_file(path: Path, n_bytes: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
