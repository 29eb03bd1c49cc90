"""The `curate` config: read from TOML, resolved against its folder, all faults at once."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from flows.split import SplitSection, split_of
from pairing.annotations import CSV_SUFFIX, GEOJSON_SUFFIXES
from pairing.cells import CellsOptions
from pairing.pack import Filters
from shards.errors import BadInput, BadInputs, not_there_yet
from shards.schema import PatchSpec, Record, RunId

__all__ = ["CurateConfig", "RunConfig", "SplitSection", "read_curate_config", "split_of"]

# Options of the interface that arrive with a later version: refused with words, never half done.
# A value that asks for nothing is accepted.
_LATER: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "registration.refine": (
        (False,),
        "refinement of a given alignment",
        "leave it out, or set refine = false: the alignment is taken as it is",
    ),
    "registration.max_median_error_um": (
        (),
        "a measured registration error",
        "leave it out: a given alignment is judged by its gates alone",
    ),
    "cells.unit": (("xenium",), "any unit but the instrument's cells", 'set unit = "xenium"'),
    "split.hold_out": (((), []), "hold-out lists", "name the donors in split.assign"),
}
# Keys of a run that name files or folders.
RUN_FILES = ("xenium", "slide", "alignment", "donors", "labels")
_LATER_FLAGS = ("blurred", "pen", "fold", "torn")


class PatchConfig(Record):
    """`[patch]`."""

    fov_um: float = Field(default=56.0, gt=0, le=1000)
    size_px: int = Field(default=224, ge=16, le=2048)
    center: Literal["nucleus", "cell"] = "nucleus"
    jpeg_quality: int = Field(default=95, ge=1, le=100)

    def spec(self, image: Literal["he", "morphology"]) -> PatchSpec:
        return PatchSpec(image=image, **self.model_dump())


class SegmentationSection(Record):
    """`[segmentation]`: `compact`, a path to Cellpose 4 weights, or `none`."""

    model: str = "compact"


class RegistrationSection(Record):
    """`[registration]`; an alignment with too few cells to assess is taken as given and told."""

    refine: Literal[False] = False
    accept: tuple[Literal["pass", "doubtful", "fail"], ...] = ("pass", "doubtful")


class RunConfig(Record):
    """One `[[runs]]`: exactly one of a slide (with its alignment) and `image = "morphology"`.

    And exactly one of `donor`, where all cells are of one, and `donors`: a GeoJSON of polygons in
    level-0 pixels of the image that the patches are cut from, or a csv with the columns cell_id
    and donor. `labels` is a csv with the columns cell_id and label (or group).
    """

    id: RunId
    xenium: Path
    donor: Annotated[str, Field(min_length=1)] | None = None
    donors: Path | None = None
    labels: Path | None = None
    source_id: str | None = None
    slide: Path | None = None
    image: Literal["morphology"] | None = None
    alignment: Path | None = None
    tissue: str | None = None
    species: str | None = None
    mpp: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _goes_together(self) -> RunConfig:
        faults = [*self._image_faults(), *self._annotation_faults()]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _image_faults(self) -> Iterator[str]:
        if (self.slide is None) == (self.image is None):
            yield 'give either slide = "…" or image = "morphology"'
        elif self.slide is not None and self.alignment is None:
            yield (
                "alignment is missing: give the 10x matrix csv or the keypoints csv that Xenium "
                "Explorer exports for this slide"
            )
        elif self.slide is None and (self.alignment is not None or self.mpp is not None):
            yield 'image = "morphology" needs neither alignment nor mpp'

    def _annotation_faults(self) -> Iterator[str]:
        if (self.donor is None) == (self.donors is None):
            yield (
                'give either donor = "…" or, for a run with several, donors = "….geojson" or '
                'donors = "….csv"'
            )
        files = (*GEOJSON_SUFFIXES, CSV_SUFFIX)
        if self.donor is not None and self.donor.lower().endswith(files):
            yield f"donor = {self.donor!r} is the name of a file: write donors for several donors"
        for key, path, suffixes in (
            ("donors", self.donors, files),
            ("labels", self.labels, (CSV_SUFFIX,)),
        ):
            if path is not None and path.suffix.lower() not in suffixes:
                yield f"{key} = {path.name!r} does not end in {' or '.join(suffixes)}"


class CurateConfig(Record):
    """A whole `curate` config; paths are absolute."""

    name: Annotated[str, Field(min_length=1)]
    out: Path
    patch: PatchConfig = PatchConfig()
    cells: CellsOptions = CellsOptions()
    segmentation: SegmentationSection = SegmentationSection()
    registration: RegistrationSection = RegistrationSection()
    filters: Filters = Filters()
    split: SplitSection = SplitSection()
    runs: tuple[RunConfig, ...]

    @property
    def active_runs(self) -> tuple[RunConfig, ...]:
        """The runs but those whose one donor is withdrawn; in the order of the config."""
        return tuple(
            run for run in self.runs if run.donor is None or not self.split.is_withdrawn(run.donor)
        )

    @model_validator(mode="after")
    def _runs_with_ids_of_their_own(self) -> CurateConfig:
        if not self.runs:
            raise ValueError("there is no [[runs]]")
        twice = [i for i, n in Counter(r.id for r in self.runs).items() if n > 1]
        if twice:
            raise ValueError(f"run ids are used twice: {', '.join(twice)}")
        if not self.active_runs:
            raise ValueError("split.withdraw leaves no run: name fewer donors, or `cellpair clean`")
        return self


def read_curate_config(path: Path) -> CurateConfig:
    """A config file, its relative paths resolved against its folder.

    Raises BadInputs with every fault of the file at once: syntax, unknown keys, wrong values,
    options that are not there yet, inputs that do not exist.
    """
    path = path.resolve()
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInputs(
            [
                BadInput(
                    path,
                    expected="a readable TOML file",
                    found=str(error),
                    remedy="see interface of `cellpair curate` in the README for an example",
                )
            ]
        ) from error
    faults = _refused(path, raw)
    _resolve_paths(raw, path.parent)
    try:
        config = CurateConfig.model_validate(raw)
    except ValidationError as error:
        refused = {f.where for f in faults}
        faults += [f for f in _faults_of(path, error) if f.where not in refused]
        raise BadInputs(faults) from error
    refused = {f.where for f in faults}
    faults += [f for f in _missing_inputs(path, config) if f.where not in refused]
    if faults:
        raise BadInputs(faults)
    return config


def _at(path: Path, *keys: object) -> str:
    return f"{path}: " + ".".join(str(k) for k in keys)


def _refused(path: Path, raw: dict[str, Any]) -> list[BadInput]:
    faults = []
    for dotted, (accepted, what, instead) in _LATER.items():
        section, key = dotted.split(".")
        table = raw.get(section)
        if isinstance(table, dict) and key in table and table[key] not in accepted:
            faults.append(not_there_yet(_at(path, dotted), what, instead))
    filters = raw.get("filters")
    flags = filters.get("drop_flags", ()) if isinstance(filters, dict) else ()
    for flag in flags if isinstance(flags, list) else ():
        if flag in _LATER_FLAGS:
            where = _at(path, "filters.drop_flags", flags.index(flag))
            faults.append(
                not_there_yet(where, f"the flag {flag!r}", 'name "damaged_tile" or "edge"')
            )
    runs = raw.get("runs")
    for i, run in enumerate(runs if isinstance(runs, list) else ()):
        if not isinstance(run, dict):
            continue
        if run.get("alignment") == "auto":
            faults.append(
                not_there_yet(
                    _at(path, "runs", i, "alignment"),
                    "automatic registration",
                    "give the 10x matrix csv (<sample>_he_imagealignment.csv) or the keypoints csv "
                    "that Xenium Explorer exports for this slide",
                )
            )
    return faults


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    def resolve(table: dict[str, Any], key: str) -> None:
        if isinstance(table.get(key), str):
            table[key] = str(folder / table[key])

    resolve(raw, "out")
    segmentation = raw.get("segmentation")
    if isinstance(segmentation, dict) and "/" in str(segmentation.get("model", "")):
        resolve(segmentation, "model")
    runs = raw.get("runs")
    for run in runs if isinstance(runs, list) else ():
        if isinstance(run, dict):
            for key in RUN_FILES:
                if not (key == "alignment" and run.get(key) == "auto"):
                    resolve(run, key)


def _faults_of(path: Path, error: ValidationError) -> list[BadInput]:
    faults = []
    for fault in error.errors():
        if fault["type"] == "extra_forbidden":
            words = ("a key of the interface", "an unknown key", "remove it or mend its spelling")
        elif fault["type"] == "missing":
            words = ("a value, since nothing can stand for it", "no such key", "give it")
        elif fault["type"] == "value_error":
            # Raised by our own validators: the message says what is wrong with several keys.
            found = fault["msg"].removeprefix("Value error, ")
            words = ("keys that go together", found, "mend them")
        else:
            words = (fault["msg"], _short(fault["input"]), "mend the value")
        where = _at(path, *fault["loc"]) if fault["loc"] else str(path)
        faults.append(BadInput(where, expected=words[0], found=words[1], remedy=words[2]))
    return faults


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "…"


def _missing_inputs(path: Path, config: CurateConfig) -> list[BadInput]:
    faults = []
    for i, run in enumerate(config.runs):
        for key in RUN_FILES:
            given: Path | None = getattr(run, key)
            if given is not None and not given.exists():
                faults.append(
                    BadInput(
                        _at(path, "runs", i, key),
                        expected="an existing file or folder",
                        found=f"nothing at {given}",
                        remedy="mend the path; relative paths start at the config's folder",
                    )
                )
    return faults
