"""Simulates one section: the bundle, the slide, what aligns them, and the truth beside them."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import cv2
import numpy as np
import numpy.typing as npt

from pairing.geometry import Affine
from pairing.simulate.bundle import STAINS, cell_id_strings, write_bundle, zip_bundle
from pairing.simulate.celltypes import N_TYPES
from pairing.simulate.donor import draw_stain
from pairing.simulate.expression import draw_model
from pairing.simulate.panel import Feature, features
from pairing.simulate.params import SimulationParams
from pairing.simulate.pictures import write_he
from pairing.simulate.polygons import mask_polygons, rings_um
from pairing.simulate.render import Frame, Labels, label_frame, paint_dapi, paint_he
from pairing.simulate.section import PIXEL_UM, Masses, Section, Transcripts
from pairing.simulate.tissue import Tissue, draw_section
from pairing.simulate.transcripts import Transcripts as DrawnTranscripts
from pairing.simulate.transcripts import draw_transcripts
from pairing.simulate.truth import write_truth
from shards.errors import BadInput, not_there_yet

N_KEYPOINTS = 16
MAX_CELLS = 10_000  # pictures are painted whole: about 0.7 GB for every thousand cells
_HE_MARGIN_UM = (45.0, 85.0, 60.0, 40.0)  # glass beyond the cells: left, right, top, bottom


def simulate(out: Path, params: SimulationParams) -> None:
    """Write `outs/`, `he.ome.tif`, both alignment files and `truth/` into `out`.

    `out` must not exist or be an empty folder; it appears whole at the end or not at all. The
    same parameters give the same bytes. Raises BadInput for an `out` in use, and for a size
    that is not there yet.
    """
    out = Path(out).resolve()
    if params.n_cells > MAX_CELLS:
        found = f"{params.n_cells} cells (the limit is {MAX_CELLS})"
        raise not_there_yet("--cells", found, "simulate several sections")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(
            out,
            expected="a folder that is empty or not there",
            found="a folder with files in it" if out.is_dir() else "a file",
            remedy="name another folder or remove this one",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{uuid4().hex[:8]}.part")
    aside.mkdir()
    try:
        _simulate_into(aside, params)
        if out.exists():
            out.rmdir()
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _simulate_into(folder: Path, params: SimulationParams) -> None:
    # A stream each, so that a change to one part leaves the numbers of the others.
    place, ids, molecules, dapi_noise, he_noise, scan = (
        np.random.default_rng(s) for s in np.random.SeedSequence(params.seed).spawn(6)
    )
    donor_seed = params.seed if params.donor_seed is None else params.donor_seed
    stain_rng, donor_rng = (
        np.random.default_rng(s) for s in np.random.SeedSequence([donor_seed, 1]).spawn(2)
    )
    tissue = draw_section(place, params.n_cells)
    model = draw_model(
        donor_rng, np.bincount(tissue.cells.type_index, minlength=N_TYPES) / params.n_cells
    )

    morphology = _morphology_frame(tissue)
    labels = label_frame(tissue, morphology)
    rows = features()
    transcripts = draw_transcripts(tissue, labels, PIXEL_UM, model, rows, molecules)
    section = _section(
        f"seed-{params.seed}",
        _draw_prefixes(ids, params.n_cells),
        labels,
        tissue.nuclei.cell,
        transcripts,
        rows,
        paint_dapi(tissue, morphology, labels, dapi_noise),
    )
    (folder / "outs").mkdir()
    write_bundle(folder / "outs", section, params.bundle)
    if params.bundle.zipped:
        zip_bundle(folder / "outs", folder / "outs.zip")
    cell_ids = cell_id_strings(section.prefix, params.bundle.layout)
    del labels, section

    slide = _slide_frame(tissue, params, scan)
    slide_labels = label_frame(tissue, slide)
    he = paint_he(tissue, slide, slide_labels, draw_stain(stain_rng), he_noise)
    write_he(folder / "he.ome.tif", he, params.slide.mpp)
    _write_alignment(folder, tissue, morphology, slide, scan)
    (folder / "truth").mkdir()
    write_truth(folder / "truth", params, tissue, cell_ids, model, morphology, slide, slide_labels)


def _section(
    name: str,
    prefix: npt.NDArray[np.uint32],
    labels: Labels,
    cell_of_nucleus: npt.NDArray[np.int64],
    drawn: DrawnTranscripts,
    rows: tuple[Feature, ...],
    dapi: npt.NDArray[np.uint16],
) -> Section:
    """Number the nuclei that are to be seen without gaps; `cell_of_nucleus` is of all."""
    seen = np.unique(labels.nucleus)[1:]
    number = np.zeros(len(cell_of_nucleus) + 1, np.int32)
    number[seen] = np.arange(1, len(seen) + 1)
    nucleus = number[labels.nucleus]
    # Stand-ins for the stains: borders, whole cells, and cells but for their nuclei.
    edge = cv2.morphologyEx(labels.cell.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((3, 3)))
    stains = (edge > 0, labels.cell > 0, (labels.cell > 0) & (labels.nucleus == 0))
    painted = [cv2.GaussianBlur(s.astype(np.float32) * 3000, (0, 0), 1.5) for s in stains]
    channels = [dapi, *(np.asarray(p, np.uint16) for p in painted)]
    return Section(
        name=name,
        prefix=prefix,
        nucleus_labels=nucleus,
        cell_labels=labels.cell,
        cell_of_nucleus=cell_of_nucleus[seen - 1],
        cells=_masses(labels.cell, len(prefix)),
        nuclei=_masses(nucleus, len(seen)),
        cell_rings=rings_um(mask_polygons(labels.cell), PIXEL_UM),
        nucleus_rings=rings_um(mask_polygons(nucleus), PIXEL_UM),
        features=rows,
        matrix=drawn.matrix(len(prefix), len(rows)),
        transcripts=lambda: _by_fov(drawn),
        n_fov_columns=drawn.n_fov_columns,
        channels=dict(zip(STAINS, channels, strict=True)),
    )


def _by_fov(drawn: DrawnTranscripts) -> Iterator[Transcripts]:
    edges = np.searchsorted(drawn.fov, np.arange(drawn.fov.max() + 2))
    for first, end in pairwise(edges):
        columns = {n: getattr(drawn, n)[first:end] for n in Transcripts.__slots__}
        yield Transcripts(**columns)


def _masses(labels: npt.NDArray[np.int32], n: int) -> Masses:
    y, x = np.nonzero(labels)
    owner = labels[y, x]
    size = np.bincount(owner, minlength=n + 1)[1:]
    with np.errstate(invalid="ignore"):
        mean_px = [np.bincount(owner, v, n + 1)[1:] / size for v in (x, y)]
    x_um, y_um = (np.asarray((m + 0.5) * PIXEL_UM, np.float64) for m in mean_px)
    return Masses(x_um, y_um, np.asarray(size * PIXEL_UM**2, np.float64))


def _draw_prefixes(rng: np.random.Generator, n: int) -> npt.NDArray[np.uint32]:
    """n different cell ids, ascending as in every bundle."""
    drawn = np.unique(rng.integers(0, 2**32, 2 * n + 16, dtype=np.uint32))
    return np.sort(rng.permutation(drawn)[:n])


def _morphology_frame(tissue: Tissue) -> Frame:
    width, height = (round(v / PIXEL_UM) for v in (tissue.width_um, tissue.height_um))
    return Frame(Affine.scale(PIXEL_UM), width, height)


def _slide_frame(tissue: Tissue, params: SimulationParams, rng: np.random.Generator) -> Frame:
    """The scanner's field: turned as the slide lay, and around all of the tissue."""
    drawn_deg = float(rng.uniform(0, 360))
    turn_deg = drawn_deg if params.slide.rotation_deg is None else params.slide.rotation_deg
    turned = Affine.similarity(
        params.slide.mpp, float(np.deg2rad(turn_deg)), (0.0, 0.0), mirror=params.slide.mirror
    )
    cells_px = turned.inverse(np.stack([tissue.nuclei.x_um, tissue.nuclei.y_um], axis=1))
    left, right, top, bottom = (margin / params.slide.mpp for margin in _HE_MARGIN_UM)
    x0, y0 = cells_px.min(axis=0) - np.array([left, top])
    x1, y1 = cells_px.max(axis=0) + np.array([right, bottom])
    corner = Affine.similarity(1.0, 0.0, (float(x0), float(y0)))
    return Frame(turned @ corner, round(x1 - x0), round(y1 - y0))


def _write_alignment(
    folder: Path, tissue: Tissue, morphology: Frame, slide: Frame, rng: np.random.Generator
) -> None:
    """10x's matrix (no header) and the key points as Xenium Explorer exports them."""
    morphology_px_from_he_px = morphology.um_from_px.inverse @ slide.um_from_px
    with (folder / "he_imagealignment.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(morphology_px_from_he_px.matrix)
    chosen = rng.choice(len(tissue.nuclei.x_um), N_KEYPOINTS, replace=False)
    um = np.stack([tissue.nuclei.x_um, tissue.nuclei.y_um], axis=1)[chosen]
    fixed, moving = morphology.um_from_px.inverse(um), slide.um_from_px.inverse(um)
    with (folder / "he_keypoints.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["fixedX", "fixedY", "alignmentX", "alignmentY"])
        writer.writerows(np.concatenate([fixed, moving], axis=1).tolist())
