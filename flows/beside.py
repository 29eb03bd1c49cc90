"""What the names around a bundle say: the id of its run, and files that may belong to it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pairing.slide import TIFF_SUFFIXES
from pairing.xenium.files import MANIFEST, is_spatialdata

Kind = Literal["slide", "matrix", "keypoints", "other"]

# What the instrument calls its folder: instrument, slide, region, date and time of the scan. The
# first and the last two stay out of ids, which go into every shard.
_INSTRUMENTS = re.compile(r"output-[^_]+__(?P<slide>.+?)__(?P<region>.+)__\d{6,8}__\d{6}")
# Endings of the names under which whole bundles are shared.
_OF_BUNDLES = re.compile(r"(_xe)?_(outs|xe)$")

# Names that 10x and the simulator give, after the name of the sample. An alignment of an
# immunofluorescence image (`if`) is none of a H&E.
_KINDS: dict[Kind, re.Pattern[str]] = {
    "slide": re.compile(r"(?:(?P<sample>.+?)_)?he(_image.*)?\.ome\.tif"),
    "matrix": re.compile(r"(?P<sample>.*?)[_ -]?(he_)?(?<!if_)imagealignment.*\.csv"),
    "keypoints": re.compile(r"(?P<sample>.*?)[_ -]?(he_)?(?<!if_)keypoints.*\.csv"),
}
_OTHER_SLIDES = TIFF_SUFFIXES | {".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".svslide"}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file in a bundle's folder or next to it that may belong to it, by its name.

    `clear` where no other bundle lies there, or the file bears the name of the bundle's sample.
    """

    path: Path
    kind: Kind
    clear: bool


def look_beside(bundle: Path) -> list[Candidate]:
    """Slides and alignments in a bundle's folder and next to it, by name; none is picked here."""
    sample = sample_name(bundle)
    alone = not any(_may_be_bundle(p) for p in bundle.parent.iterdir() if p != bundle)
    found = []
    for folder in (bundle, bundle.parent):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if not path.is_file() or path.name.startswith("._"):
                continue
            for kind, pattern in _KINDS.items():
                if told := pattern.fullmatch(path.name):
                    clear = folder == bundle or alone or told["sample"] == sample
                    found.append(Candidate(path, kind, clear))
                    break
            else:
                # Inside, they are the bundle's own pictures.
                if folder != bundle and path.suffix.lower() in _OTHER_SLIDES:
                    found.append(Candidate(path, "other", False))
    return found


def run_ids(bundles: Iterable[Path]) -> list[str]:
    """An id for each bundle, by its name: valid, unique, and without the date of a scan."""
    ids: list[str] = []
    for bundle in bundles:
        name = sample_name(bundle)
        if told := _INSTRUMENTS.fullmatch(name):
            name = f"{told['slide']}-{told['region']}"
        in_ascii = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", in_ascii).strip("-_") or "run"
        run_id, number = stem, 1
        while run_id in ids:
            number += 1
            run_id = f"{stem}-{number}"
        ids.append(run_id)
    return ids


def sample_name(bundle: Path) -> str:
    """The name of the sample: that of the bundle, or of the folder of a bundle called `outs`."""
    name = bundle.stem if bundle.suffix.lower() in (".zip", ".zarr") else bundle.name
    return bundle.parent.name if name.lower() == "outs" else _OF_BUNDLES.sub("", name)


def _may_be_bundle(path: Path) -> bool:
    # Of a zip this is not looked up: to call a file unclear harms nobody.
    return path.suffix.lower() == ".zip" or (path / MANIFEST).is_file() or is_spatialdata(path)
