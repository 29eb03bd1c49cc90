"""What training does to samples on the device.

What it does to each sample is drawn on the CPU for the whole global batch, from the seed and the
step alone, so that it is the same with any number of ranks and chunks. Single transcripts and
genes are too many for that: they are drawn on the device, the same again for the same ranks and
chunks on the same kind of device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch.nn import functional

from trainer.config import DataLoadingConfig

# The eight ways in which a square lies on itself: quarter turns, then the same mirrored.
_TURNS = torch.tensor([[[1, 0], [0, 1]], [[0, -1], [1, 0]], [[-1, 0], [0, -1]], [[0, 1], [-1, 0]]])
_LAYINGS_822 = torch.cat([_TURNS, _TURNS @ torch.tensor([[-1, 0], [0, 1]])]).float()


def step_generator(
    seed: int, step: int, part: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The randomness of one step: no state to save, and a resumed run draws the same.

    `part` numbers the ranks and chunks that draw for themselves.
    """
    (mixed,) = np.random.SeedSequence([seed, step, part]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(mixed))


@dataclass(frozen=True, slots=True)
class Draws:
    """What happens to each sample of a batch; tensors on the CPU, small."""

    config: DataLoadingConfig
    laying_B: torch.Tensor  # int64, one of eight
    angle_B: torch.Tensor  # radians
    log_zoom_B: torch.Tensor
    shift_um_B2: torch.Tensor
    blur_px_B: torch.Tensor  # sigma, in pixels of the network's input
    stain_B33: torch.Tensor  # optical density to optical density
    stain_offset_B3: torch.Tensor
    keep_B: torch.Tensor  # share of the transcripts

    def rows(self, start: int, stop: int, n_rows: int | None = None) -> Draws:
        """Those of samples start … stop - 1, then up to `n_rows` of the first for padding."""
        wanted = torch.zeros(stop - start if n_rows is None else n_rows, dtype=torch.int64)
        wanted[: stop - start] = torch.arange(start, stop)
        drawn = {f.name: getattr(self, f.name)[wanted] for f in fields(self) if f.name != "config"}
        return Draws(self.config, **drawn)

    def views(self, *, patch_um: float, fov_um: float) -> torch.Tensor:
        """(B, 2, 3) affines as `plain_views`, each laid, turned, shifted and zoomed as drawn."""
        cos_B, sin_B = self.angle_B.cos(), self.angle_B.sin()
        turn_B22 = torch.stack([cos_B, -sin_B, sin_B, cos_B], dim=1).view(-1, 2, 2)
        scale_B = self.log_zoom_B.exp() * (fov_um / patch_um)
        linear_B22 = _LAYINGS_822[self.laying_B] @ turn_B22 * scale_B[:, None, None]
        return torch.cat([linear_B22, self.shift_um_B2[:, :, None] / (patch_um / 2)], dim=2)

    def reach(self, *, patch_um: float, fov_um: float) -> float:
        """How far from the centre any view may look, as a share of the patch's half edge."""
        angle = math.radians(self.config.rotate_deg)
        field = self.config.zoom * fov_um * (math.cos(angle) + math.sin(angle))
        return (field + 2 * self.config.shift_um) / patch_um


def draws(n: int, config: DataLoadingConfig, seed: int, step: int) -> Draws:
    """What happens to each of the `n` samples of a global batch at this step."""
    generator = step_generator(seed, step)

    def uniform(*shape: int, low: float = -1.0) -> torch.Tensor:
        return low + (1 - low) * torch.rand(n, *shape, generator=generator)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(n, *shape, generator=generator)

    # In this order whatever is switched off, so that one setting doesn't change another's draws.
    laying_B = torch.randint(8, (n,), generator=generator)
    angle_B = uniform() * math.radians(config.rotate_deg)
    log_zoom_B = uniform() * math.log(config.zoom)
    shift_um_B2 = uniform(2) * config.shift_um
    blur_px_B = uniform(low=0.0) * config.blur_px
    gain_B3 = torch.exp(config.stain_gain * normal(3))
    mix_B33 = config.stain_mix * normal(3, 3)
    return Draws(
        config=config,
        laying_B=laying_B if config.turns else torch.zeros_like(laying_B),
        angle_B=angle_B,
        log_zoom_B=log_zoom_B,
        shift_um_B2=shift_um_B2,
        blur_px_B=blur_px_B,
        stain_B33=torch.where(torch.eye(3, dtype=torch.bool), gain_B3[:, :, None], mix_B33),
        stain_offset_B3=config.stain_offset * normal(3),
        keep_B=uniform(low=config.keep_counts),
    )


def augmented(
    image_BHWC: torch.Tensor,
    drawn: Draws,
    *,
    patch_um: float,
    fov_um: float,
    size_px: int,
    restain: bool,
) -> torch.Tensor:
    """(B, 3, size_px, size_px) in 0 … 1: what each view shows, restained, then out of focus.

    `image_BHWC` is uint8, `patch_um` its edge, `fov_um` the edge of the field without zoom;
    `restain` where it is H&E.
    """
    config = drawn.config
    seen_BCHW = views(
        image_BHWC,
        drawn.views(patch_um=patch_um, fov_um=fov_um),
        size_px,
        reach=drawn.reach(patch_um=patch_um, fov_um=fov_um),
        scale=fov_um / patch_um,
    )
    if restain and (config.stain_gain or config.stain_mix or config.stain_offset):
        seen_BCHW = restained(seen_BCHW, drawn.stain_B33, drawn.stain_offset_B3)
    if config.blur_px:
        seen_BCHW = blurred(seen_BCHW, drawn.blur_px_B, config.blur_px)
    return seen_BCHW


def plain_views(n: int, *, patch_um: float, fov_um: float) -> torch.Tensor:
    """(B, 2, 3) affines that show the central `fov_um` of each patch, as `views` takes them."""
    view_B23 = torch.zeros(n, 2, 3)
    view_B23[:, 0, 0] = view_B23[:, 1, 1] = fov_um / patch_um
    return view_B23


def views(
    image_BHWC: torch.Tensor,
    view_B23: torch.Tensor,
    size_px: int,
    *,
    reach: float | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Resampled patches, (B, 3, size_px, size_px) in 0 … 1.

    `view_B23` maps the output to the patch, both in -1 … 1 from edge to edge. What lies beyond
    the patch is its mirror image. `reach` is the largest coordinate that any view reads, `scale`
    the middle one of their scales; without them both are taken from these views, which is only
    the same for every chunk of a batch where all views are alike.
    """
    if reach is None:
        reach = (view_B23[:, :, :2].abs().sum(dim=2) + view_B23[:, :, 2].abs()).max().item()
    if scale is None:
        scale = torch.linalg.det(view_B23[:, :, :2]).abs().sqrt().mean().item()
    # Only the middle that any view reaches is turned into floats.
    width = image_BHWC.shape[1]
    margin = max(0, math.floor(width * (1 - reach) / 2) - 2)
    image_BHWC = image_BHWC[:, margin : width - margin, margin : width - margin]
    view_B23 = view_B23 * (width / (width - 2 * margin))
    image_BCHW = image_BHWC.permute(0, 3, 1, 2).to(torch.float32) / 255
    # Bilinear sampling reads four neighbours: shrink by whole factors first, or it aliases.
    if (factor := int(width * scale / size_px)) > 1:
        # Adaptive, so that a width that the factor does not divide still spans edge to edge.
        image_BCHW = functional.adaptive_avg_pool2d(image_BCHW, image_BCHW.shape[-1] // factor)
    grid = functional.affine_grid(
        view_B23.to(image_BCHW.device), [len(image_BCHW), 3, size_px, size_px], align_corners=False
    )
    return functional.grid_sample(
        image_BCHW, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )


def restained(
    image_BCHW: torch.Tensor, stain_B33: torch.Tensor, offset_B3: torch.Tensor
) -> torch.Tensor:
    """H&E in 0 … 1 as another staining might show it.

    In optical density (Beer-Lambert) each channel gets a gain (the diagonal of `stain_B33`), a
    leak from the others (the rest of it) and an offset.
    """
    stain_B33, offset_B3 = stain_B33.to(image_BCHW.device), offset_B3.to(image_BCHW.device)
    density_BCHW = -torch.log((image_BCHW * 255 + 1) / 256)
    density_BCHW = torch.einsum("bij,bjhw->bihw", stain_B33, density_BCHW)
    density_BCHW = density_BCHW + offset_B3[:, :, None, None]
    return torch.exp(-density_BCHW.clamp_min(0))


def blurred(image_BCHW: torch.Tensor, sigma_B: torch.Tensor, sigma_max: float) -> torch.Tensor:
    """Each image through a Gaussian of its own sigma in pixels; its border pixels go on beyond it.

    `sigma_max` sets the width of the kernel, which is cut at three of them.
    """
    n, channels, height, width = image_BCHW.shape
    radius = math.ceil(3 * sigma_max)
    offset_T = torch.arange(-radius, radius + 1, device=image_BCHW.device)
    # A sigma of 0 is one so small that all weight stays on the middle.
    sigma_B1 = sigma_B.to(image_BCHW.device).clamp_min(1e-3)[:, None]
    kernel_BT = (-(offset_T / sigma_B1).square() / 2).softmax(dim=1)
    # One group a channel of an image, since each image has its own kernel.
    kernel_MT = kernel_BT.repeat_interleave(channels, dim=0)
    x = image_BCHW.reshape(1, n * channels, height, width)
    x = functional.pad(x, (radius,) * 4, mode="replicate")
    x = functional.conv2d(x, kernel_MT[:, None, :, None], groups=n * channels)
    x = functional.conv2d(x, kernel_MT[:, None, None, :], groups=n * channels)
    return x.view(n, channels, height, width)


def thinned(
    count_N: torch.Tensor, row_N: torch.Tensor, keep_B: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Counts after each row has lost a share 1 - `keep_B` of its transcripts at random.

    A binomial draw from a count is what a shallower run of the same cell would have counted.
    `generator` is of the device of the counts.
    """
    return torch.binomial(count_N, keep_B.to(count_N.device)[row_N], generator=generator)


def masked_genes(
    measured_BG: torch.Tensor, share: float, generator: torch.Generator
) -> torch.Tensor:
    """(B, G) bool: each measured gene with the probability `share`, to be predicted."""
    drawn_BG = torch.rand(measured_BG.shape, generator=generator, device=measured_BG.device)
    return (drawn_BG < share) & (measured_BG > 0)
