"""The cell types of the simulated tissue: how each looks; what each expresses is in biology.py.

Types differ in size, darkness, shape, chromatin and cytoplasm, with distributions that overlap so
far that none of these alone tells a type.
"""

from __future__ import annotations

from dataclasses import dataclass

Range = tuple[float, float]

# Grains of chromatin, coarse to fine: standard deviation in µm of the smoothing of the noise.
GRAIN_UM = (0.22, 0.38, 0.62)
# The same of what lies in the cytoplasm.
GRANULE_UM = (0.25, 0.45)


@dataclass(frozen=True, slots=True)
class CellType:
    """Look of one type; lengths in µm, contrasts relative to the mean density."""

    name: str
    # Shares among the cells of each compartment; each column sums to 1 over the types.
    share_epithelium: float
    share_stroma: float
    share_aggregate: float
    share_vessel: float
    # Nucleus: mean area in the section, mean haematoxylin density.
    area_um2: float
    density: float
    # Outline: long over short axis, bend of the long axis, waist (two lobes), roughness.
    axis_ratio: Range = (1.0, 1.25)
    bend: Range = (0.0, 0.0)
    waist: float = 0.0
    roughness: float = 0.04
    # Chromatin: grain (index of GRAIN_UM) and its contrast, nucleoli, spokes of a clock face.
    grain: int = 0
    grain_contrast: float = 0.3
    n_nucleoli: tuple[int, int] = (0, 0)
    nucleolus_contrast: float = 0.0
    spoke_contrast: float = 0.0
    # Cytoplasm: both stains in it, granules (vesicles where negative), one vacuole, border.
    eosin: float = 0.28
    basophilia: float = 0.06
    granule: int = 0
    granule_contrast: float = 0.0
    vacuole_radius_um: float = 0.0
    border_contrast: float = 0.0


CELL_TYPES: tuple[CellType, ...] = (
    CellType(
        "epithelial", 0.50, 0.03, 0.02, 0.0, 58, 0.52,
        axis_ratio=(1.15, 1.6), grain=1, grain_contrast=0.34,
        n_nucleoli=(1, 2), nucleolus_contrast=3.0, basophilia=0.15, border_contrast=0.45,
    ),
    CellType(
        "secretory", 0.24, 0.01, 0.01, 0.0, 42, 0.66,
        axis_ratio=(1.1, 1.5), grain=0, grain_contrast=0.41,
        eosin=0.16, basophilia=0.10, vacuole_radius_um=3.2, border_contrast=0.3,
    ),
    CellType(
        "lymphocyte", 0.11, 0.15, 0.56, 0.05, 23, 0.86,
        axis_ratio=(1.0, 1.15), roughness=0.03, grain=2, grain_contrast=1.01,
        eosin=0.22, basophilia=0.10,
    ),
    CellType(
        "plasma", 0.05, 0.11, 0.20, 0.02, 33, 0.72,
        axis_ratio=(1.0, 1.2), grain=1, grain_contrast=0.2, spoke_contrast=0.5,
        eosin=0.24, basophilia=0.34, vacuole_radius_um=1.5,
    ),
    CellType(
        "fibroblast", 0.02, 0.35, 0.06, 0.10, 36, 0.6,
        axis_ratio=(2.6, 4.6), bend=(-0.25, 0.25), grain=0, grain_contrast=0.41,
        eosin=0.27,
    ),
    CellType(
        "endothelial", 0.0, 0.08, 0.05, 0.52, 25, 0.74,
        axis_ratio=(2.2, 3.6), bend=(0.2, 0.55), grain=0, grain_contrast=0.2,
        eosin=0.30,
    ),
    CellType(
        "smooth_muscle", 0.0, 0.14, 0.0, 0.28, 46, 0.5,
        axis_ratio=(3.2, 5.5), bend=(-0.1, 0.1), roughness=0.06, grain=1, grain_contrast=0.61,
        eosin=0.42,
    ),
    CellType(
        "macrophage", 0.06, 0.09, 0.08, 0.02, 54, 0.46,
        axis_ratio=(1.5, 2.0), bend=(0.4, 0.65), grain=0, grain_contrast=0.47,
        n_nucleoli=(0, 1), nucleolus_contrast=1.2,
        eosin=0.20, granule=1, granule_contrast=-0.6,
    ),
    CellType(
        "eosinophil", 0.02, 0.04, 0.02, 0.01, 28, 0.8,
        axis_ratio=(1.5, 1.9), waist=0.24, grain=2, grain_contrast=0.61,
        eosin=0.46, granule=0, granule_contrast=0.6,
    ),
)  # fmt: skip

N_TYPES = len(CELL_TYPES)
INTERPHASE, MITOTIC, PYKNOTIC = 0, 1, 2
