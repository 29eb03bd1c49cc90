"""`cellpair segment`: the nuclei of one slide or picture, for other tools and for a person."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

from flows.cluster import BlockMap, Runtime
from flows.log import working_on
from flows.report.nuclei_page import PAGE_FILE, write_nuclei_page
from pairing.slide import open_slide
from segmentation.config import (
    FACTS_FILE,
    NUCLEI_FILE,
    STAGE_VERSION,
    SegmentationConfig,
    SegmentationFacts,
    require_usable,
    weights_digest,
)
from shards.artifact import write_atomically, written_aside
from shards.dataset import read_record
from shards.errors import BadInput
from shards.schema import digest

log = logging.getLogger("cellpair")

GEOJSON_FILE, OVERVIEW_FILE = "nuclei.geojson", "overview.png"
LABELS_FOLDER, LABELS_FILE = "labels.zarr", "labels.ome.tif"
# What the folder was made of, written last.
IDENTITY_FILE = ".made-from"
_WORK = ".segment-"
_FILES = (NUCLEI_FILE, LABELS_FOLDER, LABELS_FILE, GEOJSON_FILE, OVERVIEW_FILE, PAGE_FILE)


def segment_slide(
    slide: Path, out: Path, *, mpp: float | None, model: str, labels: bool, runtime: Runtime
) -> int:
    """Nuclei of a slide into `out`: table, GeoJSON, label image, overview and page.

    Returns how many there are. What a call that was stopped had done is kept in a hidden folder of
    `out` and not done again, nor is what is whole. `labels` adds the label image as TIFF. Raises
    BadInput where slide or weights can't be used, or `out` holds what is not of them.
    """
    made_from = _identity(slide, mpp, model)
    kept = out / (_WORK + made_from)
    if _is_done(out, made_from):
        log.info("the nuclei in %s are of this slide, pixel size and model", out)
        return _finished(out, labels=labels)
    kept.mkdir(parents=True, exist_ok=True)
    # Seconds of torch that a mistake above need not wait for.
    from segmentation.label_image import write_label_image
    from segmentation.pictures import overview_picture, write_geojson
    from segmentation.segment import segment

    started_s = time.monotonic()
    with working_on(slide.name), BlockMap(runtime) as maps:
        done = segment(
            out / NUCLEI_FILE, kept, slide, SegmentationConfig(model=model),
            mpp=mpp, device=runtime.device, maps=maps,
        )  # fmt: skip
        log.info(
            "%d nuclei after %.0f s; writing label image, GeoJSON and page",
            done.facts.n_nuclei, time.monotonic() - started_s,
        )  # fmt: skip
        shutil.rmtree(kept / LABELS_FOLDER, ignore_errors=True)
        write_label_image(kept / LABELS_FOLDER, kept, done.blocks, done.grid, maps)
    shutil.rmtree(out / LABELS_FOLDER, ignore_errors=True)
    (kept / LABELS_FOLDER).rename(out / LABELS_FOLDER)
    with written_aside(out / GEOJSON_FILE) as path:
        write_geojson(path, out / NUCLEI_FILE)
    with open_slide(slide, mpp=mpp) as opened, written_aside(out / OVERVIEW_FILE) as path:
        tolerant, _ = opened.tolerant()
        overview_picture(tolerant, out / NUCLEI_FILE).save(path, format="PNG")
        write_nuclei_page(out / PAGE_FILE, out / NUCLEI_FILE, tolerant, done.facts)
    # The last: who is stopped before goes on from what is kept.
    write_atomically(out / FACTS_FILE, done.facts.model_dump_json(indent=1).encode())
    write_atomically(out / IDENTITY_FILE, f"{made_from}\n".encode())
    shutil.rmtree(kept)
    return _finished(out, labels=labels)


def _identity(slide: Path, mpp: float | None, model: str) -> str:
    """A name for the nuclei of a slide, as it lies there, by a model. Raises BadInput."""
    with open_slide(slide, mpp=mpp) as opened:
        require_usable(opened)
    file = slide.stat()
    raw = [str(slide.resolve()), file.st_size, file.st_mtime_ns, mpp]
    return digest([*raw, weights_digest(model), STAGE_VERSION])


def _is_done(out: Path, made_from: str) -> bool:
    """Whether `out` holds these nuclei, whole. Raises BadInput where it holds anything else's."""
    if out.exists() and not out.is_dir():
        raise BadInput(
            out, expected="a folder, or nothing yet", found="a file", remedy="give another --out"
        )
    identity = out / IDENTITY_FILE
    if identity.is_file() and identity.read_text().strip() == made_from:
        return True
    begun = [path.name for path in out.glob(f"{_WORK}*")]
    there = [name for name in _FILES if (out / name).exists()]
    if identity.is_file() or (there and not begun) or (begun and begun != [_WORK + made_from]):
        raise BadInput(
            out,
            expected="an empty folder, or one that `cellpair segment` made of this slide, with the "
            "same --mpp and --model",
            found=f"{', '.join([*there, *begun])} of another",
            remedy="give another --out, or remove the folder",
        )
    return False


def _finished(out: Path, *, labels: bool) -> int:
    """How many nuclei a finished folder holds; adds the label image as TIFF where it is wanted."""
    facts = read_record(out / FACTS_FILE, SegmentationFacts)
    if labels and not (out / LABELS_FILE).exists():
        from segmentation.label_image import write_label_tiff

        with written_aside(out / LABELS_FILE) as path:
            write_label_tiff(path, out / LABELS_FOLDER, facts.network_mpp)
    return facts.n_nuclei
