"""Which morphology images each layout has, under which names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import cv2
import numpy as np
import numpy.typing as npt

from pairing.simulate.bundle.layouts import TRAITS
from pairing.simulate.params import Layout
from pairing.simulate.pictures import ChannelFile, write_morphology
from pairing.simulate.section import PIXEL_UM, Plane, Section

# Channels of the segmentation kit, in their order.
STAINS = ("DAPI", "ATP1A1/CD45/E-Cadherin", "18S", "alphaSMA/Vimentin")
Z_STEP_UM = 3.0
_Z_BLURS_PX = (3.0, 0.0, 5.0)  # of the planes of the stack, the middle one in focus


@dataclass(frozen=True, slots=True)
class _Blurred:
    """A plane out of focus, read by rows."""

    source: Plane
    sigma_px: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> Any:
        return self.source.dtype

    def __getitem__(self, rows: slice) -> npt.NDArray[np.uint16]:
        start, stop, _ = rows.indices(self.shape[0])
        halo = int(4 * self.sigma_px)
        first = max(0, start - halo)
        band = np.asarray(self.source[first : stop + halo])
        if self.sigma_px > 0:
            size = 2 * halo + 1
            band = cv2.GaussianBlur(band, (size, size), self.sigma_px)
        return band[start - first : stop - first]


@dataclass(frozen=True, slots=True)
class _Brightest:
    """The maximum over planes, read by rows."""

    planes: tuple[Plane, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.planes[0].shape

    @property
    def dtype(self) -> Any:
        return self.planes[0].dtype

    def __getitem__(self, rows: slice) -> npt.NDArray[np.uint16]:
        brightest: npt.NDArray[np.uint16] = np.max([p[rows] for p in self.planes], axis=0)
        return brightest


def channel_files(section: Section, layout: Layout, stains: bool) -> list[ChannelFile]:
    """The files of `morphology_focus/`, DAPI first; none where the layout has no such folder.

    Raises ValueError where `stains` are wanted that the section does not have.
    """
    style = TRAITS[layout].morphology
    if style == "single":
        return []
    wanted = STAINS if stains else STAINS[:1]
    if missing := set(wanted) - set(section.channels):
        raise ValueError(f"the section has no channel {', '.join(sorted(missing))}")
    files = []
    for i, stain in enumerate(wanted):
        name = (
            f"ch{i:04d}_{stain.lower().replace('/', '_')}.ome.tif"
            if style == "named"
            else f"morphology_focus_{i:04d}.ome.tif"
        )
        digest = hashlib.sha256(f"{section.name}/{name}".encode()).digest()
        files.append(ChannelFile(stain, name, f"urn:uuid:{UUID(bytes=digest[:16], version=4)}"))
    return files


def write_morphology_images(folder: Path, section: Section, files: list[ChannelFile]) -> None:
    """Images of `files` into `morphology_focus/`; without files those of XOA 1.x.

    XOA 1.x: the z-stack, its maximum and the plane in focus, all of DAPI.
    """
    if files:
        (folder / "morphology_focus").mkdir()
        for file in files:
            plane = section.channels[file.channel]
            path = folder / "morphology_focus" / file.name
            write_morphology(path, [plane], PIXEL_UM, files=files)
        return
    dapi = section.channels["DAPI"]
    stack = tuple(_Blurred(dapi, sigma_px) for sigma_px in _Z_BLURS_PX)
    write_morphology(folder / "morphology_focus.ome.tif", [dapi], PIXEL_UM)
    write_morphology(folder / "morphology_mip.ome.tif", [_Brightest(stack)], PIXEL_UM)
    write_morphology(folder / "morphology.ome.tif", stack, PIXEL_UM, z_step_um=Z_STEP_UM)
