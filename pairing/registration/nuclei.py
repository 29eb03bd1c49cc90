"""Nuclei of a slide: where they are, how sure each is one, and which is near."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from pairing.geometry import Points


@dataclass(frozen=True, slots=True)
class HeNuclei:
    """n nuclei at µm on the slide; what each counts for, above 0 and at most 1."""

    um: Points
    weight: npt.NDArray[np.float64]
    tree: cKDTree = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tree", cKDTree(self.um))
