"""What training does to patches and counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.augment import drawn_views, plain_views, restained, step_generator, thinned, views
from trainer.batch import Batch
from trainer.config import PRESETS, DataLoadingConfig

CONFIG = DataLoadingConfig.model_validate(PRESETS["small"]["data_loading"])


def _still(**changes: float) -> DataLoadingConfig:
    none = {"shift_um": 0.0, "zoom": 1.0, "stain_gain": 0, "stain_mix": 0, "stain_offset": 0}
    return CONFIG.model_copy(update=none | changes)


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
    view = drawn_views(1, _still(), step_generator(1, step), patch_um=8.0, fov_um=8.0)
    seen = views(image, view, 6)[0]
    turned = [torch.rot90(x, k, (1, 2)) for x in (plain, plain.flip(2)) for k in range(4)]
    assert sum(torch.allclose(seen, t, atol=1e-5) for t in turned) == 1


def test_all_eight_layings_come_up() -> None:
    view = drawn_views(400, _still(), step_generator(0, 0), patch_um=8.0, fov_um=8.0)
    layings = {tuple(v[:, :2].flatten().round().int().tolist()) for v in view}
    assert len(layings) == 8


def test_shift_and_zoom_stay_inside_their_bounds() -> None:
    config = _still(shift_um=1.5, zoom=1.2)
    view = drawn_views(500, config, step_generator(0, 0), patch_um=30.0, fov_um=15.0)
    shift_um = view[:, :, 2] * 15.0
    assert 1.4 < shift_um.abs().max() <= 1.5
    zoom = torch.linalg.det(view[:, :, :2]).abs().sqrt() / 0.5
    assert 1.19 < zoom.max() <= 1.2 + 1e-6
    assert 1 / 1.2 - 1e-6 <= zoom.min() < 1 / 1.19


def test_restaining_by_nothing_changes_nothing_and_glass_keeps_its_brightness() -> None:
    image = _image(3, 8).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(
        restained(image, _still(), step_generator(0, 0)), (image * 255 + 1) / 256
    )
    glass = torch.ones(64, 3, 4, 4)
    stained = restained(glass, _still(stain_gain=0.5, stain_mix=0.3), step_generator(0, 0))
    torch.testing.assert_close(stained, glass)


def test_thinning_keeps_between_the_share_and_all() -> None:
    n_cells, n_genes, count = 200, 50, 40
    batch = Batch(
        index_B=np.arange(n_cells),
        image_BHWC=torch.zeros(n_cells, 1, 1, 3, dtype=torch.uint8),
        row_N=torch.arange(n_cells).repeat_interleave(n_genes),
        gene_N=torch.arange(n_genes).repeat(n_cells),
        count_N=torch.full((n_cells * n_genes,), float(count)),
        panel_B=torch.zeros(n_cells, dtype=torch.int64),
        weight_B=torch.ones(n_cells),
    )
    kept = thinned(batch, 0.5, step_generator(0, 0)).count_N
    assert torch.equal(kept, kept.round())
    assert kept.max() <= count
    share = kept.view(n_cells, n_genes).mean(dim=1) / count
    # 2,000 transcripts a cell: a standard deviation of 0.011 around the drawn share.
    assert 0.45 < share.min() < 0.52
    assert 0.98 < share.max() <= 1
    assert share.mean().item() == pytest.approx(0.75, abs=0.04)
    assert torch.equal(thinned(batch, 1.0, step_generator(0, 0)).count_N, batch.count_N)


def test_a_step_draws_the_same_again_and_another_step_does_not() -> None:
    def drawn(seed: int, step: int) -> torch.Tensor:
        return drawn_views(8, CONFIG, step_generator(seed, step), patch_um=9.0, fov_um=8.0)

    assert torch.equal(drawn(1, 2), drawn(1, 2))
    assert not torch.equal(drawn(1, 2), drawn(1, 3))
    assert not torch.equal(drawn(1, 2), drawn(2, 2))
