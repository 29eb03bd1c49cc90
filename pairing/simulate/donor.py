"""What differs from donor to donor in the stain; its effect on expression is in expression.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Optical density of red, green and blue per unit of stain. Ruifrok & Johnston, Anal Quant Cytol
# Histol 2001;23:291, and the reference vectors of Macenko et al., ISBI 2009: two laboratories, and
# donors lie between them.
RUIFROK_HE = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
MACENKO_HE = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])


@dataclass(frozen=True, slots=True)
class Stain:
    """Colour and optics of one donor's slide.

    `vectors` (2, 3): unit optical densities (RGB) of haematoxylin and eosin; `white` (3,): glass,
    0 to 255; `blur_um`: sigma of the optics; `noise`: sigma in grey levels.
    """

    vectors: npt.NDArray[np.float64]
    haematoxylin: float
    eosin: float
    white: npt.NDArray[np.float64]
    blur_um: float
    noise: float


def draw_stain(rng: np.random.Generator, spread: float = 1.0) -> Stain:
    """A donor's stain; `spread` 1 is the variation between donors, 0 the mean donor."""
    mix = 0.6 + 0.25 * spread * rng.uniform(-1, 1)
    vectors = (1 - mix) * RUIFROK_HE + mix * MACENKO_HE
    vectors = np.clip(vectors + 0.025 * spread * rng.standard_normal((2, 3)), 0.02, None)
    return Stain(
        vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        haematoxylin=float(np.exp(0.13 * spread * rng.standard_normal())),
        eosin=float(np.exp(0.15 * spread * rng.standard_normal())),
        white=np.clip(243 + 4 * spread * rng.standard_normal(3), 228, 254),
        blur_um=float(0.28 * np.exp(0.15 * spread * rng.standard_normal())),
        noise=1.6,
    )
