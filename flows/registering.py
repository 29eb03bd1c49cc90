"""The registration of one run as a block: many runs are registered at once, each by a worker."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from pairing.annotations import donors_of_cells
from pairing.registration.record import write_registration
from pairing.registration.stage import register_run
from pairing.slide import open_slide
from pairing.xenium import open_xenium


@dataclass(frozen=True, slots=True)
class Registering:
    """A run to be registered into the folder `out`, without the cells of `withdrawn` donors."""

    out: Path
    xenium: Path
    slide: Path
    mpp: float | None
    alignment: Path | Literal["auto"]
    refine: bool
    donors: Path | None
    withdrawn: tuple[str, ...]


def write_registration_of(what: Registering) -> dict[str, Any]:
    """Write the registration of a run; returns the figures of the stage."""
    with open_xenium(what.xenium) as xenium:
        registered = register_run(
            xenium,
            partial(open_slide, what.slide, mpp=what.mpp),
            what.alignment,
            refine=what.refine,
        )
    table, registration = registered.cells, registered.registration
    if what.withdrawn:
        table = _staying(table, what)
    write_registration(what.out, registration, registered.he_px_from_xenium_um, table)
    return {
        "verdict": registration.verdict,
        "reasons": list(registration.reasons),
        "method": registration.method,
        "refined": registration.refined,
    }


def _staying(table: pd.DataFrame, what: Registering) -> pd.DataFrame:
    """The cells of whom no withdrawn donor is told; none where no cell has a place."""
    assert what.donors is not None
    centres_px = table[["x_px", "y_px"]].to_numpy()
    if np.isnan(centres_px).any():
        return table[:0]
    donor, _ = donors_of_cells(what.donors, table["cell_id"].tolist(), centres_px)
    return table[~pd.Series(donor).isin(what.withdrawn).to_numpy(dtype=bool)]
