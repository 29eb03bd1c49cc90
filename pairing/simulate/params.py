"""What a person chooses about a simulation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pairing.simulate.panel import MIN_GENES, N_GENES, Species
from shards.schema import Record

MIN_CELLS_OF_DONOR = 20
Layout = Literal["xoa-1.0", "xoa-1.3", "xoa-2.0", "xoa-3.0", "xoa-4.0"]


class BundleParams(Record):
    """How the instrument's software laid the bundle out.

    `stains`: four morphology channels instead of DAPI alone (XOA 2.0 and later). `protein`: rows
    of protein expression in the matrix (XOA 4.0). `rnd_version`: the manifest names "R&D" as its
    software. `zipped`: `outs.zip` instead of the folder `outs/`.
    """

    layout: Layout = "xoa-3.0"
    cells_zarr: bool = True
    zipped: bool = False
    stains: bool = False
    protein: bool = False
    rnd_version: bool = False

    @model_validator(mode="after")
    def _known_to_the_layout(self) -> BundleParams:
        if self.stains and self.layout in ("xoa-1.0", "xoa-1.3"):
            raise ValueError("stains: XOA has them since 2.0")
        if self.protein and self.layout != "xoa-4.0":
            raise ValueError("protein: XOA has it since 4.0")
        return self


class PanelParams(Record):
    """The genes that the run measures, of one species: `panel.chosen_genes` says which."""

    n_genes: int = Field(default=N_GENES, ge=MIN_GENES, le=10_000)
    species: Species = "human"


class SlideParams(Record):
    """How the H&E slide was cut, mounted and scanned.

    The tissue is mirrored first where `mirror` says so, turned by `rotation_deg` (drawn from the
    seed where None), stretched by the smooth field whose largest displacement along an axis is
    `warp_um`, then torn by `tear_um` (widest opening), folded over `fold_um` (width of the
    doubled strip) and robbed of a piece of `missing_um` (diameter). `other_pieces` are sections of
    other tissue on the same glass. `serial_section`: the slide shows the next section of the same
    tissue, with the same architecture and other cells.
    """

    mpp: float = Field(default=0.2738, ge=0.1, le=1.0)
    rotation_deg: float | None = Field(default=None, ge=-360, le=360)
    mirror: bool = False
    warp_um: float = Field(default=0.0, ge=0, le=100)
    tear_um: float = Field(default=0.0, ge=0, le=200)
    fold_um: float = Field(default=0.0, ge=0, le=100)
    missing_um: float = Field(default=0.0, ge=0, le=2000)
    other_pieces: int = Field(default=0, ge=0, le=8)
    serial_section: bool = False
    compression: Literal["donor", "jpeg", "jpeg2000"] = "donor"


class SimulationParams(Record):
    """One Xenium run of one or several donors, and the slide of the same section.

    `seed` draws the section and, unless `donor_seed` names another, the donor: two sections of one
    donor share `donor_seed`. With `n_donors` above 1 the run is a tissue microarray of as many
    cores, one a donor.
    """

    n_cells: int = Field(ge=MIN_CELLS_OF_DONOR)
    seed: int = Field(default=0, ge=0)
    donor_seed: int | None = Field(default=None, ge=0)
    n_donors: int = Field(default=1, ge=1, le=64)
    panel: PanelParams = PanelParams()
    bundle: BundleParams = BundleParams()
    slide: SlideParams = SlideParams()

    @model_validator(mode="after")
    def _cells_for_every_donor(self) -> SimulationParams:
        if self.n_cells < MIN_CELLS_OF_DONOR * self.n_donors:
            raise ValueError(f"n_cells: at least {MIN_CELLS_OF_DONOR} for each donor")
        return self
