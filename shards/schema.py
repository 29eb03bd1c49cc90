"""The sample, the panel, the manifest, the dataset: what is on disk, versioned and validated.

Nothing here opens a file. JSON records are pydantic models, the index table beside each tar is an
Arrow schema, and a change to either is a new version of that record with a note in CHANGELOG.md.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

SCHEMA_VERSION: Final = 1
MANIFEST_SCHEMA_VERSION: Final = 2  # 2: quality in the index tables; 1 is still read
# 2: aliases. 3: hold-outs, unions of panels, and of each run its donors, source_id and section.
# Earlier datasets lack these, and are still read.
DATASET_SCHEMA_VERSION: Final = 3

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

# Members of a sample, in the order in which they lie in the tar.
IMAGE_MEMBER = "jpg"
COUNTS_MEMBER = "counts.npy"
NEIGHBORS_MEMBER = "neighbors.npy"

RunId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]


class Record(BaseModel):
    """Base of everything that crosses a process or touches disk as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def canonical_json(value: Any) -> str:
    """JSON with one spelling a value: sorted keys, no spaces, no NaN; what hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """First 20 hex digits of the SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:20]


def sample_key(run: str, cell_id: str) -> str:
    """Key of a sample in a tar: `<run>__<cell_id>`; neither part may hold a dot or a slash."""
    return f"{run}__{cell_id}"


def donor_slug(donor: str) -> str:
    """File-name form of a donor: letters and digits of it and 8 hex digits of its hash."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", donor).strip("-")[:24] or "donor"
    return f"{slug}-{hashlib.sha256(donor.encode()).hexdigest()[:8]}"


def is_one_line(name: str) -> bool:
    """Whether a name has no line breaks or other control characters, and no spaces around it.

    Donors that differ in these alone look alike: one person under two names, in two splits.
    """
    breaks = {"Cc", "Zl", "Zp"}.intersection(map(unicodedata.category, name))
    return not breaks and name == name.strip()


class Gene(Record):
    """One measured gene; `ensembl` where the bundle gives it."""

    symbol: str
    ensembl: str | None = None


class Panel(Record):
    """The ordered genes that row 0 of `counts.npy` indexes; `panel_id` is their hash."""

    panel_id: str
    species: str
    genes: tuple[Gene, ...]

    @classmethod
    def of(cls, species: str, genes: Iterable[Gene]) -> Panel:
        genes = tuple(genes)
        panel_id = digest([species, [[g.symbol, g.ensembl] for g in genes]])
        return cls(panel_id=panel_id, species=species, genes=genes)

    @model_validator(mode="after")
    def _id_is_the_hash(self) -> Panel:
        want = digest([self.species, [[g.symbol, g.ensembl] for g in self.genes]])
        if self.panel_id != want:
            raise ValueError(f"panel_id is {self.panel_id}, but its genes hash to {want}")
        return self


class PatchSpec(Record):
    """What a patch shows: a square field of view in µm, resampled to `size_px`."""

    image: Literal["he", "morphology"]
    fov_um: float = Field(gt=0)
    size_px: int = Field(gt=0)
    center: Literal["nucleus", "cell"]
    jpeg_quality: int = Field(ge=1, le=100)

    @property
    def mpp(self) -> float:
        return self.fov_um / self.size_px


# Of `Totals.noted`: cells without a registration error, since the alignment was taken as given.
NOT_ASSESSED: Final = "registration_error_not_assessed"
# And cells whose patch has no such score, by the column of the index table that is null; and those
# that bear a flag, by its name behind this.
NOTES_OF_NULLS: Final = {
    "registration_error_um": NOT_ASSESSED,
    "sharpness": "sharpness_not_assessed",
    "pen_share": "pen_share_not_assessed",
    "dark_ratio": "dark_ratio_not_assessed",
    "glass_share": "glass_share_not_assessed",
}
NOTE_OF_FLAG: Final = "flag_"


class Totals(Record):
    """Cells seen, kept, and dropped by reason; the reasons add up, or the record is refused."""

    seen: int = Field(ge=0)
    kept: int = Field(ge=0)
    dropped: dict[str, int]
    # Told of those that were kept, but no reason to drop them: NOTES_OF_NULLS, NOTE_OF_FLAG.
    noted: dict[str, int] = {}

    @model_validator(mode="after")
    def _adds_up(self) -> Totals:
        if self.seen != self.kept + sum(self.dropped.values()):
            raise ValueError(
                f"{self.seen} cells seen, but {self.kept} kept and {self.dropped} dropped"
            )
        return self

    def __add__(self, other: Totals) -> Totals:
        def merged(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
            return {k: a.get(k, 0) + b.get(k, 0) for k in sorted(a.keys() | b.keys())}

        return Totals(
            seen=self.seen + other.seen,
            kept=self.kept + other.kept,
            dropped=merged(self.dropped, other.dropped),
            noted=merged(self.noted, other.noted),
        )


class ShardInfo(Record):
    """One tar and the index table beside it: `<name>.tar` and `<name>.parquet`."""

    name: str
    donor: str
    n_samples: int = Field(gt=0)
    tar_bytes: int = Field(gt=0)
    tar_sha256: str
    table_sha256: str


class Manifest(Record):
    """`manifest.json` of one run's shard set; its index tables have the columns of its version."""

    schema_version: Literal[1, 2] = MANIFEST_SCHEMA_VERSION
    run: RunId
    source_id: str | None
    tissue: str | None
    species: str
    panel_id: str
    patch: PatchSpec
    totals: Totals
    shards: tuple[ShardInfo, ...]

    @model_validator(mode="after")
    def _shards_hold_what_was_kept(self) -> Manifest:
        n = sum(s.n_samples for s in self.shards)
        if n != self.totals.kept:
            raise ValueError(f"shards hold {n} samples, but {self.totals.kept} cells were kept")
        return self


class Section(Record):
    """The tissue that a run is of, by content: two runs of one bundle, or one slide, are told.

    `slide` and `slide_mpp` (µm per pixel at level 0) are None where the patches are of the
    bundle's own morphology.
    """

    bundle: str
    slide: str | None = None
    slide_mpp: float | None = Field(default=None, gt=0)


class DatasetRun(Record):
    """One run's part in a dataset.

    `donors` are all whose cells lie in the run, those without a pair too; `source_id` is the public
    name of the sample.
    """

    run: RunId
    path: str  # of the shard set, relative to the dataset root
    fingerprint: str  # of the shards artifact
    manifest_sha256: str
    species: str
    tissue: str | None
    panel_id: str
    totals: Totals
    source_id: str | None = None
    donors: tuple[str, ...] = ()
    section: Section | None = None

    @property
    def unsaid(self) -> set[str]:
        """Fields that are there since version 3 of the dataset, where they say nothing."""
        return {key for key in ("source_id", "donors", "section") if not getattr(self, key)}


class Dataset(Record):
    """`datasets/<fingerprint>.json`: a composition of per-run shard sets; immutable.

    `aliases` names, for each donor that the runs write by another name, the canonical one: donors
    of one canonical name are one person, and in one split. `hold_out` are the names of
    `split.hold_out` with the source_ids that each stands for; `held_out` the canonical donors that
    are in test for it, with the source_ids because of which.
    """

    schema_version: Literal[1, 2, 3] = DATASET_SCHEMA_VERSION
    fingerprint: str
    name: str
    runs: tuple[DatasetRun, ...]
    panels: dict[str, str]  # panel_id -> path relative to the dataset root
    unions: dict[str, str] = {}  # species -> path of the union of its panels
    donors: dict[str, Split]  # as the shards write them
    aliases: dict[str, str] = {}  # donor as written -> canonical, where they differ
    hold_out: dict[str, tuple[str, ...]] = {}
    held_out: dict[str, tuple[str, ...]] = {}
    shards: dict[Split, tuple[str, ...]]  # paths without suffix, relative to the dataset root
    totals: Totals

    @classmethod
    def of(
        cls,
        name: str,
        runs: Iterable[DatasetRun],
        panels: dict[str, str],
        donors: dict[str, Split],
        shards: dict[Split, tuple[str, ...]],
        aliases: dict[str, str] | None = None,
        *,
        unions: dict[str, str] | None = None,
        hold_out: dict[str, tuple[str, ...]] | None = None,
        held_out: dict[str, tuple[str, ...]] | None = None,
    ) -> Dataset:
        runs = tuple(runs)
        totals = sum((r.totals for r in runs), Totals(seen=0, kept=0, dropped={}))
        since_2 = {
            "aliases": aliases,
            "unions": unions,
            "hold_out": hold_out,
            "held_out": held_out,
        }
        body = {
            "name": name,
            # What is not said leaves the hash as it was before it could be said.
            "runs": [r.model_dump(mode="json", exclude=r.unsaid) for r in runs],
            "donors": donors,
            "shards": shards,
            **{key: value for key, value in since_2.items() if value},
        }
        return cls(
            fingerprint=digest(body),
            name=name,
            runs=runs,
            panels=panels,
            unions=unions or {},
            donors=donors,
            aliases=aliases or {},
            hold_out=hold_out or {},
            held_out=held_out or {},
            shards=shards,
            totals=totals,
        )

    def canonical(self, donor: str) -> str:
        """The one name of a donor that may have several."""
        return self.aliases.get(donor, donor)

    @model_validator(mode="after")
    def _names_are_of_its_donors(self) -> Dataset:
        known = self.donors.keys() | {donor for run in self.runs for donor in run.donors}
        strangers = sorted(self.aliases.keys() - known)
        chained = sorted(self.aliases.keys() & set(self.aliases.values()))
        if strangers or chained or (self.aliases and self.schema_version == 1):
            raise ValueError(
                f"aliases {self.aliases} are not names of its donors, each with a canonical one"
            )
        if strange := sorted(self.held_out.keys() - set(map(self.canonical, known))):
            raise ValueError(f"held out are {strange}, which are no donors of it")
        return self

    @property
    def unsaid(self) -> dict[str, Any]:
        """What a record of an earlier version does not have, for `model_dump` to leave out."""
        if self.schema_version == DATASET_SCHEMA_VERSION:
            return {}
        since_3 = {"unions": True, "hold_out": True, "held_out": True}
        of_runs = {"source_id": True, "donors": True, "section": True}
        since_2 = {"aliases": True} if self.schema_version == 1 else {}
        return {**since_3, **since_2, "runs": {"__all__": of_runs}}


class DatasetPointer(Record):
    """`dataset.json`: names the newest dataset of a folder."""

    schema_version: Literal[1] = SCHEMA_VERSION
    fingerprint: str
    dataset: str  # path relative to the folder of this file


_QUALITY_FIELDS = (
    pa.field("sharpness", pa.float32()),
    pa.field("pen_share", pa.float32()),
    pa.field("dark_ratio", pa.float32()),
    pa.field("glass_share", pa.float32()),
)

# One row a sample, in the tar's order. Offsets are of the member's content, not of its header;
# crc32 runs over the contents of all members in tar order. A member that a sample lacks is null.
INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("jpg_offset", pa.int64(), nullable=False),
        pa.field("jpg_size", pa.int32(), nullable=False),
        pa.field("counts_offset", pa.int64()),
        pa.field("counts_size", pa.int32()),
        pa.field("neighbors_offset", pa.int64()),
        pa.field("neighbors_size", pa.int32()),
        pa.field("crc32", pa.uint32(), nullable=False),
        pa.field("run", pa.string(), nullable=False),
        pa.field("cell_id", pa.string(), nullable=False),
        pa.field("donor", pa.string(), nullable=False),
        pa.field("tissue", pa.string()),
        pa.field("species", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("panel", pa.string(), nullable=False),
        pa.field("x_um", pa.float64(), nullable=False),  # centre, Xenium frame
        pa.field("y_um", pa.float64(), nullable=False),
        pa.field("x_px", pa.float64(), nullable=False),  # centre, slide level 0
        pa.field("y_px", pa.float64(), nullable=False),
        pa.field("center", pa.string(), nullable=False),  # nucleus | cell
        pa.field("mpp", pa.float64(), nullable=False),  # of the patch
        pa.field("fov_um", pa.float64(), nullable=False),
        pa.field("n_counts", pa.int64(), nullable=False),
        pa.field(
            "nucleus",
            pa.struct(
                [
                    pa.field("id", pa.int64(), nullable=False),
                    pa.field("area_um2", pa.float64(), nullable=False),
                    pa.field("iou", pa.float64(), nullable=False),
                    pa.field("distance_um", pa.float64(), nullable=False),
                ]
            ),
        ),
        pa.field("registration_error_um", pa.float64()),
        # Of the patch, null where it can't be told; docs/quality.md says what they mean.
        *_QUALITY_FIELDS,
        pa.field(
            "neighbors",
            pa.list_(
                pa.struct(
                    [
                        pa.field("cell_id", pa.string(), nullable=False),
                        pa.field("dx_um", pa.float64(), nullable=False),
                        pa.field("dy_um", pa.float64(), nullable=False),
                    ]
                )
            ),
            nullable=False,
        ),
        pa.field("flags", pa.list_(pa.string()), nullable=False),
    ]
)

# By the schema version of the manifest beside them.
INDEX_SCHEMAS: Final = {
    1: pa.schema([field for field in INDEX_SCHEMA if field not in _QUALITY_FIELDS]),
    MANIFEST_SCHEMA_VERSION: INDEX_SCHEMA,
}
