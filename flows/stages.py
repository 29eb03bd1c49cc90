"""The stages of one run, in order: each knows its config, its parents and its raw inputs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from flows.built import Blocks, Built, Call, CuratedRun, Stage, cellpair_version
from flows.config import CurateConfig, GivenRun
from flows.identities import StageConfigs, identities, nuclei_of_all
from flows.log import working_on
from flows.registering import Registering, write_registration_of
from flows.run_files import RunFiles
from flows.verdict import require_accepted, tell_match_rate
from flows.withdrawal import withdrawn_of, write_nuclei_of_others
from pairing import cells, pack, patches
from pairing.annotations import donors_of_cells, labels_of_cells
from pairing.geometry import Affine, Points
from pairing.he_cells import he_cell_errors, he_cell_ids
from pairing.match_rate import MatchRate
from pairing.outlines import StoredOutlines
from pairing.pack_plan import cells_in_hashed_order
from pairing.patch_blocks import OpenImage
from pairing.registration.record import (
    REGISTRATION_FILE,
    Registration,
    judged,
    read_cell_errors,
    read_cell_places,
    read_registration,
)
from pairing.slide import open_slide
from pairing.warp import Warp
from pairing.xenium import open_xenium
from segmentation.config import NUCLEI_FILE
from segmentation.maps import Tasks
from shards.artifact import Identity, Made, Make
from shards.cache import Holding
from shards.content import ContentHashes
from shards.dataset import read_record
from shards.errors import BadInput
from shards.store import Store

log = logging.getLogger("cellpair")


class RunStages:
    """Builds or finds the artifacts of one run, stage by stage.

    Their identities are known before any of them is there: `identities`, in order. Files that lie
    behind URLs are fetched when a stage is made, and `held` until `release`; `run` names where
    their copies are then.
    """

    def __init__(
        self,
        config: CurateConfig,
        run: GivenRun,
        hashes: ContentHashes,
        blocks: Blocks,
        device: str,
        call: Call,
        store: Store,
        held: Holding,
    ) -> None:
        self.config = config
        self.store = store
        self.blocks = blocks
        self.device = device
        self.call = call
        self.built: dict[Stage, Built] = {}
        self._of_all: Built | None = None  # nuclei, those of withdrawn donors too
        self._files = RunFiles(run, hashes, held)
        self.inputs, self.run = self._files.inputs, self._files.run
        self.configs = StageConfigs.of(config, self.run)
        self.withdrawn = withdrawn_of(self._files, config.split)
        self.identities = identities(config, self.run, self.configs, self.inputs, self.withdrawn)

    def hold_inputs(self) -> None:
        """Have copies of the files behind URLs there, and the registration, until `release`."""
        self._files.hold()
        if "registration" in self.built:
            self.store.at_hand(self.built["registration"].folder, self._files.held)

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Inside, the run's files are there, and those of all that was built."""
        try:
            self.hold_inputs()
            for built in self.built.values():
                self.store.at_hand(built.folder, self._files.held)
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Copies of this run's files and artifacts are not needed any more."""
        self._files.held.close()

    def folder_of(self, stage: Stage) -> Path:
        """Where the artifact of a stage is or will be."""
        parent = self.config.out / "runs" / self.run.id / stage
        return parent / self.identities[stage].fingerprint

    def register(self) -> None:
        """The registration and its verdict, and the files of donors and labels.

        So that faults of these are found before hours of work. Raises BadInput.
        """
        if "registration" in self.identities:
            self._build("registration", self._write_registration)
            require_accepted(self.run, self.registration(), self.config.registration.accept)
        if self.store.find(self.folder_of("shards")) is None:
            self._check_transcripts()
            self._check_annotations()

    def finish(self) -> CuratedRun:
        """All that follows the registration."""
        if "registration" in self.built:
            self.store.at_hand(self.built["registration"].folder, self._files.held)
        if "nuclei" in self.identities:
            self._build_nuclei()
        self._build("cells", self._write_cells)
        summary = self.built["cells"].summary
        if summary["match"] is not None:
            rate = MatchRate.model_validate(summary["match"])
            tell_match_rate(self.run, rate, refined=self.registration().refined)
        self._build("patches", self._write_patches)
        self._build("shards", self._write_shards)
        return CuratedRun(self.run, dict(self.built), self.withdrawn, self.at_hand)

    def _build(self, stage: Stage, make: Make) -> None:
        self.built[stage] = self._build_as(self.identities[stage], stage, make)
        if stage == "registration":  # small, and looked at in every run
            self.store.at_hand(self.built[stage].folder, self._files.held)

    def _build_as(self, identity: Identity, stage: Stage, make: Make) -> Built:
        def build() -> Built:
            start_s = time.monotonic()
            folder, record, reused = self.store.build(
                self.folder_of(stage).parent,
                identity,
                partial(self._make, identity, make),
                provenance={"cellpair": cellpair_version()},
                check_inputs=partial(self._files.check_unchanged, identity.inputs),
                held=self._files.held,
            )
            seconds = round(time.monotonic() - start_s, 3)
            return Built(
                self.run.id, stage, folder, record.fingerprint, reused, record.summary, seconds
            )

        with working_on(self.run.id, stage):
            built = self.call(f"{self.run.id}/{stage}", build)
            log.info(
                "%s %s: %s %s in %.1f s",
                self.run.id,
                stage,
                "reused" if built.reused else "made",
                built.fingerprint,
                built.seconds,
            )
        return built

    def _make(self, identity: Identity, make: Make, out: Path, kept: Path) -> dict[str, Any] | Made:
        self.hold_inputs()
        for parent in identity.parents:
            folder = next(b.folder for s, b in self.built.items() if s == parent)
            self.store.at_hand(folder, self._files.held)
        return make(out, kept)

    # Registration: the alignment, given or found, and what it must withstand.

    def _write_registration(self, out: Path, kept: Path) -> dict[str, Any]:
        assert self.run.slide is not None
        assert self.run.alignment is not None
        what = Registering(
            out=out,
            xenium=self.run.xenium,
            slide=self.run.slide,
            mpp=self.run.mpp,
            alignment=self.run.alignment,
            refine=self.config.registration.refine,
            donors=self.run.donors,
            withdrawn=self.withdrawn,
        )
        summary: dict[str, Any]
        (summary,) = self.blocks(write_registration_of, Tasks([what], "registrations"))
        return summary

    def registration(self) -> Registration:
        """The record, under the config's limit of the median error."""
        record = read_record(self.built["registration"].folder / REGISTRATION_FILE, Registration)
        return judged(record, self.config.registration.max_median_error_um)

    def _check_annotations(self) -> None:
        if self.run.donors is None and self.run.labels is None:
            return
        cell_ids = self._files.cell_ids().tolist()
        if self.run.donors is not None:
            donors_of_cells(self.run.donors, cell_ids, self.centres_px())
        if self.run.labels is not None and not self._counts_he_nuclei:
            labels_of_cells(self.run.labels, cell_ids)

    def _check_transcripts(self) -> None:
        if not self._counts_he_nuclei:
            return
        self.hold_inputs()
        with open_xenium(self.run.xenium) as xenium:
            if not xenium.has_transcripts:
                raise BadInput(
                    f"run {self.run.id}, {self.run.xenium}",
                    expected='transcripts, which unit = "he_nuclei" looks up by their place',
                    found="none",
                    remedy='copy the run\'s transcripts into it, or set unit = "xenium"',
                )

    @property
    def _counts_he_nuclei(self) -> bool:
        return self.config.cells.unit == "he_nuclei"

    def centres_px(self) -> Points:
        """(n, 2) centres of the instrument's cells in the image that the patches are cut from."""
        self.hold_inputs()
        with open_xenium(self.run.xenium) as xenium:
            centres_um = xenium.read_cells()[["x_um", "y_um"]].to_numpy()
        image_px_from_xenium_um, *_ = self._image()
        return image_px_from_xenium_um(centres_um)

    def donor_of_cells(self) -> dict[str, str]:
        """The canonical donor of each cell that has one, by cell_id; of a run with several."""
        assert self.run.donors is not None
        cell_ids = self._files.cell_ids().tolist()
        donors, _ = donors_of_cells(self.run.donors, cell_ids, self.centres_px())
        canonical = self.config.split.canonical
        return {c: canonical(d) for c, d in zip(cell_ids, donors, strict=True) if d is not None}

    def image_mpp(self) -> float:
        """µm per pixel of that image."""
        self.hold_inputs()
        return self._image()[1]

    # Nuclei on the H&E.

    def _build_nuclei(self) -> None:
        """Nuclei of the H&E; without withdrawn donors', but cells are matched to those of all."""
        if not self.withdrawn:
            self._build("nuclei", self._write_nuclei)
            return
        if any(self.store.find(self.folder_of(stage)) is None for stage in ("nuclei", "cells")):
            identity = nuclei_of_all(self.run, self.configs, self.inputs)
            assert identity is not None
            self._of_all = self._build_as(identity, "nuclei", self._write_nuclei)
        self._build("nuclei", self._write_nuclei_of_others)

    def _write_nuclei_of_others(self, out: Path, _: Path) -> dict[str, Any]:
        assert self._of_all is not None
        self.store.at_hand(self._of_all.folder, self._files.held)
        return write_nuclei_of_others(
            out, self._of_all, self._files, self.withdrawn, self.centres_px()
        )

    def _write_nuclei(self, out: Path, kept: Path) -> dict[str, Any]:
        # Seconds of torch that a run whose nuclei are there never needs.
        from segmentation.segment import write_nuclei

        assert self.run.slide is not None
        return write_nuclei(
            out,
            kept,
            self.run.slide,
            self.configs.segmentation,
            mpp=self.run.mpp,
            device=self.device,
            maps=self.blocks,
        )

    # Cells: counts, centres, matches, neighbours.

    def _write_cells(self, out: Path, kept: Path) -> dict[str, Any]:
        with open_xenium(self.run.xenium) as xenium:
            species = self.run.species or xenium.species
            if species is None:
                raise BadInput(
                    f"run {self.run.id}",
                    expected="the species of the run",
                    found="none in the bundle",
                    remedy='set species = "human" or "mouse" in its [[runs]]',
                )
            he = None
            if "nuclei" in self.built:
                he_px_from_xenium_um, mpp, _ = self._image()
                of_all = self._of_all or self.built["nuclei"]
                self.store.at_hand(of_all.folder, self._files.held)
                path = of_all.folder / NUCLEI_FILE
                columns = ["nucleus_id", "x_px", "y_px", "area_um2"]
                outlines = None if self._counts_he_nuclei else StoredOutlines(path)
                he = cells.HeSide(
                    pq.read_table(path, columns=columns + ["polygon_px"] * (outlines is None)),
                    he_px_from_xenium_um,
                    mpp,
                    read_cell_errors(self.built["registration"].folder),
                    outlines,
                )
            withdrawal = None
            if self.withdrawn:
                assert self.run.donors is not None
                image_px_from_xenium_um, *_ = self._image()
                n_he_nuclei = self.built["nuclei"].summary["n_nuclei"] if he is not None else None
                withdrawal = cells.Withdrawal(
                    self.run.donors, self.withdrawn, image_px_from_xenium_um, n_he_nuclei
                )
            return cells.write_cells(
                out, kept, xenium, self.configs.cells, species, he, withdrawal, self.blocks
            )

    # Patches, and shards of them.

    def _image(self) -> tuple[Warp, float, OpenImage]:
        """Transform to the image's pixels, its mpp, and how to open it."""
        if self.run.slide is None:
            with open_xenium(self.run.xenium) as xenium:
                mpp = xenium.pixel_size_um
            opener = partial(patches.open_run_morphology, self.run.xenium)
            return Warp(Affine.scale(1 / mpp)), mpp, opener
        registration, warp = read_registration(self.built["registration"].folder)
        return warp, registration.slide_mpp, partial(open_slide, self.run.slide, mpp=self.run.mpp)

    def _write_patches(self, out: Path, kept: Path) -> Made:
        image_px_from_xenium_um, _, open_image = self._image()
        table = cells.read_cells(self.built["cells"].folder)
        centres_px = image_px_from_xenium_um(table[["x_um", "y_um"]].to_numpy())
        order = cells_in_hashed_order(table["cell_id"].to_numpy(), self.run.id)
        return patches.write_patches(
            out, kept, open_image, centres_px, order, self.configs.patch, self.blocks
        )

    def _write_shards(self, out: Path, kept: Path) -> Made:
        image_px_from_xenium_um, image_mpp, _ = self._image()
        error_um = None
        if self._counts_he_nuclei:
            he_nuclei = pq.read_table(
                self.built["nuclei"].folder / NUCLEI_FILE, columns=["nucleus_id", "x_px", "y_px"]
            )
            places = read_cell_places(self.built["registration"].folder)
            error_um = he_cell_errors(he_nuclei, places)
        elif self.run.slide:
            error_um = read_cell_errors(self.built["registration"].folder)
        withdrawn_cell_ids: list[str] = []
        if self.withdrawn:
            table = cells.read_cells(self.built["cells"].folder)
            if self._counts_he_nuclei:
                n_of_all = self.built["nuclei"].summary["n_of_all"]
                all_ids = pd.Series(he_cell_ids(range(1, n_of_all + 1)))
            else:
                all_ids = self._files.cell_ids()
            withdrawn_cell_ids = all_ids[~all_ids.isin(table["cell_id"])].tolist()
        return pack.write_shard_set(
            out,
            kept,
            self.configs.packing,
            self.configs.patch,
            self.built["cells"].folder,
            self.built["patches"].folder,
            image_px_from_xenium_um,
            image_mpp,
            self.blocks,
            error_um=error_um,
            segmented="nuclei" in self.built,
            donors=self.run.donors,
            labels=self.run.labels,
            withdrawn=self.withdrawn,
            withdrawn_cell_ids=withdrawn_cell_ids,
        )
