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
    weights_digest,
)
from shards.artifact import write_atomically, written_aside
from shards.errors import BadInput
from shards.schema import digest

log = logging.getLogger("cellpair")

GEOJSON_FILE, OVERVIEW_FILE = "nuclei.geojson", "overview.png"
LABELS_FOLDER, LABELS_FILE = "labels.zarr", "labels.ome.tif"
_WORK = ".segment-"


def segment_slide(
    slide: Path, out: Path, *, mpp: float | None, model: str, labels: bool, runtime: Runtime
) -> int:
    """Nuclei of a slide into `out`: table, GeoJSON, label image, overview and page.

    Returns how many there are. What a call that was stopped had done is kept in a hidden folder of
    `out` and not done again. `labels` adds the label image as TIFF. Raises BadInput where slide or
    weights can't be used.
    """
    # Seconds of torch that a wrong path need not wait for.
    with open_slide(slide, mpp=mpp) as opened:
        opened.require_rgb()
    digest_of_weights = weights_digest(model)
    from segmentation.label_image import write_label_image, write_label_tiff
    from segmentation.pictures import overview_picture, write_geojson
    from segmentation.segment import segment

    kept = _work_folder(out, slide, mpp, digest_of_weights)
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
        # Of an earlier slide perhaps; the page, which is written last, tells that all is there.
        for name in (PAGE_FILE, OVERVIEW_FILE, GEOJSON_FILE, LABELS_FILE, FACTS_FILE):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / LABELS_FOLDER, ignore_errors=True)
        write_label_image(kept / LABELS_FOLDER, kept, done.blocks, done.grid, maps)
    (kept / LABELS_FOLDER).rename(out / LABELS_FOLDER)
    if labels:
        with written_aside(out / LABELS_FILE) as path:
            write_label_tiff(path, out / LABELS_FOLDER, done.grid.mpp)
    write_atomically(out / FACTS_FILE, done.facts.model_dump_json(indent=1).encode())
    with written_aside(out / GEOJSON_FILE) as path:
        write_geojson(path, out / NUCLEI_FILE)
    with open_slide(slide, mpp=mpp) as opened, written_aside(out / OVERVIEW_FILE) as path:
        tolerant, _ = opened.tolerant()
        overview_picture(tolerant, out / NUCLEI_FILE).save(path, format="PNG")
        write_nuclei_page(out / PAGE_FILE, out / NUCLEI_FILE, tolerant, done.facts)
    shutil.rmtree(kept)
    return done.facts.n_nuclei


def _work_folder(out: Path, slide: Path, mpp: float | None, weights: str) -> Path:
    """The folder for what is done so far; that of another slide, config or version is removed."""
    if out.exists() and not out.is_dir():
        raise BadInput(
            out, expected="a folder, or nothing yet", found="a file", remedy="give another --out"
        )
    file = slide.stat()
    name = digest(
        [str(slide.resolve()), file.st_size, file.st_mtime_ns, mpp, weights, STAGE_VERSION]
    )
    for other in out.glob(f"{_WORK}*"):
        if other.name != _WORK + name:
            shutil.rmtree(other)
    kept = out / (_WORK + name)
    kept.mkdir(parents=True, exist_ok=True)
    return kept
