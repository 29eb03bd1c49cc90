"""Training: what the network is shown, and what one network learns from another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.nuclei import further_tiles
from benchmarks.nuclei_scores import matched
from segmentation.augment import random_crop, restained
from segmentation.config import weights_digest
from segmentation.network import load_model, read_metadata
from segmentation.simulated_tiles import simulated_tile, simulated_tiles, soiled
from segmentation.teaching import Teaching
from segmentation.tiles import LabelledTile, content_sha256
from segmentation.train_compact import (
    CROP_PX,
    MPP,
    Recipe,
    example_of,
    main,
    real_tiles,
    stain_group_of_tile,
    train_and_save,
)
from shards.errors import BadInput

TINY = Recipe(widths=(16, 32, 64), n_steps=2, batch=4, n_simulated=0)
PICTURE_MPP = 0.4
# Far from the seeds of training tiles (1000 * seed + i).
PICTURE_SEEDS = (910_001, 910_002)
UNSEEN_SEED = 910_009


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Unlabelled tissue, of another pixel size than either network's."""
    folder = tmp_path / "bilder ä"
    folder.mkdir()
    for seed in PICTURE_SEEDS:
        Image.fromarray(simulated_tile(seed, PICTURE_MPP).rgb).save(folder / f"{seed}.png")
    return folder


def disc(radius_px: float, size_px: int) -> np.ndarray:
    y, x = np.mgrid[:size_px, :size_px] + 0.5
    inside = np.hypot(x - size_px / 2, y - size_px / 2) < radius_px
    return inside.astype(np.int32)


def test_crops_turn_the_flows_with_the_picture() -> None:
    """Flows of a disc point to its centre, however it is turned, mirrored and scaled."""
    tile = LabelledTile("a", np.full((160, 160, 3), 200, np.uint8), disc(30, 160), 0.5)
    example = example_of(tile)
    rng = np.random.default_rng(3)
    for _ in range(10):
        _, target, inside = random_crop(example, CROP_PX, rng)
        y, x = np.nonzero((target[..., 0] > 0) & (inside > 0))
        to_centre = np.column_stack([y.mean() - y, x.mean() - x])
        far = np.linalg.norm(to_centre, axis=1) > 8
        flow = target[y[far], x[far], 1:]
        cosine = (flow * to_centre[far]).sum(axis=1) / np.linalg.norm(to_centre[far], axis=1)
        assert np.median(cosine) > 0.9


def test_restaining_stays_within_what_a_camera_records() -> None:
    rng = np.random.default_rng(0)
    density = rng.uniform(0, 1.5, (CROP_PX, CROP_PX, 3)).astype(np.float32)
    for _ in range(20):
        out = restained(density, rng)
        assert out.dtype == np.float32
        assert out.min() >= 0
        assert out.max() <= np.log10(255) + 1e-6


def test_simulated_tiles_are_of_their_seed_and_size() -> None:
    tile, again, other = (simulated_tile(seed, MPP) for seed in (7, 7, 8))
    assert content_sha256([tile]) == content_sha256([again])
    assert tile.rgb.shape == (256, 256, 3)
    assert tile.labels.shape == (256, 256)
    assert not np.array_equal(tile.labels, other.labels)
    first, second = simulated_tiles(0, 2, MPP), simulated_tiles(1, 2, MPP)
    assert not {t.tile_id for t in first} & {t.tile_id for t in second}


def test_soil_leaves_nuclei_as_they_were() -> None:
    tile = simulated_tile(3, 0.25)
    changed = np.zeros(tile.labels.shape, bool)
    for seed in range(6):
        dirty = soiled(tile.rgb, tile.labels, tile.mpp, np.random.default_rng(seed))
        difference = np.abs(dirty.astype(int) - tile.rgb).max(axis=2)
        assert np.percentile(difference[tile.labels > 0], 99) <= 8
        changed |= difference > 40
    assert changed[tile.labels == 0].mean() > 0.3


def test_a_student_learns_what_its_teacher_finds(pictures: Path, tmp_path: Path) -> None:
    teaching = Teaching("compact", pictures, PICTURE_MPP)
    rgb = simulated_tile(UNSEEN_SEED, MPP).rgb
    taught = load_model("compact", "cpu").find(rgb)[0]
    agreement = {}
    for n_steps in (2, 100):
        out = tmp_path / f"student-{n_steps}.pt"
        recipe = replace(TINY, n_steps=n_steps)
        metadata = train_and_save(out, None, recipe, teaching=teaching)
        agreement[n_steps] = matched(taught, load_model(str(out), "cpu").find(rgb)[0]).f1
    assert agreement[100] > agreement[2] + 0.2
    assert metadata == read_metadata(out)
    assert metadata.teacher_sha256 == weights_digest("compact")
    assert (metadata.n_real_tiles, metadata.n_taught_tiles) == (0, len(PICTURE_SEEDS))
    assert metadata.taught_tiles_sha256 is not None
    assert "--teacher WEIGHTS --pictures PICTURES --mpp 0.4" in metadata.command
    assert str(tmp_path) not in metadata.model_dump_json()


def test_labelled_tiles_are_learned_beside_taught_ones(pictures: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    tile = simulated_tile(910_020, MPP)
    Image.fromarray(tile.rgb).save(data / "a_he.png")
    Image.fromarray(tile.labels.astype(np.uint16)).save(data / "a_labels.png")
    teaching = Teaching("compact", pictures, PICTURE_MPP)
    both = train_and_save(tmp_path / "both" / "a.pt", data, TINY, teaching=teaching)
    again = train_and_save(tmp_path / "again" / "a.pt", data, TINY, teaching=teaching)
    alone = train_and_save(tmp_path / "alone" / "a.pt", data, TINY)
    assert (both.n_real_tiles, both.n_taught_tiles) == (1, len(PICTURE_SEEDS))
    assert both.weights_sha256 == again.weights_sha256 != alone.weights_sha256
    assert (alone.teacher_sha256, alone.n_taught_tiles) == (None, 0)
    with pytest.raises(BadInput, match="a, which is in no group"):
        real_tiles(data, 0)


def test_a_group_is_left_out(shared_data: Path) -> None:
    kept = real_tiles(shared_data / "nuclei", 2)
    assert len(kept) == 48
    assert 2 not in {stain_group_of_tile()[tile.tile_id] for tile in kept}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: None, "found:    none"),
        (lambda folder: folder.rmdir(), "no such folder"),
        (lambda folder: (folder / "a.png").write_bytes(b"no picture"), r"a\.png"),
        (
            lambda folder: Image.new("RGB", (400, 400), (243, 242, 244)).save(folder / "b.png"),
            r"b\.png\n.*\n.*nothing but glass",
        ),
        (
            lambda folder: Image.new("RGB", (400, 400), (200, 130, 170)).save(folder / "c.png"),
            "no nucleus in 1 pictures at 0.4",
        ),
    ],
)
def test_pictures_that_teach_nothing_are_refused(tmp_path: Path, make, told: str) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    make(folder)
    out = tmp_path / "student.pt"
    with pytest.raises(BadInput, match=told):
        train_and_save(out, None, TINY, teaching=Teaching("compact", folder, PICTURE_MPP))
    assert not out.exists()


@pytest.mark.parametrize(
    "given", [[], ["--teacher", "compact"], ["--data", "d", "--mpp", "0.5"], ["--pictures", "p"]]
)
def test_half_a_command_is_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*given, "--out", "student.pt"])
    assert "--teacher" in capsys.readouterr().err


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--teacher", "compact", "--pictures", str(tmp_path), "--mpp", "0.5"]
    with pytest.raises(SystemExit, match="2"):
        main([*given, "--out", str(tmp_path / "student.pt")])
    assert "PNG, JPEG or TIFF pictures of tissue" in capsys.readouterr().err


def test_further_tiles_are_not_those_of_training(tmp_path: Path) -> None:
    for folder, seed in (("data", 910_030), ("same", 910_030), ("other", 910_031)):
        (tmp_path / folder).mkdir()
        tile = simulated_tile(seed, MPP)
        Image.fromarray(tile.rgb).save(tmp_path / folder / "a_he.png")
        Image.fromarray(tile.labels.astype(np.uint16)).save(tmp_path / folder / "a_labels.png")
    assert len(further_tiles(tmp_path / "other", tmp_path / "data")) == 1
    with pytest.raises(BadInput, match="one of the training tiles"):
        further_tiles(tmp_path / "same", tmp_path / "data")
