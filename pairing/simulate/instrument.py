"""The instrument's view of a section, block by block: masks, morphology channels, transcripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from scipy import ndimage, sparse
from zarr.codecs import BloscCodec

from pairing.geometry import Affine
from pairing.simulate.biology import ExpressionModel
from pairing.simulate.bodies import Bodies, draw_bodies, nearest
from pairing.simulate.bundle import STAINS
from pairing.simulate.camera import photograph
from pairing.simulate.mapping import MapBlocks
from pairing.simulate.molecules import QV_MIN, CellStates, TissueBlock, draw_block
from pairing.simulate.panel import Feature
from pairing.simulate.polygons import mask_outline
from pairing.simulate.render import DAPI_FOCUS_DEPTH, layers_on, rows_near
from pairing.simulate.section import PIXEL_UM, Masses, Rings, Section, Transcripts
from pairing.simulate.slide_map import SlideMap
from pairing.simulate.tissue import EXPANSION_UM, Tissue

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

BLOCK_PX = 2048  # a field of view: what is imaged and decoded at once
_CHUNK_PX = 1024
# Cells reach up to 29 µm from the middle of their first nucleus (long nuclei, second ones, and 5 µm
# around), what diffuses from them 10 µm further, and 5 µm more decide whose a pixel is.
_HALO_PX = round(44.0 / PIXEL_UM)
_OTHER_DEPTH = 313  # steps in the noise that chromatin is made of
_MORPHOLOGY = SlideMap.flat(Affine.scale(PIXEL_UM))


@dataclass(frozen=True, slots=True)
class Imaged:
    """What one block leaves besides its pixels; rows are the instrument's."""

    cell_sums: tuple[I64, F64]  # labels, and (k, 3) pixels, sum of x, sum of y
    nucleus_sums: tuple[I64, F64]
    cell_rings: dict[int, F64]  # by row of the cell
    nucleus_rings: dict[int, F64]
    counts: tuple[I64, I64]  # (cell, feature) of each transcript of good quality in a cell
    made_by: tuple[I64, I64]  # (cell, tissue row) of each such gene transcript


@dataclass(frozen=True, slots=True)
class Scene:
    """All that a block needs to know of the whole."""

    tissue: Tissue
    states: CellStates
    models: Sequence[ExpressionModel]
    features: tuple[Feature, ...]
    nucleus_number: I64  # of each nucleus of the tissue: 1 + its row among the instrument's
    stains: bool
    seed: int
    scratch: Path

    @property
    def shape(self) -> tuple[int, int]:
        return round(self.tissue.height_um / PIXEL_UM), round(self.tissue.width_um / PIXEL_UM)

    def plane(self, name: str) -> zarr.Array[Any]:
        return zarr.open_array(self.scratch / f"{name}.zarr", mode="r+")


def image_section(
    name: str,
    prefix: npt.NDArray[np.uint32],
    scene: Scene,
    map_blocks: MapBlocks,
) -> tuple[Section, sparse.csr_matrix]:
    """The section as the bundle's writer takes it, and who made each cell's transcripts.

    The second is (instrument's cells, tissue cells): good gene transcripts in the first that were
    made by the second. Pixels and transcripts lie in the scene's scratch folder.
    """
    height, width = scene.shape
    planes = ["nucleus", "cell", *(STAINS if scene.stains else STAINS[:1])]
    for number in range(len(planes)):
        zarr.create_array(
            scene.scratch / f"{number}.zarr",
            shape=scene.shape,
            chunks=(_CHUNK_PX, _CHUNK_PX),
            dtype="uint32" if number < 2 else "uint16",
            compressors=BloscCodec(cname="lz4", clevel=1, shuffle="shuffle"),
        )
    corners = [(y, x) for y in range(0, height, BLOCK_PX) for x in range(0, width, BLOCK_PX)]
    jobs = [(scene, number, corner) for number, corner in enumerate(corners)]
    imaged = list(map_blocks(_image_block, jobs))
    cells, nuclei = scene.tissue.cells, scene.tissue.nuclei
    n_cells, n_nuclei = int(cells.seen.sum()), int(scene.nucleus_number.max())
    owner = cells.instrument_row[nuclei.cell][scene.nucleus_number > 0]
    sources = [f"{i}.zarr" for i in range(len(planes))]
    opened = [zarr.open_array(scene.scratch / s, mode="r") for s in sources]
    n_features = len(scene.features)
    section = Section(
        name=name,
        prefix=prefix,
        nucleus_labels=opened[0],
        cell_labels=opened[1],
        cell_of_nucleus=owner,
        cells=_masses((i.cell_sums for i in imaged), n_cells),
        nuclei=_masses((i.nucleus_sums for i in imaged), n_nuclei),
        cell_rings=_rings([i.cell_rings for i in imaged], n_cells),
        nucleus_rings=_rings([i.nucleus_rings for i in imaged], n_nuclei),
        features=scene.features,
        matrix=_tally([i.counts for i in imaged], (n_cells, n_features)),
        transcripts=lambda: (_read_transcripts(scene.scratch, k) for k in range(len(jobs))),
        n_fov_columns=-(-width // BLOCK_PX),
        channels=dict(zip(STAINS, opened[2:], strict=False)),
    )
    made_by = _tally([i.made_by for i in imaged], (n_cells, len(cells.state)))
    return section, made_by


def _image_block(job: tuple[Scene, int, tuple[int, int]]) -> Imaged:
    scene, number, (y0, x0) = job
    tissue = scene.tissue
    height, width = scene.shape
    core = (min(BLOCK_PX, height - y0), min(BLOCK_PX, width - x0))
    left, top = x0 - _HALO_PX, y0 - _HALO_PX
    view = _MORPHOLOGY.views(left, top, core[1] + 2 * _HALO_PX, core[0] + 2 * _HALO_PX)[0]
    inside = (slice(_HALO_PX, _HALO_PX + core[0]), slice(_HALO_PX, _HALO_PX + core[1]))
    centres = tissue.nuclei.centres_um / PIXEL_UM - (left, top)
    reach = 15.0 / PIXEL_UM
    rows = rows_near(
        centres, -reach, -reach, view.x_um.shape[1] + reach, view.x_um.shape[0] + reach
    )
    nuclei = tissue.nuclei.take(rows)
    seen = tissue.cells.seen[nuclei.cell]
    # Fluorescence tells the amount of DNA and the dye, not how dark haematoxylin would be, from
    # another depth of the nucleus, and leaves nucleoli dark.
    dna = 0.6 * np.exp(0.3 * ((nuclei.texture[:, 0] & 1023) / 512.0 - 1.0))
    shining = replace(
        nuclei,
        density=dna,
        texture=nuclei.texture + _OTHER_DEPTH,
        nucleoli=nuclei.nucleoli * np.array([1, 1, -0.6]),
    )
    bodies = draw_bodies(
        view, shining, tissue.cells, centres[rows], PIXEL_UM,
        labelled=seen, painted=nuclei.in_dapi, in_focus=nuclei.depth > DAPI_FOCUS_DEPTH,
    )  # fmt: skip
    block, nucleus, cell = _label(scene, rows, nuclei.cell, bodies, (left, top), inside)
    layers = layers_on(tissue, view)
    if layers is not None:
        on_tissue = (layers.tissue > 0.5) & (layers.lumen < 0.5)
        block = replace(block, on_tissue=on_tissue)
    rng = np.random.default_rng([scene.seed, 11, number])
    window = (slice(y0, y0 + core[0]), slice(x0, x0 + core[1]))
    scene.plane("0")[window] = nucleus[inside].astype(np.uint32)
    scene.plane("1")[window] = cell[inside].astype(np.uint32)
    type_index = scene.tissue.cells.type_index
    pictures = photograph(type_index, block, bodies, inside, scene.stains, rng)
    for k, plane in enumerate(pictures):
        scene.plane(str(2 + k))[window] = plane
    drawn, made_by = draw_block(rng, block, scene.states, scene.models, scene.features)
    _write_transcripts(scene.scratch, number, drawn)
    good = (drawn.qv >= QV_MIN) & (drawn.cell >= 0)
    is_gene = np.array([f.kind is None for f in scene.features])
    made = good & (made_by >= 0) & is_gene[drawn.feature]
    owned = set(scene.tissue.cells.instrument_row[block.owned].tolist())
    offset = np.array([left, top])
    return Imaged(
        cell_sums=_sums(cell[inside], x0, y0),
        nucleus_sums=_sums(nucleus[inside], x0, y0),
        cell_rings=_outlines(cell, offset, owned),
        nucleus_rings=_outlines(
            nucleus, offset, set((scene.nucleus_number[_owned_nuclei(scene, block)] - 1).tolist())
        ),
        counts=(drawn.cell[good], drawn.feature[good]),
        made_by=(drawn.cell[made], made_by[made]),
    )


def _label(
    scene: Scene,
    rows: I64,
    cell_of: I64,
    bodies: Bodies,
    corner: tuple[int, int],
    inside: tuple[slice, slice],
) -> tuple[TissueBlock, I32, I32]:
    """Whose each pixel is, in truth and by the instrument; and both of its label images."""
    cells = scene.tissue.cells

    def lookup(values: I64) -> I32:
        return np.concatenate([[0], values]).astype(np.int32)

    away, owner = nearest(bodies.every, PIXEL_UM)
    maker = lookup(cell_of + 1)[np.where(away <= EXPANSION_UM, owner, 0)]
    away, owner = nearest(bodies.labelled, PIXEL_UM)
    cell = lookup(cells.instrument_row[cell_of] + 1)[np.where(away <= EXPANSION_UM, owner, 0)]
    nucleus = lookup(scene.nucleus_number[rows])[bodies.labelled]
    # A cell is the block's in which the middle of its first nucleus lies.
    x0, y0 = (v + _HALO_PX for v in corner)
    first = scene.tissue.nuclei.centres_um[: len(cells.state)] / PIXEL_UM
    height, width = (s.stop - s.start for s in inside)
    block = TissueBlock(
        x0_px=corner[0],
        y0_px=corner[1],
        maker=maker,
        cell=cell,
        nucleus=nucleus,
        maker_in_nucleus=(bodies.every > 0) & (maker > 0),
        on_tissue=np.zeros(maker.shape, bool),
        owned=rows_near(first, x0, y0, x0 + width, y0 + height),
        core=(inside[1].start, inside[0].start, inside[1].stop, inside[0].stop),
    )
    return block, nucleus, cell


def _owned_nuclei(scene: Scene, block: TissueBlock) -> I64:
    return np.flatnonzero(
        np.isin(scene.tissue.nuclei.cell, block.owned) & (scene.nucleus_number > 0)
    )


def _sums(labels: I32, x0: int, y0: int) -> tuple[I64, F64]:
    values, dense = _dense(labels)
    y, x = np.nonzero(dense)
    index = dense[y, x] - 1
    weights = (None, x + (x0 + 0.5), y + (y0 + 0.5))
    sums = [np.bincount(index, w, len(values)) for w in weights]
    return values, np.stack(sums, axis=1).astype(np.float64)


def _dense(labels: I32) -> tuple[I64, I32]:
    """The labels that are there, ascending, and the same image numbered by them from 1."""
    values = np.flatnonzero(np.bincount(labels.ravel(), minlength=1))
    values = values[values > 0]
    number = np.zeros(int(labels.max()) + 1, np.int32)
    number[values] = np.arange(1, len(values) + 1)
    return values, number[labels]


def _masses(parts: Iterable[tuple[I64, F64]], n: int) -> Masses:
    total = np.zeros((n + 1, 3))
    for values, sums in parts:
        total[values] += sums
    with np.errstate(invalid="ignore"):
        mean_um = total[1:, 1:] / total[1:, :1] * PIXEL_UM
    return Masses(mean_um[:, 0], mean_um[:, 1], total[1:, 0] * PIXEL_UM**2)


def _outlines(labels: I32, offset: I64, wanted: set[int]) -> dict[int, F64]:
    """Closed rings in µm of the labels of the wanted rows."""
    rings = {}
    values, dense = _dense(labels)
    for value, window in zip(values.tolist(), ndimage.find_objects(dense), strict=True):
        if value - 1 in wanted:
            corner = offset + np.array([window[1].start, window[0].start])
            rings[value - 1] = (mask_outline(labels[window] == value) + corner) * PIXEL_UM
    return rings


def _rings(parts: list[dict[int, F64]], n: int) -> Rings:
    by_row: dict[int, F64] = {}
    for part in parts:
        by_row.update(part)
    rings = [by_row[i] for i in range(n)]
    start = np.concatenate([[0], np.cumsum([len(r) for r in rings])]).astype(np.int64)
    return Rings(np.concatenate(rings) if rings else np.zeros((0, 2)), start)


def _tally(parts: list[tuple[I64, I64]], shape: tuple[int, int]) -> sparse.csr_matrix:
    row, column = (np.concatenate(side) for side in zip(*parts, strict=True))
    ones = np.ones(len(row), np.int32)
    return sparse.coo_matrix((ones, (row, column)), shape=shape).tocsr()


def _transcripts_file(scratch: Path, number: int) -> Path:
    return scratch / f"transcripts-{number:06d}.npz"


def _write_transcripts(scratch: Path, number: int, t: Transcripts) -> None:
    # Steps of 1/64 µm up to 24,000 µm are exact in float32, and rows fit 32 bits.
    narrow = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}
    columns = {name: getattr(t, name) for name in Transcripts.__slots__}
    stored = {name: v.astype(narrow.get(v.dtype, v.dtype)) for name, v in columns.items()}
    np.savez(_transcripts_file(scratch, number), **stored)


def _read_transcripts(scratch: Path, number: int) -> Transcripts:
    wide = {np.dtype(np.float32): np.float64, np.dtype(np.int32): np.int64}
    with np.load(_transcripts_file(scratch, number), allow_pickle=False) as stored:
        columns = {name: stored[name] for name in Transcripts.__slots__}
    return Transcripts(**{n: v.astype(wide.get(v.dtype, v.dtype)) for n, v in columns.items()})
