"""Simulates one run: the bundle, the slide, what aligns them, and the truth beside them."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from pairing.geometry import Affine
from pairing.simulate.biology import ExpressionModel, draw_depth, draw_model
from pairing.simulate.bundle import cell_id_strings, write_bundle, zip_bundle
from pairing.simulate.celltypes import N_TYPES
from pairing.simulate.donor import draw_stain
from pairing.simulate.instrument import Scene, image_section
from pairing.simulate.mapping import mapper
from pairing.simulate.molecules import CellStates
from pairing.simulate.mount import given_alignment, mount, scan
from pairing.simulate.panel import features
from pairing.simulate.params import PanelParams, SimulationParams
from pairing.simulate.pictures import write_he
from pairing.simulate.pieces import draw_next_section, draw_section
from pairing.simulate.render import Mounted
from pairing.simulate.section import PIXEL_UM
from pairing.simulate.tissue import Tissue
from pairing.simulate.truth import write_truth
from shards.errors import BadInput

N_KEYPOINTS = 16
_MIN_CELLS_OF_OTHERS = 60


def simulate(out: Path, params: SimulationParams, workers: int = 1) -> None:
    """Write `outs/` (or `outs.zip`), `he.ome.tif`, both alignment files and `truth/` into `out`.

    `out` must not exist or be an empty folder; it appears whole at the end or not at all. The
    same parameters give the same bytes, whatever the number of `workers` (threads). Memory is
    bounded by blocks and a few hundred bytes a cell. Raises BadInput for an `out` in use.
    """
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(
            out,
            expected="a folder that is empty or not there",
            found="a folder with files in it" if out.is_dir() else "a file",
            remedy="name another folder or remove this one",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{uuid4().hex[:8]}.part")
    scratch = out.with_name(f"{aside.name}.scratch")
    aside.mkdir()
    scratch.mkdir()
    try:
        _simulate_into(aside, scratch, params, workers)
        if out.exists():
            out.rmdir()
        aside.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _simulate_into(folder: Path, scratch: Path, params: SimulationParams, workers: int) -> None:
    # A stream each, so that a change to one part leaves the numbers of the others.
    place, ids, deeper, others, lay = (
        np.random.default_rng(s) for s in np.random.SeedSequence(params.seed).spawn(5)
    )
    donor_seed = params.seed if params.donor_seed is None else params.donor_seed
    map_blocks = mapper(workers)
    tissue = draw_section(place, params.n_cells, params.n_donors)
    models, states = _draw_molecules(tissue, donor_seed, params.n_donors, params.panel)
    in_dapi = tissue.nuclei.in_dapi
    scene = Scene(
        tissue=tissue,
        states=states,
        models=models,
        features=features(params.panel.n_genes, params.panel.species),
        nucleus_number=np.where(in_dapi, np.cumsum(in_dapi), 0),
        stains=params.bundle.stains,
        seed=params.seed,
        scratch=scratch,
    )
    section, made_by = image_section(
        f"seed-{params.seed}", _draw_prefixes(ids, params.n_cells), scene, map_blocks
    )
    (folder / "outs").mkdir()
    write_bundle(folder / "outs", section, params.bundle)
    if params.bundle.zipped:
        zip_bundle(folder / "outs", folder / "outs.zip")
    cell_ids = cell_id_strings(section.prefix, params.bundle.layout).tolist()

    on_slide = draw_next_section(deeper, tissue) if params.slide.serial_section else tissue
    n_other = max(_MIN_CELLS_OF_OTHERS, params.n_cells // 3)
    pieces = [draw_section(others, n_other) for _ in range(params.slide.other_pieces)]
    mounted, size_px = mount(lay, on_slide, pieces, params.slide)
    stain = draw_stain(np.random.default_rng([donor_seed, 2]))
    picture = scan(scratch, mounted, size_px, stain, params.seed, map_blocks)
    codec = stain.codec if params.slide.compression == "donor" else params.slide.compression
    write_he(
        folder / "he.ome.tif", picture.rgb, params.slide.mpp, codec, _quality(codec, stain.quality)
    )
    morphology_px_from_he_px = given_alignment(mounted[0], PIXEL_UM)
    _write_alignment(folder, morphology_px_from_he_px, mounted[0], lay)
    (folder / "truth").mkdir()
    write_truth(
        folder / "truth", params, tissue, cell_ids, models, made_by,
        mounted[0], picture, morphology_px_from_he_px.array,
    )  # fmt: skip


def _quality(codec: str, jpeg_quality: int) -> int:
    """JPEG's quality, or for JPEG-2000 a signal-to-noise ratio in dB that looks alike."""
    return jpeg_quality if codec == "jpeg" else jpeg_quality // 2


def _draw_molecules(
    tissue: Tissue, donor_seed: int, n_donors: int, panel: PanelParams
) -> tuple[list[ExpressionModel], CellStates]:
    cells = tissue.cells
    models = []
    for donor in range(n_donors):
        mine = cells.type_index[cells.donor == donor]
        share = np.bincount(mine, minlength=N_TYPES) / max(len(mine), 1)
        rng = np.random.default_rng([donor_seed, 1, donor])
        models.append(draw_model(rng, share, panel.n_genes, panel.species))
    states = CellStates(
        type_index=cells.type_index,
        state=cells.state,
        niche=cells.niche,
        phase=cells.phase,
        donor=cells.donor,
        depth=draw_depth(np.random.default_rng([donor_seed, 3]), len(cells.state), cells.donor),
    )
    return models, states


def _draw_prefixes(rng: np.random.Generator, n: int) -> npt.NDArray[np.uint32]:
    """n different cell ids, ascending as in every bundle."""
    drawn = np.unique(rng.integers(0, 2**32, 2 * n + 16, dtype=np.uint32))
    return np.sort(rng.permutation(drawn)[:n])


def _write_alignment(
    folder: Path, morphology_px_from_he_px: Affine, section: Mounted, rng: np.random.Generator
) -> None:
    """10x's matrix (no header) and key points as Xenium Explorer exports them.

    The points are middles of nuclei, wherever the slide shows them: they follow its deformations,
    which no matrix can.
    """
    with (folder / "he_imagealignment.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(morphology_px_from_he_px.matrix)
    um = section.tissue.nuclei.centres_um
    whole = np.flatnonzero(~section.slide_map.flags(um)["missing"])
    chosen = rng.choice(whole, N_KEYPOINTS, replace=False)
    fixed, moving = um[chosen] / PIXEL_UM, section.centres_px[chosen]
    with (folder / "he_keypoints.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["fixedX", "fixedY", "alignmentX", "alignmentY"])
        writer.writerows(np.concatenate([fixed, moving], axis=1).tolist())
