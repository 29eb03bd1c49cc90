"""Labelled H&E tiles for training the nuclei network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pairing.geometry import Affine
from pairing.simulate.donor import draw_stain
from pairing.simulate.render import Mounted, paint_he
from pairing.simulate.slide_map import SlideMap
from pairing.simulate.tissue import draw_field


def labelled_tile(
    seed: int, size_px: int, mpp: float
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """A random H&E tile (size_px, size_px, 3) RGB and its nuclei (size_px, size_px), 0 outside.

    Stain, blur, crowding and orientation are random and wider than between the donors of
    `simulate`; the same arguments give the same bytes. Labels need not be consecutive.
    """
    rng = np.random.default_rng([seed, 7])
    stain = draw_stain(rng, spread=1.8)
    stain = replace(stain, blur_um=stain.blur_um * float(rng.uniform(0.8, 2.0)))
    span_um = size_px * mpp
    field_um = 1.5 * span_um + 80
    crowding, keep_apart = float(rng.uniform(0.7, 1.6)), float(rng.uniform(0.6, 1.0))
    tissue = draw_field(rng, field_um, crowding, keep_apart)
    turn = rng.uniform(0, 2 * np.pi)
    c, s = mpp * np.cos(turn), mpp * np.sin(turn)
    centre = field_um / 2 - np.array([[c, -s], [s, c]]) @ [size_px / 2, size_px / 2]
    um_from_px = Affine.similarity(mpp, turn, (float(centre[0]), float(centre[1])))
    lying = SlideMap.flat(um_from_px)
    mounted = Mounted.of(tissue, lying)
    return paint_he([mounted], stain, (0, 0, size_px, size_px), (seed, 17))
