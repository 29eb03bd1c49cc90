"""What differs from donor to donor in stain and scan; its effect on expression is in biology.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

# Optical density of red, green and blue per unit of stain. Ruifrok & Johnston, Anal Quant Cytol
# Histol 2001;23:291, and the reference vectors of Macenko et al., ISBI 2009: two laboratories, and
# donors lie between them.
RUIFROK_HE = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
MACENKO_HE = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])


@dataclass(frozen=True, slots=True)
class Stain:
    """Colour, section and optics of one slide.

    `vectors` (2, 3): unit optical densities (RGB) of haematoxylin and eosin; `thickness` relative
    to the usual section; `white` (3,): glass, 0 to 255; `scanner` (3, 3): mixes the channels of
    the light; `blur_um`: sigma of the optics in focus, `defocus_um`: more of it for nuclei out of
    focus; `noise`: sigma in grey levels; the codec of the tiles and its quality.
    """

    vectors: npt.NDArray[np.float64]
    haematoxylin: float
    eosin: float
    thickness: float
    white: npt.NDArray[np.float64]
    scanner: npt.NDArray[np.float64]
    blur_um: float
    defocus_um: float
    noise: float
    codec: Literal["jpeg", "jpeg2000"]
    quality: int


def draw_stain(rng: np.random.Generator, spread: float = 1.0) -> Stain:
    """A donor's stain; `spread` 1 is the variation between donors, 0 the mean donor."""
    mix = 0.7 + 0.25 * spread * rng.uniform(-1, 1)
    vectors = (1 - mix) * RUIFROK_HE + mix * MACENKO_HE
    vectors = np.clip(vectors + 0.025 * spread * rng.standard_normal((2, 3)), 0.02, None)
    cross = 0.03 * spread * rng.uniform(0, 1, (3, 3)) * (1 - np.eye(3))
    return Stain(
        vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        haematoxylin=float(1.15 * np.exp(0.18 * spread * rng.standard_normal())),
        eosin=float(1.35 * np.exp(0.2 * spread * rng.standard_normal())),
        thickness=float(np.exp(0.12 * spread * rng.standard_normal())),
        white=np.clip(241 + 5 * spread * rng.standard_normal(3), 225, 254),
        scanner=np.eye(3) - np.diag(cross.sum(axis=1)) + cross,
        blur_um=float(0.30 * np.exp(0.18 * spread * rng.standard_normal())),
        defocus_um=float(0.30 * np.exp(0.3 * spread * rng.standard_normal())),
        noise=float(1.8 * np.exp(0.2 * spread * rng.standard_normal())),
        codec="jpeg2000" if rng.random() < 0.3 else "jpeg",
        quality=int(rng.integers(75, 93)),
    )
