"""What an alignment must withstand before pairs are cut by it, whatever its nuclei say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from pairing.geometry import Affine, Points
from pairing.registration.siblings import sibling_of_mpp
from pairing.slide import Slide

# Side of a bin of the density maps: some cells wide, so that stain and density compare.
GRID_UM = 16.0
# A disagreement of the implied pixel size with the slide's (architecture.md, rules of the field).
MPP_DOUBTFUL, MPP_FAIL = 0.02, 0.05
# The share of the cells that must lie on the slide.
SHARE_DOUBTFUL, SHARE_FAIL = 0.9, 0.5
# Lead of the given transform over the best wrong variant. On real pairs the right transform
# led by 0.2-0.7; equal correlations (tissue to all borders) say nothing, hence doubtful.
LEAD_DOUBTFUL, LEAD_FAIL = 0.05, -0.05
# Below this number of cells a density map is noise.
MIN_CELLS = 200


@dataclass(frozen=True, slots=True)
class Finding:
    """What a gate holds against an alignment."""

    verdict: Literal["doubtful", "fail"]
    words: str


def implied_mpp_of(he_px_from_xenium_um: Affine) -> float:
    """µm of Xenium per level-0 pixel of the slide."""
    return float(1 / np.sqrt(he_px_from_xenium_um.area_scale))


def mpp_findings(
    slide_path: Path, slide_mpp: float, implied_mpp: float, *, automatic: bool
) -> Iterator[Finding]:
    """The pixel size that an alignment implies against the stated one."""
    off = implied_mpp / slide_mpp - 1
    if abs(off) <= MPP_DOUBTFUL:
        return
    remedy = "" if automatic else "if the alignment is right, "
    remedy += f"set mpp = {implied_mpp:.4f}"
    sibling = None if automatic else sibling_of_mpp(slide_path, implied_mpp, MPP_DOUBTFUL)
    if sibling is not None:
        name, mpp = sibling
        remedy = f"{name} beside it says {mpp:.4f}: the alignment is of that file, give it as slide"
    yield Finding(
        "fail" if abs(off) > MPP_FAIL else "doubtful",
        f"the alignment implies {implied_mpp:.4f} µm per pixel, {slide_mpp:.4f} is stated "
        f"({off:+.1%}); {remedy}",
    )


def on_slide(points_px: Points, size_px: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """(n,) which level-0 positions lie on a slide of this width and height."""
    return np.asarray(((points_px >= 0) & (points_px < size_px)).all(axis=1))


def share_findings(share: float) -> Iterator[Finding]:
    """The share of the cells that lie on the slide."""
    if share < SHARE_DOUBTFUL:
        yield Finding(
            "fail" if share < SHARE_FAIL else "doubtful",
            f"{share:.1%} of the cells lie on the slide",
        )


def density_findings(correlation: dict[str, float]) -> Iterator[Finding]:
    """The given transform against the wrong variants; nothing where nothing was correlated."""
    if not correlation:
        return
    others = {name: c for name, c in correlation.items() if name != "given"}
    best = max(others, key=lambda name: others[name])
    lead = correlation["given"] - others[best]
    if lead < LEAD_DOUBTFUL:
        yield Finding(
            "fail" if lead < LEAD_FAIL else "doubtful",
            f"cell density fits the stained tissue with r = {correlation['given']:.2f}, "
            f"the {best.replace('_', ' ')} variant with r = {others[best]:.2f}"
            + ("; it may be given the wrong way round" if best == "inverse" else ""),
        )


def density_correlations(
    slide: Slide, cells_um: Points, he_px_from_xenium_um: Affine, pixel_size_um: float
) -> dict[str, float]:
    """Correlation of the stain with the density of the cells, for a transform and its variants.

    `cells_um` are (n, 2) cell positions in the Xenium frame; `pixel_size_um` is the morphology's,
    which the inverse variant needs (the matrix read the wrong way round maps pixels to pixels).
    Empty with fewer cells than MIN_CELLS.
    """
    if len(cells_um) < MIN_CELLS:
        return {}
    tissue = _stain_map(slide.tolerant()[0])
    variants = _variants(cells_um, he_px_from_xenium_um, pixel_size_um, slide)
    return {name: _correlation(tissue, points, slide) for name, points in variants.items()}


def _stain_map(slide: Slide) -> npt.NDArray[np.float64]:
    """Mean optical density of the slide, one value a bin of GRID_UM."""
    nx, ny = _grid_shape(slide)
    rgb = slide.read_at((0, 0, nx, ny), GRID_UM).astype(np.float64)
    density = -np.log10((rgb + 1) / 256).mean(axis=2)
    smoothed: npt.NDArray[np.float64] = gaussian_filter(density, 1.0)
    return smoothed


def _grid_shape(slide: Slide) -> tuple[int, int]:
    width, height = slide.size_px
    return int(np.ceil(width * slide.mpp / GRID_UM)), int(np.ceil(height * slide.mpp / GRID_UM))


def _variants(
    cells_um: Points, he_px_from_xenium_um: Affine, pixel_size_um: float, slide: Slide
) -> dict[str, Points]:
    """Cell positions on the slide under the given transform and under the usual mistakes."""
    width, height = slide.size_px
    px = he_px_from_xenium_um(cells_um)
    centre = np.array([width, height]) / 2
    offset = px - centre
    morphology_px_from_um = Affine.scale(1 / pixel_size_um)
    he_px_from_morphology_px = he_px_from_xenium_um @ morphology_px_from_um.inverse
    return {
        "given": px,
        "inverse": he_px_from_morphology_px.inverse(morphology_px_from_um(cells_um)),
        "mirrored_x": centre + offset * (-1, 1),
        "mirrored_y": centre + offset * (1, -1),
        "turned_90": centre + offset[:, ::-1] * (-1, 1),
        "turned_180": centre - offset,
        "turned_270": centre + offset[:, ::-1] * (1, -1),
    }


def _correlation(tissue: npt.NDArray[np.float64], cells_px: Points, slide: Slide) -> float:
    nx, ny = _grid_shape(slide)
    density, _, _ = np.histogram2d(
        cells_px[:, 1] * slide.mpp,
        cells_px[:, 0] * slide.mpp,
        bins=(np.arange(ny + 1) * GRID_UM, np.arange(nx + 1) * GRID_UM),
    )
    smoothed = gaussian_filter(density, 1.0)
    if smoothed.std() == 0 or tissue.std() == 0:
        return 0.0  # no cell falls on the slide, or nothing is stained: nothing correlates
    return float(np.corrcoef(smoothed.ravel(), tissue.ravel())[0, 1])
