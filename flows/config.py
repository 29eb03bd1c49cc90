"""The `curate` config: read from TOML, resolved against its folder, all faults at once."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from flows.config_faults import (
    RUN_FILES,
    cells_faults,
    faults_of_records,
    missing_inputs,
    run_faults,
    runs_faults,
    tables_of,
    url_faults,
)
from flows.split import Donor, SplitSection, split_of, tell_together
from pairing.cells import CellsOptions
from pairing.pack import Filters
from shards.errors import BadInput, BadInputs
from shards.remote import Location, RemotePath, is_url, remote_path
from shards.schema import PatchSpec, Record, RunId
from shards.store import working_folder

__all__ = [
    "RUN_FILES",
    "CurateConfig",
    "GivenRun",
    "RunConfig",
    "SplitSection",
    "read_curate_config",
    "split_of",
]


# Pages and logs of the whole lie beside those of the runs.
_RESERVED = ("index", "curate")


def _not_reserved(run: str) -> str:
    if run.lower() in _RESERVED:
        raise PydanticCustomError("reserved", f"an id other than {' and '.join(_RESERVED)}")
    return run


class PatchConfig(Record):
    """`[patch]`."""

    fov_um: float = Field(default=56.0, gt=0, le=1000)
    size_px: int = Field(default=224, ge=16, le=2048)
    center: Literal["nucleus", "cell"] = "nucleus"
    jpeg_quality: int = Field(default=95, ge=1, le=100)

    def spec(self, image: Literal["he", "morphology"]) -> PatchSpec:
        return PatchSpec(image=image, **self.model_dump())


class SegmentationSection(Record):
    """`[segmentation]`: `compact`, a name of Cellpose 4 weights, a path to them, or `none`."""

    model: str = "compact"


class RegistrationSection(Record):
    """`[registration]`; a given alignment with too few nuclei to assess is taken as given and told.

    `refine` refines a given alignment on the nuclei. A run whose verdict is none of `accept` fails;
    it is `fail` where the median error is above `max_median_error_um`.
    """

    refine: bool = True
    accept: tuple[Literal["pass", "doubtful", "fail"], ...] = ("pass", "doubtful")
    max_median_error_um: float = Field(default=5.0, gt=0)


class GivenRun(Record):
    """One `[[runs]]` as it is written.

    Exactly one of a slide (with its alignment) and `image = "morphology"`. And exactly one of
    `donor`, where all cells are of one, and `donors`: a GeoJSON of polygons in level-0 pixels of
    the image that the patches are cut from, or a csv with the columns cell_id and donor. `labels`
    is a csv with the columns cell_id and label (or group).
    """

    # It names files, with a slug of the donor: 255 bytes are the most that a file's name can have.
    id: Annotated[RunId, Field(max_length=100), AfterValidator(_not_reserved)]
    xenium: Location
    donor: Donor | None = None
    donors: Location | None = None
    labels: Location | None = None
    source_id: str | None = None
    slide: Location | None = None
    image: Literal["morphology"] | None = None
    alignment: Location | Literal["auto"] | None = None
    tissue: str | None = None
    species: str | None = None
    mpp: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        tell_together(run_faults(self.model_dump()))
        return self


class RunConfig(GivenRun):
    """One `[[runs]]` on this machine: files that lie behind URLs are copies."""

    xenium: Path
    donors: Path | None = None
    labels: Path | None = None
    slide: Path | None = None
    alignment: Path | Literal["auto"] | None = None


class CurateConfig(Record):
    """A whole `curate` config; paths are absolute.

    Where `out` is a URL in the file, it is the working copy here, and `remote` what lies behind it.
    """

    name: Annotated[str, Field(min_length=1)]
    out: Path
    patch: PatchConfig = PatchConfig()
    cells: CellsOptions = CellsOptions()
    segmentation: SegmentationSection = SegmentationSection()
    registration: RegistrationSection = RegistrationSection()
    filters: Filters = Filters()
    split: SplitSection = SplitSection()
    runs: tuple[GivenRun, ...]
    _remote: RemotePath | None = PrivateAttr(default=None)

    @property
    def remote(self) -> RemotePath | None:
        """What lies behind the URL that `out` is the working copy of."""
        return self._remote

    def working_on(self, remote: RemotePath) -> CurateConfig:
        """The same config, its output behind a URL."""
        config = self.model_copy(update={"out": working_folder(remote)})
        config._remote = remote
        return config

    @property
    def active_runs(self) -> tuple[GivenRun, ...]:
        """The runs but those whose one donor is withdrawn; in the order of the config."""
        return tuple(
            run for run in self.runs if run.donor is None or not self.split.is_withdrawn(run.donor)
        )

    @model_validator(mode="after")
    def _goes_together(self) -> CurateConfig:
        runs = [run.model_dump() for run in self.runs]
        tell_together(runs_faults(runs, self.out, self.split.model_dump()))
        tell_together(cells_faults({**self.model_dump(), "runs": runs}))
        return self


# The known keys of each section, for the one that a misspelt key is nearest to.
_SECTIONS: dict[str, type[Record]] = {
    "": CurateConfig,
    "patch": PatchConfig,
    "cells": CellsOptions,
    "segmentation": SegmentationSection,
    "registration": RegistrationSection,
    "filters": Filters,
    "split": SplitSection,
    "runs": GivenRun,
}


def read_curate_config(path: Path) -> CurateConfig:
    """A config file, its relative paths resolved against its folder.

    Raises BadInputs with every fault of the file at once: syntax, unknown keys, wrong values,
    inputs that do not exist.
    """
    path = path.resolve()
    raw = _read_toml(path)
    faults = bad_urls = list(url_faults(path, raw))
    remote = _resolve_paths(raw, path.parent, {fault.where for fault in bad_urls})
    config = None
    try:
        config = CurateConfig.model_validate(raw)
    except ValidationError as error:
        keys = {section: record.model_fields for section, record in _SECTIONS.items()}
        faults += faults_of_records(path, error, raw, keys)
    faults += missing_inputs(path, raw)
    if config is None or faults:
        # The first fault of a key is the one that explains it.
        first = {fault.where: fault for fault in reversed(faults)}
        raise BadInputs([fault for fault in faults if first[fault.where] is fault])
    return config if remote is None else config.working_on(remote)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        # Some editors put a byte-order mark before the text.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        found = error.strerror if isinstance(error, OSError) else error
        raise BadInputs(
            [
                BadInput(
                    path,
                    expected="a readable TOML file",
                    found=str(found),
                    remedy="see interface of `cellpair curate` in the README for an example",
                )
            ]
        ) from error


def _resolve_paths(raw: dict[str, Any], folder: Path, bad: set[str]) -> RemotePath | None:
    """Make paths absolute; of an output behind a URL the working copy, and the URL is returned.

    `bad` says where URLs stand that are none.
    """

    def resolve(table: dict[str, Any], key: str) -> None:
        if isinstance(table.get(key), str) and not is_url(table[key]):
            table[key] = str(folder / table[key])

    remote = None
    if isinstance(raw.get("out"), str) and is_url(raw["out"]):
        if not bad:
            remote = remote_path(raw["out"])
        raw["out"] = str(folder if remote is None else working_folder(remote))
    resolve(raw, "out")
    segmentation = raw.get("segmentation")
    if isinstance(segmentation, dict) and "/" in str(segmentation.get("model", "")):
        resolve(segmentation, "model")
    for _, run in tables_of(raw, "runs"):
        for key in RUN_FILES:
            if not (key == "alignment" and run.get(key) == "auto"):
                resolve(run, key)
    return remote
