"""What training does to patches and counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.augment import (
    augmented,
    blurred,
    draws,
    masked_genes,
    plain_views,
    restained,
    step_generator,
    thinned,
    views,
)
from trainer.config import DataLoadingConfig
from trainer.presets import PRESETS

CONFIG = DataLoadingConfig.model_validate(PRESETS["small"]["data_loading"])
ALL_ON = CONFIG.model_copy(update={"rotate_deg": 20.0, "blur_px": 1.5})


def _still(**changes: float) -> DataLoadingConfig:
    """Quarter turns and mirror images, and what is given."""
    none = {"shift_um": 0.0, "zoom": 1.0, "stain_gain": 0, "stain_mix": 0, "stain_offset": 0}
    return CONFIG.model_copy(update=none | changes)


def _seen(image: torch.Tensor, config: DataLoadingConfig, step: int, size: int) -> torch.Tensor:
    drawn = draws(len(image), config, 1, step)
    return augmented(image, drawn, patch_um=8.0, fov_um=8.0, size_px=size, restain=True)


def _image(n: int, size: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8))


def test_a_plain_view_of_the_same_size_is_the_patch() -> None:
    image = _image(2, 16)
    seen = views(image, plain_views(2, patch_um=8.0, fov_um=8.0), 16)
    torch.testing.assert_close(seen, image.permute(0, 3, 1, 2) / 255, atol=1e-5, rtol=0)


def test_a_plain_view_is_the_centre() -> None:
    image = _image(2, 16)
    seen = views(image, plain_views(2, patch_um=8.0, fov_um=4.0), 8)
    want = image[:, 4:12, 4:12].permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(seen, want, atol=1e-5, rtol=0)


def test_shrinking_takes_means_instead_of_single_pixels() -> None:
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    image = torch.from_numpy(np.repeat(board[None, :, :, None], 3, axis=3))
    seen = views(image, plain_views(1, patch_um=8.0, fov_um=8.0), 8)
    torch.testing.assert_close(seen, torch.full((1, 3, 8, 8), 0.5), atol=1e-5, rtol=0)


@settings(max_examples=20, deadline=None)
@given(step=st.integers(0, 10_000))
def test_drawn_layings_are_those_of_a_square(step: int) -> None:
    image = _image(1, 6)
    plain = image[0].permute(2, 0, 1) / 255
    seen = _seen(image, _still(), step, 6)[0]
    turned = [torch.rot90(x, k, (1, 2)) for x in (plain, plain.flip(2)) for k in range(4)]
    assert sum(torch.allclose(seen, t, atol=1e-5) for t in turned) == 1


def test_all_eight_layings_come_up_or_none() -> None:
    def layings(config: DataLoadingConfig) -> set[tuple[int, ...]]:
        view = draws(400, config, 0, 0).views(patch_um=8.0, fov_um=8.0)
        return {tuple(v[:, :2].flatten().round().int().tolist()) for v in view}

    assert len(layings(_still())) == 8
    assert layings(_still(turns=False)) == {(1, 0, 0, 1)}


def test_what_is_off_changes_nothing() -> None:
    image = _image(3, 16)
    seen = _seen(image, _still(turns=False), 5, 16)
    torch.testing.assert_close(seen, image.permute(0, 3, 1, 2) / 255, atol=1e-5, rtol=0)


def test_shift_zoom_and_rotation_stay_inside_their_bounds() -> None:
    config = _still(shift_um=1.5, zoom=1.2, rotate_deg=30.0, turns=False)
    view = draws(500, config, 0, 0).views(patch_um=30.0, fov_um=15.0)
    shift_um = view[:, :, 2] * 15.0
    assert 1.4 < shift_um.abs().max() <= 1.5
    zoom = torch.linalg.det(view[:, :, :2]).abs().sqrt() / 0.5
    assert 1.19 < zoom.max() <= 1.2 + 1e-6
    assert 1 / 1.2 - 1e-6 <= zoom.min() < 1 / 1.19
    angle = torch.rad2deg(torch.atan2(view[:, 1, 0], view[:, 0, 0]))
    assert 29 < angle.max() <= 30
    assert -30 <= angle.min() < -29


@settings(max_examples=30, deadline=None)
@given(
    step=st.integers(0, 10_000),
    shift_um=st.floats(0, 3),
    zoom=st.floats(1, 1.5),
    rotate_deg=st.floats(0, 45),
)
def test_no_view_reaches_beyond_what_is_kept_for_it(
    step: int, shift_um: float, zoom: float, rotate_deg: float
) -> None:
    config = _still(shift_um=shift_um, zoom=zoom, rotate_deg=rotate_deg)
    drawn = draws(50, config, 0, step)
    view = drawn.views(patch_um=30.0, fov_um=12.0)
    reached = (view[:, :, :2].abs().sum(dim=2) + view[:, :, 2].abs()).max()
    assert reached <= drawn.reach(patch_um=30.0, fov_um=12.0) + 1e-6


@pytest.mark.parametrize("size", [8, 12, 32])
def test_a_sample_looks_the_same_whatever_rank_and_chunk_it_is_in(size: int) -> None:
    image = _image(7, 40)
    drawn = draws(7, ALL_ON, 3, 4)
    kinds = {"patch_um": 10.0, "fov_um": 8.0, "size_px": size, "restain": True}
    whole = augmented(image, drawn, **kinds)
    for start, stop in ((0, 2), (2, 3), (3, 7)):
        # A rank with fewer rows than the others pads.
        part = augmented(
            torch.cat([image[start:stop], image[:1]]),
            drawn.rows(start, stop, stop - start + 1),
            **kinds,
        )
        torch.testing.assert_close(part[:-1], whole[start:stop])
        assert part[-1].isfinite().all()


def test_rows_are_those_of_the_global_batch() -> None:
    drawn = draws(10, ALL_ON, 3, 4)
    some = drawn.rows(4, 7, 5)
    assert torch.equal(some.keep_B[:3], drawn.keep_B[4:7])
    assert torch.equal(some.stain_B33[:3], drawn.stain_B33[4:7])
    assert len(some.laying_B) == 5
    assert len(drawn.rows(10, 10, 2).laying_B) == 2  # a rank without samples
    assert len(drawn.rows(2, 4).laying_B) == 2


def test_a_setting_changes_no_other_draw() -> None:
    one, other = draws(10, CONFIG, 3, 4), draws(10, ALL_ON, 3, 4)
    for name in ("laying_B", "log_zoom_B", "shift_um_B2", "stain_B33", "keep_B"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert not torch.equal(one.blur_px_B, other.blur_px_B)


def test_restaining_by_nothing_changes_nothing_and_glass_keeps_its_brightness() -> None:
    image = _image(3, 8).permute(0, 3, 1, 2) / 255
    nothing = torch.eye(3).expand(3, 3, 3), torch.zeros(3, 3)
    torch.testing.assert_close(restained(image, *nothing), (image * 255 + 1) / 256)
    drawn = draws(64, _still(stain_gain=0.5, stain_mix=0.3), 0, 0)
    glass = torch.ones(64, 3, 4, 4)
    torch.testing.assert_close(restained(glass, drawn.stain_B33, drawn.stain_offset_B3), glass)


def test_only_what_is_stained_is_restained() -> None:
    image, drawn = _image(4, 16), draws(4, _still(stain_gain=0.5), 0, 0)
    kinds = {"patch_um": 8.0, "fov_um": 8.0, "size_px": 16}
    he, dapi = (augmented(image, drawn, restain=r, **kinds) for r in (True, False))
    assert not torch.allclose(he, dapi)
    plain = views(image, drawn.views(patch_um=8.0, fov_um=8.0), 16)
    torch.testing.assert_close(dapi, plain)


def test_blur_is_a_gaussian_of_the_drawn_sigma() -> None:
    point = torch.zeros(3, 3, 33, 33)
    point[:, :, 16, 16] = 1.0
    seen = blurred(point, torch.tensor([0.0, 1.0, 2.0]), 2.0)
    torch.testing.assert_close(seen[0], point[0])
    torch.testing.assert_close(seen.sum(dim=(2, 3)), torch.ones(3, 3))
    offset = torch.arange(33.0) - 16
    for row, sigma in ((1, 1.0), (2, 2.0)):
        variance = (seen[row, 0].sum(dim=0) * offset.square()).sum().item()
        assert variance == pytest.approx(sigma**2, rel=0.04)  # cut at three sigma
        torch.testing.assert_close(seen[row], seen[row].transpose(1, 2))
    even = torch.full((1, 3, 16, 16), 0.3)
    torch.testing.assert_close(blurred(even, torch.tensor([5.0]), 5.0), even)


def test_thinning_keeps_between_the_share_and_all() -> None:
    n_cells, n_genes, count = 200, 50, 40
    row_N = torch.arange(n_cells).repeat_interleave(n_genes)
    count_N = torch.full((n_cells * n_genes,), float(count))
    keep_B = draws(n_cells, _still(keep_counts=0.5), 0, 0).keep_B
    kept = thinned(count_N, row_N, keep_B, step_generator(0, 0, part=1))
    assert torch.equal(kept, kept.round())
    assert kept.max() <= count
    share = kept.view(n_cells, n_genes).mean(dim=1) / count
    # 2,000 transcripts a cell: a standard deviation of 0.011 around the drawn share.
    assert (share - keep_B).abs().max() < 0.05
    assert 0.5 <= keep_B.min() < 0.52
    assert 0.98 < keep_B.max() <= 1
    assert keep_B.mean().item() == pytest.approx(0.75, abs=0.04)
    whole = draws(n_cells, _still(keep_counts=1.0), 0, 0).keep_B
    assert torch.equal(thinned(count_N, row_N, whole, step_generator(0, 0)), count_N)


def test_masked_genes_are_a_share_of_the_measured_ones() -> None:
    measured_BG = torch.zeros(50, 400)
    measured_BG[:, ::2] = 1.0
    masked_BG = masked_genes(measured_BG, 0.3, step_generator(0, 7))
    assert not masked_BG[:, 1::2].any()
    assert masked_BG[:, ::2].float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(masked_genes(measured_BG, 0.3, step_generator(0, 7)), masked_BG)
    assert not torch.equal(masked_genes(measured_BG, 0.3, step_generator(0, 7, 1)), masked_BG)


def test_a_step_draws_the_same_again_and_another_step_does_not() -> None:
    def drawn(seed: int, step: int) -> torch.Tensor:
        return draws(8, CONFIG, seed, step).views(patch_um=9.0, fov_um=8.0)

    assert torch.equal(drawn(1, 2), drawn(1, 2))
    assert not torch.equal(drawn(1, 2), drawn(1, 3))
    assert not torch.equal(drawn(1, 2), drawn(2, 2))
