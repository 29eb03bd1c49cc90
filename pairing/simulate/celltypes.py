"""The cell types of the simulated tissue: how each looks; what each expresses is in expression.py.

Every type has the same distributions of nucleus area, of mean haematoxylin density of the nucleus
and of mean eosin density of the cytoplasm. Types differ in shape and texture alone, so that
neither mean colour nor nucleus size gives a type away.
"""

from __future__ import annotations

from dataclasses import dataclass

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class CellType:
    """Look of one type; lengths in µm, contrasts relative to the mean density."""

    name: str
    # Shares among the cells of each compartment; each column sums to 1 over the types.
    share_nest: float
    share_stroma: float
    share_aggregate: float
    # Nucleus outline: long over short axis, bend of the long axis, waist (two lobes), roughness.
    axis_ratio: Range = (1.0, 1.2)
    bend: Range = (0.0, 0.0)
    waist: float = 0.0
    roughness: float = 0.03
    # Chromatin: dark clumps, a nucleolus, spokes of a clock face.
    n_clumps: tuple[int, int] = (10, 16)
    clump_sigma_um: float = 0.35
    clump_contrast: float = 0.4
    nucleolus_contrast: float = 0.0
    spoke_contrast: float = 0.0
    # Cytoplasm: granules (vesicles where the contrast is negative), one vacuole, cell border.
    n_granules: tuple[int, int] = (0, 0)
    granule_sigma_um: float = 0.4
    granule_contrast: float = 0.0
    vacuole_radius_um: float = 0.0
    border_contrast: float = 0.0


CELL_TYPES: tuple[CellType, ...] = (
    CellType(
        "epithelial",
        0.34, 0.06, 0.05,
        axis_ratio=(1.1, 1.35),
        n_clumps=(3, 5),
        clump_sigma_um=0.4,
        clump_contrast=0.3,
        nucleolus_contrast=3.2,
        border_contrast=1.2,
    ),
    CellType(
        "secretory",
        0.28, 0.06, 0.05,
        axis_ratio=(1.05, 1.3),
        clump_contrast=0.25,
        vacuole_radius_um=3.0,
        border_contrast=0.6,
    ),
    CellType(
        "lymphocyte",
        0.10, 0.14, 0.38,
        axis_ratio=(1.0, 1.12),
        n_clumps=(6, 9),
        clump_sigma_um=0.75,
        clump_contrast=2.2,
    ),
    CellType(
        "plasma",
        0.06, 0.12, 0.30,
        axis_ratio=(1.0, 1.15),
        n_clumps=(0, 0),
        spoke_contrast=0.7,
        vacuole_radius_um=1.6,
    ),
    CellType(
        "fibroblast",
        0.08, 0.32, 0.08,
        axis_ratio=(2.8, 4.0),
        bend=(-0.25, 0.25),
        clump_contrast=0.25,
    ),
    CellType(
        "macrophage",
        0.08, 0.16, 0.08,
        axis_ratio=(1.6, 1.9),
        bend=(0.45, 0.65),
        clump_contrast=0.3,
        n_granules=(26, 34),
        granule_sigma_um=0.65,
        granule_contrast=-0.9,
    ),
    CellType(
        "eosinophil",
        0.06, 0.14, 0.06,
        axis_ratio=(1.5, 1.8),
        waist=0.24,
        clump_contrast=0.5,
        n_granules=(34, 44),
        granule_sigma_um=0.38,
        granule_contrast=2.6,
    ),
)  # fmt: skip

N_TYPES = len(CELL_TYPES)
MAX_CLUMPS = max(t.n_clumps[1] for t in CELL_TYPES)
MAX_GRANULES = max(t.n_granules[1] for t in CELL_TYPES)
