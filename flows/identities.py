"""What the bytes of each stage hang on: its whole config, its parents and its raw inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.built import Stage
from flows.config import CurateConfig, RunConfig
from pairing import cells, pack, patches
from segmentation import config as segmentation
from shards.artifact import Identity
from shards.schema import PatchSpec, digest

REGISTRATION_VERSION = 7


@dataclass(frozen=True, slots=True)
class StageConfigs:
    """The configs of the stages of one run."""

    segmentation: segmentation.SegmentationConfig
    cells: cells.CellsConfig
    patch: PatchSpec
    packing: pack.PackConfig

    @classmethod
    def of(cls, config: CurateConfig, run: RunConfig) -> StageConfigs:
        return cls(
            segmentation=segmentation.SegmentationConfig(model=config.segmentation.model),
            cells=cells.CellsConfig(**config.cells.model_dump(), center=config.patch.center),
            patch=config.patch.spec("he" if run.slide else "morphology"),
            packing=pack.PackConfig(
                run=run.id,
                donor=run.donor,
                source_id=run.source_id,
                tissue=run.tissue,
                filters=config.filters,
            ),
        )


def identities(
    config: CurateConfig,
    run: RunConfig,
    configs: StageConfigs,
    inputs: Mapping[str, str],
    withdrawn: tuple[str, ...],
) -> dict[Stage, Identity]:
    """The identities of a run's stages, in order; those that it does not need are left out.

    `inputs` holds the content hashes of the run's files by their key in the config; `withdrawn` the
    donors whose cells are left out of a run with several. Raises BadInput without the weights.
    """
    known: dict[Stage, Identity] = {}

    def add(
        stage: Stage,
        stage_version: int,
        stage_config: dict[str, Any],
        *,
        parents: tuple[Stage, ...] = (),
        given: Mapping[str, str] = inputs,
        of: tuple[str, ...],
    ) -> None:
        known[stage] = Identity(
            stage=stage,
            stage_version=stage_version,
            config=stage_config,
            parents={p: known[p].fingerprint for p in parents if p in known},
            inputs={key: given[key] for key in of if key in given},
        )

    # A hash: the record must not name whom it must not hold.
    of_withdrawal = {"withdrawn": digest(withdrawn)} if withdrawn else {}
    of_donors = ("donors",) if withdrawn else ()
    if run.slide is not None:
        add(
            "registration",
            REGISTRATION_VERSION,
            {
                "alignment": "auto" if run.alignment == "auto" else "given",
                "refine": run.alignment == "auto" or config.registration.refine,
                "mpp": run.mpp,
                **of_withdrawal,
            },
            of=("xenium", "slide", "alignment", *of_donors),
        )
    of_all = nuclei_of_all(run, configs, inputs)
    if of_all is not None:
        known["nuclei"] = of_all
    if of_all is not None and withdrawn:
        add(
            "nuclei",
            of_all.stage_version,
            {**of_all.config, **of_withdrawal},
            parents=("registration",),
            given={**inputs, **of_all.inputs},
            of=(*of_all.inputs, "xenium", "donors"),
        )
    add(
        "cells",
        cells.STAGE_VERSION,
        {
            **configs.cells.model_dump(),
            "species": run.species,
            **of_withdrawal,
        },
        parents=("registration", "nuclei"),
        of=("xenium", *of_donors),
    )
    add(
        "patches",
        patches.STAGE_VERSION,
        {**configs.patch.model_dump(), "run": run.id},  # shards are ordered by it, and parts so
        parents=("registration", "cells"),
        of=("slide",) if run.slide else ("xenium",),
    )
    add(
        "shards",
        pack.STAGE_VERSION,
        {**configs.packing.model_dump(mode="json"), "patch": configs.patch.model_dump()},
        parents=("registration", "cells", "patches"),
        of=("donors", "labels"),
    )
    return known


def nuclei_of_all(
    run: RunConfig, configs: StageConfigs, inputs: Mapping[str, str]
) -> Identity | None:
    """Of the nuclei of everybody on the slide; None where none are looked for.

    Where a donor is withdrawn no artifact has it as a parent, so that it does not stay.
    """
    if run.slide is None or configs.segmentation.model == "none":
        return None
    weights = segmentation.weights_digest(configs.segmentation.model)
    return Identity(
        stage="nuclei",
        stage_version=segmentation.STAGE_VERSION,
        config={**configs.segmentation.fingerprint_config(), "mpp": run.mpp},
        parents={},
        inputs={"slide": inputs["slide"], "weights": weights},
    )
