"""The stages of one run, in order: each knows its config, its parents and its raw inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow.parquet as pq

from flows.config import RUN_FILES, CurateConfig, RunConfig
from pairing import cells, pack, patches
from pairing.annotations import donors_of_cells, labels_of_cells
from pairing.geometry import Affine
from pairing.registration import gates
from pairing.registration.given import read_alignment
from pairing.registration.record import REGISTRATION_FILE, Registration
from pairing.slide import open_slide
from pairing.xenium import open_xenium
from segmentation import segment
from shards.artifact import ContentHashes, build_artifact, write_atomically
from shards.dataset import read_record
from shards.errors import BadInput
from shards.schema import Panel

log = logging.getLogger("cellpair")

Stage = Literal["registration", "nuclei", "cells", "patches", "shards"]
REGISTRATION_VERSION = 2


class Call(Protocol):
    """Runs one stage of one run: directly, or as a task of some framework."""

    def __call__(self, name: str, make: Callable[[], Built]) -> Built: ...


class Blocks(Protocol):
    """Maps a pure function over blocks; `on_gpu` for those that run a network."""

    def __call__(self, fn: Any, items: Any) -> Any: ...

    def on_gpu(self, fn: Any, items: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Built:
    """One artifact of one run, made now or found."""

    run: str
    stage: Stage
    folder: Path
    fingerprint: str
    reused: bool
    summary: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CuratedRun:
    """All artifacts of one run, by stage."""

    config: RunConfig
    built: dict[Stage, Built]


class RunStages:
    """Builds or finds the artifacts of one run, stage by stage."""

    def __init__(
        self,
        config: CurateConfig,
        run: RunConfig,
        hashes: ContentHashes,
        blocks: Blocks,
        device: str,
        call: Call,
    ) -> None:
        self.config = config
        self.run = run
        self.blocks = blocks
        self.device = device
        self.call = call
        self.built: dict[Stage, Built] = {}
        given = {key: getattr(run, key) for key in RUN_FILES}
        self.inputs = {k: hashes.of(path) for k, path in given.items() if path is not None}
        self.spec = config.patch.spec("he" if run.slide else "morphology")

    def build(self) -> CuratedRun:
        if self.run.slide is not None:
            self._stage("registration", self._make_registration)
        self._check_annotations()
        if self.run.slide is not None and self.config.segmentation.model != "none":
            self._stage("nuclei", self._make_nuclei)
        self._stage("cells", self._make_cells)
        self._stage("patches", self._make_patches)
        self._stage("shards", self._make_shards)
        return CuratedRun(self.run, dict(self.built))

    def _stage(self, stage: Stage, make: Callable[[], Built]) -> None:
        built = self.call(f"{self.run.id}/{stage}", make)
        log.info(
            "%s %s: %s %s",
            self.run.id,
            stage,
            "reused" if built.reused else "made",
            built.fingerprint,
        )
        self.built[stage] = built
        if stage == "registration":
            self._check_verdict()

    def _artifact(
        self,
        stage: Stage,
        stage_version: int,
        config: dict[str, Any],
        parents: tuple[Stage, ...],
        inputs: dict[str, str],
        make: Callable[[Path], dict[str, Any]],
        provenance: dict[str, str] | None = None,
    ) -> Built:
        folder, record, reused = build_artifact(
            self.config.out / "runs" / self.run.id / stage,
            stage=stage,
            stage_version=stage_version,
            config=config,
            parents={p: self.built[p].fingerprint for p in parents if p in self.built},
            inputs=inputs,
            provenance={"cellpair": version("cellpair"), **(provenance or {})},
            make=make,
        )
        return Built(self.run.id, stage, folder, record.fingerprint, reused, record.summary)

    def _inputs(self, *keys: str) -> dict[str, str]:
        return {key: self.inputs[key] for key in keys if key in self.inputs}

    # Registration: the alignment as given, and what it must withstand.

    def _make_registration(self) -> Built:
        return self._artifact(
            "registration",
            REGISTRATION_VERSION,
            {"refine": self.config.registration.refine, "mpp": self.run.mpp},
            (),
            self._inputs("xenium", "slide", "alignment"),
            self._write_registration,
        )

    def _write_registration(self, out: Path) -> dict[str, Any]:
        assert self.run.slide is not None
        assert self.run.alignment is not None
        with (
            open_xenium(self.run.xenium) as xenium,
            open_slide(self.run.slide, mpp=self.run.mpp) as slide,
        ):
            method, he_px_from_xenium_um, keypoints = read_alignment(
                self.run.alignment, xenium.pixel_size_um
            )
            registration = gates.assess(
                slide,
                xenium.read_cells()[["x_um", "y_um"]].to_numpy(),
                he_px_from_xenium_um,
                xenium.pixel_size_um,
                method,
                keypoints,
            )
        write_atomically(out / REGISTRATION_FILE, registration.model_dump_json(indent=1).encode())
        return {"verdict": registration.verdict, "reasons": list(registration.reasons)}

    def _check_verdict(self) -> None:
        registration = self._registration()
        for reason in registration.reasons:
            log.warning("%s registration %s: %s", self.run.id, registration.verdict, reason)
        accepted = (*self.config.registration.accept, "not_assessable")
        if registration.verdict not in accepted:
            raise BadInput(
                self.run.alignment,
                expected=f"an alignment whose verdict is one of {', '.join(accepted)}",
                found=f"{registration.verdict}: {'; '.join(registration.reasons)}",
                remedy="check the alignment file and the slide, or accept the verdict knowingly "
                "by registration.accept",
            )

    def _registration(self) -> Registration:
        return read_record(self.built["registration"].folder / REGISTRATION_FILE, Registration)

    def _check_annotations(self) -> None:
        """Find faults of the files of donors and labels before hours of work, not after."""
        if self.run.donors is None and self.run.labels is None:
            return
        with open_xenium(self.run.xenium) as xenium:
            table = xenium.read_cells()
        cell_ids = table["cell_id"].tolist()
        if self.run.donors is not None:
            image_px_from_xenium_um, *_ = self._image()
            centres_px = image_px_from_xenium_um(table[["x_um", "y_um"]].to_numpy())
            donors_of_cells(self.run.donors, cell_ids, centres_px)
        if self.run.labels is not None:
            labels_of_cells(self.run.labels, cell_ids)

    # Nuclei on the H&E.

    def _make_nuclei(self) -> Built:
        model = self.config.segmentation.model
        config = segment.SegmentationConfig(model=model)
        return self._artifact(
            "nuclei",
            segment.STAGE_VERSION,
            {**config.fingerprint_config(), "mpp": self.run.mpp},
            (),
            {"slide": self.inputs["slide"], "weights": segment.weights_digest(model)},
            partial(self._write_nuclei, config),
            {"device": self.device},
        )

    def _write_nuclei(self, config: segment.SegmentationConfig, out: Path) -> dict[str, Any]:
        assert self.run.slide is not None
        return segment.write_nuclei(
            out,
            self.run.slide,
            config,
            mpp=self.run.mpp,
            device=self.device,
            map_blocks=self.blocks.on_gpu,
        )

    # Cells: counts, centres, matches, neighbours.

    def _make_cells(self) -> Built:
        config = cells.CellsConfig(
            **self.config.cells.model_dump(), center=self.config.patch.center
        )
        return self._artifact(
            "cells",
            cells.STAGE_VERSION,
            {**config.model_dump(), "species": self.run.species},
            ("registration", "nuclei"),
            self._inputs("xenium"),
            partial(self._write_cells, config),
        )

    def _write_cells(self, config: cells.CellsConfig, out: Path) -> dict[str, Any]:
        with open_xenium(self.run.xenium) as xenium:
            species = self.run.species or xenium.species
            if species is None:
                raise BadInput(
                    f"run {self.run.id}",
                    expected="the species of the run",
                    found="none in the bundle",
                    remedy='set species = "human" or "mouse" in its [[runs]]',
                )
            he_nuclei = he_px_from_xenium_um = mpp = None
            if "nuclei" in self.built:
                he_nuclei = pq.read_table(self.built["nuclei"].folder / segment.NUCLEI_FILE)
                registration = self._registration()
                he_px_from_xenium_um, mpp = registration.affine, registration.slide_mpp
            return cells.write_cells(
                out, xenium, config, species, he_nuclei, he_px_from_xenium_um, mpp
            )

    # Patches, and shards of them.

    def _image(self) -> tuple[Affine, float, patches.OpenImage, str]:
        """Transform to the image's pixels, its mpp, how to open it, and which input it is."""
        if self.run.slide is None:
            with open_xenium(self.run.xenium) as xenium:
                mpp = xenium.pixel_size_um
            opener = partial(patches.open_run_morphology, self.run.xenium)
            return Affine.scale(1 / mpp), mpp, opener, "xenium"
        registration = self._registration()
        opener = partial(open_slide, self.run.slide, mpp=self.run.mpp)
        return registration.affine, registration.slide_mpp, opener, "slide"

    def _make_patches(self) -> Built:
        image_px_from_xenium_um, _, open_image, source = self._image()

        def make(out: Path) -> dict[str, Any]:
            table = cells.read_cells(self.built["cells"].folder)
            centres_px = image_px_from_xenium_um(table[["x_um", "y_um"]].to_numpy())
            return patches.write_patches(out, open_image, centres_px, self.spec, self.blocks)

        return self._artifact(
            "patches",
            patches.STAGE_VERSION,
            self.spec.model_dump(),
            ("registration", "cells"),
            self._inputs(source),
            make,
        )

    def _make_shards(self) -> Built:
        image_px_from_xenium_um, image_mpp, _, _ = self._image()
        panel = read_record(self.built["cells"].folder / cells.PANEL_FILE, Panel)
        config = pack.PackConfig(
            run=self.run.id,
            donor=self.run.donor,
            source_id=self.run.source_id,
            tissue=self.run.tissue,
            species=panel.species,
            filters=self.config.filters,
        )

        def make(out: Path) -> dict[str, Any]:
            return pack.write_shard_set(
                out,
                config,
                self.spec,
                self.built["cells"].folder,
                self.built["patches"].folder,
                image_px_from_xenium_um,
                image_mpp,
                donors=self.run.donors,
                labels=self.run.labels,
            )

        return self._artifact(
            "shards",
            pack.STAGE_VERSION,
            {**config.model_dump(), "patch": self.spec.model_dump()},
            ("registration", "cells", "patches"),
            self._inputs("donors", "labels"),
            make,
        )
