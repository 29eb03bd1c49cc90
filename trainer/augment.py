"""What training does to samples on the device, drawn from the seed and the step alone."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch.nn import functional

from trainer.batch import Batch
from trainer.config import DataLoadingConfig

# The eight ways in which a square lies on itself: quarter turns, then the same mirrored.
_TURNS = torch.tensor([[[1, 0], [0, 1]], [[0, -1], [1, 0]], [[-1, 0], [0, -1]], [[0, 1], [-1, 0]]])
_LAYINGS_822 = torch.cat([_TURNS, _TURNS @ torch.tensor([[-1, 0], [0, 1]])]).float()


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step: no state to save, and a resumed run draws the same."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def plain_views(n: int, *, patch_um: float, fov_um: float) -> torch.Tensor:
    """(B, 2, 3) affines that show the central `fov_um` of each patch, as `views` takes them."""
    view_B23 = torch.zeros(n, 2, 3)
    view_B23[:, 0, 0] = view_B23[:, 1, 1] = fov_um / patch_um
    return view_B23


def drawn_views(
    n: int, config: DataLoadingConfig, generator: torch.Generator, *, patch_um: float, fov_um: float
) -> torch.Tensor:
    """As `plain_views`, each turned or mirrored, shifted and zoomed at random."""
    laying_B22 = _LAYINGS_822[torch.randint(8, (n,), generator=generator)]
    log_zoom_B = (2 * torch.rand(n, generator=generator) - 1) * math.log(config.zoom)
    shift_B2 = (2 * torch.rand(n, 2, generator=generator) - 1) * config.shift_um / (patch_um / 2)
    linear_B22 = laying_B22 * torch.exp(log_zoom_B)[:, None, None] * (fov_um / patch_um)
    return torch.cat([linear_B22, shift_B2[:, :, None]], dim=2)


def views(image_BHWC: torch.Tensor, view_B23: torch.Tensor, size_px: int) -> torch.Tensor:
    """Resampled patches, (B, 3, size_px, size_px) in 0 … 1.

    `view_B23` maps the output to the patch, both in -1 … 1 from edge to edge. What lies beyond
    the patch is its mirror image.
    """
    # Only the middle that any view reaches is turned into floats.
    reach = (view_B23[:, :, :2].abs().sum(dim=2) + view_B23[:, :, 2].abs()).max().item()
    width = image_BHWC.shape[1]
    margin = max(0, math.floor(width * (1 - reach) / 2) - 2)
    image_BHWC = image_BHWC[:, margin : width - margin, margin : width - margin]
    view_B23 = view_B23 * (width / (width - 2 * margin))
    image_BCHW = image_BHWC.permute(0, 3, 1, 2).to(torch.float32) / 255
    # Bilinear sampling reads four neighbours: shrink by whole factors first, or it aliases.
    zoom = torch.linalg.det(view_B23[:, :, :2]).abs().sqrt().mean().item()
    if (factor := int(image_BCHW.shape[-1] * zoom / size_px)) > 1:
        # Adaptive, so that a width that the factor does not divide still spans edge to edge.
        image_BCHW = functional.adaptive_avg_pool2d(image_BCHW, image_BCHW.shape[-1] // factor)
    grid = functional.affine_grid(
        view_B23.to(image_BCHW.device), [len(image_BCHW), 3, size_px, size_px], align_corners=False
    )
    return functional.grid_sample(
        image_BCHW, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )


def restained(
    image_BCHW: torch.Tensor, config: DataLoadingConfig, generator: torch.Generator
) -> torch.Tensor:
    """H&E in 0 … 1 as another staining might show it.

    In optical density (Beer-Lambert) each channel gets a gain, a leak from the others and an
    offset, drawn for each image.
    """
    n = len(image_BCHW)
    mix_B33 = config.stain_mix * torch.randn(n, 3, 3, generator=generator)
    gain_B3 = torch.exp(config.stain_gain * torch.randn(n, 3, generator=generator))
    offset_B3 = config.stain_offset * torch.randn(n, 3, generator=generator)
    diagonal = torch.eye(3, dtype=torch.bool)
    mix_B33 = torch.where(diagonal, gain_B3[:, :, None], mix_B33).to(image_BCHW.device)
    density_BCHW = -torch.log((image_BCHW * 255 + 1) / 256)
    density_BCHW = torch.einsum("bij,bjhw->bihw", mix_B33, density_BCHW)
    density_BCHW = density_BCHW + offset_B3[:, :, None, None].to(image_BCHW.device)
    return torch.exp(-density_BCHW.clamp_min(0))


def thinned(batch: Batch, keep_min: float, generator: torch.Generator) -> Batch:
    """The batch after each cell has lost a random share of its transcripts, 1 - keep_min at most.

    A binomial draw from a count is what a shallower run of the same cell would have counted.
    """
    keep_B = keep_min + (1 - keep_min) * torch.rand(len(batch.weight_B), generator=generator)
    count_N = torch.binomial(batch.count_N, keep_B[batch.row_N], generator=generator)
    return replace(batch, count_N=count_N)
