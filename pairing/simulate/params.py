"""What a person chooses about a simulation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shards.schema import Record

Layout = Literal["xoa-1.0", "xoa-1.3", "xoa-2.0", "xoa-3.0", "xoa-4.0"]


class SimulationParams(Record):
    """One section of one donor, and how its slide was scanned.

    `seed` draws the section and, unless `donor_seed` names another, the donor: two sections of one
    donor share `donor_seed`. The H&E is turned by `rotation_deg` (drawn from the seed where None)
    and mirrored first where `mirror` says so.
    """

    n_cells: int = Field(ge=20)
    seed: int = Field(default=0, ge=0)
    donor_seed: int | None = Field(default=None, ge=0)
    layout: Layout = "xoa-3.0"
    he_mpp: float = Field(default=0.2738, ge=0.1, le=1.0)
    rotation_deg: float | None = Field(default=None, ge=-360, le=360)
    mirror: bool = False
