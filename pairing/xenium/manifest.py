"""`experiment.xenium`: what a bundle says of itself."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairing.xenium.files import MANIFEST, BundleFiles
from shards.errors import BadInput


@dataclass(frozen=True, slots=True)
class Manifest:
    """µm per pixel of the morphology image; `human`, `mouse` or None; software and panel by name.

    The software is told to people and decides nothing: official data carry "R&D" as its version.
    """

    pixel_size_um: float
    species: str | None
    provenance: dict[str, str]


def read_manifest(path: Path, files: BundleFiles) -> Manifest:
    """The manifest of the bundle at `path`; BadInput where it is damaged or has no pixel size."""
    told = _read_json(path, files)
    pixel_size = told.get("pixel_size")
    if not isinstance(pixel_size, int | float) or not 0 < pixel_size < math.inf:
        raise BadInput(
            f"{path}, {MANIFEST}",
            expected="pixel_size: µm per pixel of the morphology image",
            found=repr(pixel_size),
            remedy=f"copy the instrument's own {MANIFEST}",
        )
    organism = str(told.get("panel_organism", "")).strip().lower()
    # A run that was segmented again is of the software that did that.
    ranger = told.get("xenium_ranger") or {}
    software = f"xenium-ranger {ranger['version']}" if "version" in ranger else None
    provenance = {
        "software": software or told.get("analysis_sw_version"),
        "panel": told.get("panel_name"),
    }
    return Manifest(
        float(pixel_size),
        organism if organism in {"human", "mouse"} else None,
        {key: str(value) for key, value in provenance.items() if value},
    )


def _read_json(path: Path, files: BundleFiles) -> dict[str, Any]:
    file = files.path(MANIFEST)
    try:
        told = json.loads(file.read_text("utf-8-sig"))
        found = f"a JSON {type(told).__name__}"
    except (ValueError, RecursionError) as error:
        told, found = None, str(error)
    if not isinstance(told, dict):
        raise BadInput(
            f"{path}, {MANIFEST}",
            expected="a JSON object",
            found=found,
            remedy=f"copy the instrument's own {MANIFEST}",
        )
    return told
