"""Every stage run once on its fixed input: what it wrote, and the identity of a fixed config."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from flows.built import Stage, direct
from flows.config import CurateConfig
from flows.stages import RunStages
from pairing.cells import CellsConfig, HeSide, Withdrawal, write_cells
from pairing.pack import Filters, PackConfig, write_shard_set
from pairing.patches import open_run_morphology, write_patches
from pairing.registration.he_nuclei import find_he_nuclei
from pairing.registration.stage import register_run
from pairing.slide import open_slide
from pairing.warp import Warp
from pairing.xenium import open_xenium
from segmentation.config import NUCLEI_FILE, SegmentationConfig, weights_digest
from segmentation.segment import write_nuclei
from shards.artifact import RECORD_FILE, read_artifact
from shards.cache import Holding
from shards.content import ContentHashes
from shards.schema import PatchSpec, digest
from shards.store import Store
from tests.golden import inputs
from tests.golden import nuclei as nuclei_inputs
from tests.golden.content import canonical, digest_of, digests_of
from tests.golden.records import Golden, NetworkOutcome, RefinedOutcome
from tests.pairing.nuclei_pairs import point_pair

Output = dict[str, str]


def golden_of(stage: Stage, folder: Path) -> Golden:
    """What the stage makes now of its fixed input, in the new folder `folder`."""
    folder.mkdir(parents=True)
    identity = identities(folder / "identity")[stage]
    # Named, not hashed: a new version of a parent is none of this stage.
    identity = identity.model_copy(update={"parents": {p: p for p in identity.parents}})
    output = {
        f"{case}: {name}": digest
        for case, made in _MADE[stage](folder).items()
        for name, digest in made.items()
    }
    return Golden(identity=identity, fingerprint=identity.fingerprint, output=output)


# ---------------------------------------------------------------- identities


class InProcess:
    """The map over blocks, here and in order."""

    def __call__(self, fn: Any, items: Any) -> Any:
        return map(fn, items)

    on_gpu = __call__


def write_identity_inputs(folder: Path) -> dict[str, Path]:
    """Files of a few words in place of raw inputs: an identity is of their content alone."""
    folder.mkdir(parents=True)
    paths = {
        key: folder / name
        for key, name in (
            ("slide", "he.ome.tif"),
            ("alignment", "matrix.csv"),
            ("labels", "labels.csv"),
            ("weights", "weights.pt"),
        )
    }
    for key, path in paths.items():
        path.write_text(f"the {key}\n")
    paths["xenium"] = folder / "outs"
    (paths["xenium"] / "morphology_focus").mkdir(parents=True)
    for name in ("experiment.xenium", "morphology_focus/ch0000_dapi.ome.tif"):
        (paths["xenium"] / name).write_text(f"{name}\n")
    paths["donors"] = folder / "donors.csv"
    paths["donors"].write_text("cell_id,donor\na-1,D1\nb-1,D2\nc-1,D3\n")
    return paths


def fixed_config(folder: Path, paths: dict[str, Path]) -> CurateConfig:
    """A config that gives every raw input and one donor, and leaves the rest to the defaults."""
    run = {key: paths[key] for key in ("xenium", "slide", "alignment", "labels")}
    return CurateConfig.model_validate(
        {
            "name": "golden",
            "out": folder / "out",
            "segmentation": {"model": str(paths["weights"])},
            "runs": [{"id": "r1", "donor": "D1", **run}],
        }
    )


def stages_of(config: CurateConfig, folder: Path) -> RunStages:
    """The stages of the config's one run; raw inputs are hashed anew."""
    hashes = ContentHashes(folder / "hashes.json")
    store, held = Store(config.out), Holding()
    return RunStages(config, config.runs[0], hashes, InProcess(), "cpu", direct, store, held)


def identities(folder: Path) -> dict[Stage, Any]:
    """The identity of each stage of the fixed config: the same for as long as nothing is new."""
    config = fixed_config(folder, write_identity_inputs(folder / "raw"))
    return dict(stages_of(config, folder).identities)


# ---------------------------------------------------------------- outputs


def _written(folder: Path, write: Callable[[Path, Path], dict[str, Any]]) -> Output:
    """The files that `write(out, kept)` made, and its figures."""
    out, kept = folder / "out", folder / "kept"
    out.mkdir(parents=True)
    kept.mkdir()
    summary = write(out, kept)
    return {**digests_of(out), "figures": digest_of(summary)}


def _registration(folder: Path) -> dict[str, Output]:
    bundle = inputs.write_bundle(folder / "outs")
    slide = inputs.write_slide(folder / "he.ome.tif")
    alignments = {
        "matrix": inputs.MATRIX,
        "wrong matrix": inputs.TURNED_MATRIX,
        "keypoints": inputs.KEYPOINTS,
    }
    made = {}
    for case, text in alignments.items():
        alignment = folder / f"{case}.csv"
        alignment.write_text(text)
        run = {"id": "r1", "donor": "D1", "xenium": bundle, "slide": slide, "alignment": alignment}
        config = CurateConfig.model_validate(
            {
                "name": "golden",
                "out": folder / case,
                "segmentation": {"model": "none"},
                "registration": {"refine": False, "accept": ["pass", "doubtful", "fail"]},
                "runs": [run],
            }
        )
        stages = stages_of(config, folder)
        stages.register()
        artifact = stages.built["registration"].folder
        record = read_artifact(artifact)
        assert record is not None
        files = {k: v for k, v in digests_of(artifact).items() if k != RECORD_FILE}
        made[case] = {**files, "figures": digest_of(record.summary)}
    blobs = find_he_nuclei(partial(open_slide, slide))
    pair = point_pair(5, largest_um=15.0, mirror=True)
    fit = pair.sides.found()
    assert fit is not None
    some_um = pair.xenium_um[::10]
    made["found"] = {
        # Filters add up in float32; a tenth of a pixel is far above their noise.
        "nuclei of the slide": digest(canonical(blobs.px.tolist(), 0.1)),
        "places": digest(canonical(fit(some_um).tolist(), 1e-3)),
        "errors": digest(canonical(fit.error_um(some_um).tolist(), 1e-3)),
        "evidence": digest(canonical(fit.evidence.model_dump(), 1e-3)),
    }
    return made


def _nuclei(folder: Path) -> dict[str, Output]:
    slide = nuclei_inputs.write_flow_slide(folder / "flows.ome.tif")
    weights = nuclei_inputs.write_weights(folder / "weights.pt")
    config = SegmentationConfig(model=str(weights))
    write = partial(write_nuclei, slide_path=slide, config=config, device="cpu", block_px=256)
    return {"flows": _written(folder / "flows", write)}


def _cells(folder: Path) -> dict[str, Output]:
    donors = inputs.write_donors(folder / "donors.geojson")
    he_px_from_xenium_um = inputs.HE_PX_FROM_XENIUM_UM
    error_um = inputs.errors_um(inputs.cell_ids(len(inputs.xenium_centres_um())))
    he = HeSide(inputs.he_nuclei(), Warp(he_px_from_xenium_um), inputs.HE_MPP, error_um)
    whole = inputs.write_bundle(folder / "outs")
    without = Withdrawal(donors, ("D2",), he_px_from_xenium_um, he.nuclei.num_rows)
    by_cell = CellsConfig(center="cell", qv_min=25, neighbors_k=3, neighbors_radius_um=20)
    cases: dict[str, tuple[Path, CellsConfig, Any]] = {
        "nuclei": (whole, CellsConfig(), (he,)),
        "cells": (whole, by_cell, (None,)),
        "withdrawn": (whole, CellsConfig(), (he, without)),
        "matrix": (inputs.write_bundle(folder / "m", transcripts=False), CellsConfig(), (None,)),
        "masks": (inputs.write_masked_bundle(folder / "masks"), CellsConfig(), (None,)),
    }  # fmt: skip

    def write(case: str, out: Path, kept: Path) -> dict[str, Any]:
        bundle, config, rest = cases[case]
        with open_xenium(bundle) as run:
            return write_cells(out, kept, run, config, "human", *rest)

    return {case: _written(folder / case, partial(write, case)) for case in cases}


def _patches(folder: Path) -> dict[str, Output]:
    slide = inputs.write_slide(folder / "he.ome.tif")
    bundle = inputs.write_bundle(folder / "outs")
    he = PatchSpec(image="he", fov_um=32, size_px=64, center="nucleus", jpeg_quality=95)
    dapi = he.model_copy(update={"image": "morphology", "jpeg_quality": 80})
    centres_px = inputs.he_centres_px()
    dapi_px = inputs.xenium_centres_um() / inputs.MORPHOLOGY_MPP
    images = {
        "he": (partial(open_slide, slide), centres_px, he),
        "morphology": (partial(open_run_morphology, bundle), dapi_px, dapi),
    }

    def write(case: str, out: Path, kept: Path) -> dict[str, Any]:
        open_image, centres_px, spec = images[case]
        order = np.arange(len(centres_px))[::-1]
        return write_patches(out, kept, open_image, centres_px, order, spec, InProcess()).summary

    return {case: _written(folder / case, partial(write, case)) for case in images}


def _shards(folder: Path) -> dict[str, Output]:
    cells = inputs.write_cells_artifact(folder / "cells")
    patches = inputs.write_patches_artifact(folder / "patches")
    donors = inputs.write_donors(folder / "donors.geojson")
    labels = inputs.write_labels(folder / "labels.csv", inputs.cell_ids(100))
    error_um = inputs.errors_um(inputs.cell_ids(100))
    spec = PatchSpec(image="he", fov_um=32, size_px=64, center="nucleus", jpeg_quality=95)
    several = PackConfig(
        run="r1", donor=None, source_id="S1", tissue="breast", filters=Filters(), max_samples=50
    )
    one = several.model_copy(
        update={
            "donor": "Ünë/1",
            "filters": Filters(min_counts=0, drop_flags=("edge", "damaged_tile")),
        }
    )

    def write(config: PackConfig, files: dict[str, Any], out: Path, kept: Path) -> dict[str, Any]:
        transform, mpp = inputs.HE_PX_FROM_XENIUM_UM, inputs.HE_MPP
        folders = out, kept, config, spec, cells, patches
        return write_shard_set(*folders, transform, mpp, InProcess(), **files).summary

    return {
        "donors": _written(
            folder / "several",
            partial(write, several, {"donors": donors, "labels": labels, "error_um": error_um}),
        ),
        "one donor": _written(folder / "one", partial(write, one, {})),
    }


_MADE: dict[Stage, Callable[[Path], dict[str, Output]]] = {
    "registration": _registration,
    "nuclei": _nuclei,
    "cells": _cells,
    "patches": _patches,
    "shards": _shards,
}


def refined_outcome(folder: Path) -> RefinedOutcome:
    """What the nuclei make of the given matrix."""
    bundle = inputs.write_bundle(folder / "refined")
    slide = inputs.write_slide(folder / "refined.ome.tif")
    alignment = folder / "refined.csv"
    alignment.write_text(inputs.MATRIX)
    with open_xenium(bundle) as run:
        found = register_run(run, partial(open_slide, slide), alignment, refine=True)
    places_px = found.cells[["x_px", "y_px"]].to_numpy()[::20].round(3).tolist()
    return RefinedOutcome(verdict=found.registration.verdict, places_px=places_px)


def network_outcome(folder: Path) -> NetworkOutcome:
    """What the compact network finds on the drawn picture."""
    picture = nuclei_inputs.write_drawn_picture(folder / "drawn.png")
    out, kept = folder / "found", folder / "kept"
    out.mkdir()
    kept.mkdir()
    config = SegmentationConfig()
    write_nuclei(out, kept, picture, config, mpp=nuclei_inputs.NETWORK_MPP, device="cpu")
    area_um2 = pq.read_table(out / NUCLEI_FILE)["area_um2"].to_numpy()
    return NetworkOutcome(
        weights_sha256=weights_digest(config.model),
        n_nuclei=len(area_um2),
        area_um2=round(float(np.sum(area_um2)), 3),
    )
