"""The registration of one run: transform, figures, verdict and its reasons."""

from __future__ import annotations

from typing import Final, Literal

from pairing.geometry import Affine
from shards.schema import Record

SCHEMA_VERSION: Final = 1
REGISTRATION_FILE = "registration.json"

Verdict = Literal["pass", "doubtful", "fail", "not_assessable"]


class KeypointFit(Record):
    """How well one affine explains all keypoints; residuals on the slide, in µm."""

    n_points: int
    rms_um: float
    max_um: float
    residuals_um: tuple[float, ...]


class Registration(Record):
    """`registration.json`. The transform maps Xenium µm to level-0 pixels of the slide.

    `density_correlation` holds the correlation of stained tissue with the density of the cells,
    for the transform as given and for the variants that people get wrong. `error_um` is null
    until an automatic registration measures it.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    method: Literal["matrix", "keypoints"]
    he_px_from_xenium_um: tuple[
        tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]
    ]
    n_cells: int
    slide_mpp: float
    implied_mpp: float
    share_on_slide: float
    density_correlation: dict[str, float]
    keypoints: KeypointFit | None
    verdict: Verdict
    reasons: tuple[str, ...]
    error_um: None = None

    @property
    def affine(self) -> Affine:
        return Affine.of(self.he_px_from_xenium_um)
