"""Weights: what ships, what else may be named, and what is refused."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from cellpose.metrics import average_precision
from cellpose.vit import CPSAM

from pairing.simulate.tile import labelled_tile
from segmentation.config import COMPACT_PATH, weights_digest
from segmentation.network import (
    FOREIGN_MPP,
    CompactUNet,
    load_model,
    optical_density,
    read_metadata,
)
from shards.errors import BadInput

# Far from the seeds of the training tiles (simulated_tiles: 1000 * seed + 0 … 191).
UNSEEN_SEEDS = (900_001, 900_002, 900_003, 900_004)


def test_shipped_metadata_is_of_the_shipped_weights() -> None:
    metadata = read_metadata(COMPACT_PATH)
    assert metadata.weights_sha256 == hashlib.sha256(COMPACT_PATH.read_bytes()).hexdigest()
    assert metadata.weights_sha256 == weights_digest("compact")
    assert metadata.left_out_group is None
    assert metadata.n_real_tiles == 59
    assert set(metadata.scores) == {"0", "1", "2", "3", "all"}
    assert "--seed 0" in metadata.command
    assert COMPACT_PATH.stat().st_size < 6_500_000


def test_density_of_white_is_zero_and_of_a_tenth_is_one() -> None:
    rgb = np.array([[[255, 26, 0]]], np.uint8)
    density = optical_density(rgb)[0, 0]
    assert density == pytest.approx([0.0, np.log10(255 / 26), np.log10(255)], abs=1e-6)


def test_nuclei_of_simulated_tiles_are_found() -> None:
    network = load_model("compact", "cpu")
    true = false = missed = 0
    for seed in UNSEEN_SEEDS:
        rgb, labels = labelled_tile(seed, 256, network.mpp)
        found, logit = network.find(rgb)
        assert found.shape == logit.shape == (256, 256)
        _, tp, fp, fn = average_precision([labels], [found], threshold=[0.5])
        true, false, missed = true + tp.item(), false + fp.item(), missed + fn.item()
    assert 2 * true / (2 * true + false + missed) > 0.75


def test_other_calls_of_cellpose_change_nothing() -> None:
    network = load_model("compact", "cpu")
    rgb, _ = labelled_tile(UNSEEN_SEEDS[0], 128, network.mpp)
    before = network.find(rgb)
    network.model.eval(rgb, normalize=True, min_size=100)  # changes Cellpose's global defaults
    after = network.find(rgb)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])


def test_clear_glass_has_no_nuclei() -> None:
    labels, _ = load_model("compact", "cpu").find(np.full((128, 160, 3), 244, np.uint8))
    assert labels.max() == 0


@pytest.mark.parametrize("name", ["cpsam_v2", "no/such/file.pt"])
def test_weights_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(BadInput, match="give their path"):
        load_model(name, "cpu")
    with pytest.raises(BadInput, match="give their path"):
        weights_digest(name)


def test_compact_weights_are_taken_by_path(tmp_path: Path) -> None:
    copy = tmp_path / "gewichte ä.pt"
    copy.write_bytes(COMPACT_PATH.read_bytes())
    with pytest.raises(BadInput, match=r"gewichte ä\.json beside it"):
        load_model(str(copy), "cpu")
    copy.with_suffix(".json").write_bytes(COMPACT_PATH.with_suffix(".json").read_bytes())
    network = load_model(str(copy), "cpu")
    assert network.mpp == load_model("compact", "cpu").mpp
    assert network.weights_sha256 == weights_digest("compact")


def test_metadata_of_other_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(CompactUNet((16, 32)).state_dict(), path)
    path.with_suffix(".json").write_bytes(COMPACT_PATH.with_suffix(".json").read_bytes())
    with pytest.raises(BadInput, match="SHA-256"):
        load_model(str(path), "cpu")


def test_a_larger_network_than_its_metadata_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "larger.pt"
    torch.save(CompactUNet((32, 64, 96)).state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    metadata = read_metadata(COMPACT_PATH).model_copy(update={"weights_sha256": digest})
    path.with_suffix(".json").write_text(metadata.model_dump_json())
    with pytest.raises(BadInput, match="compact network of widths"):
        load_model(str(path), "cpu")


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.pt"
    text.write_text("not weights")
    pickled = tmp_path / "pickled.pt"
    pickled.write_bytes(pickle.dumps({"W2": Path("a")}, protocol=2))
    nested = tmp_path / "checkpoint.pt"
    torch.save({"state": {"W2": torch.zeros(1)}}, nested)
    unknown = tmp_path / "unknown.pt"
    torch.save({"layer.weight": torch.zeros(1)}, unknown)
    partial = tmp_path / "partial.pt"
    torch.save({"W2": torch.zeros(1), "encoder.patch_embed.proj.weight": torch.zeros(1)}, partial)
    for path in (text, pickled, nested, unknown, partial):
        with pytest.raises(BadInput, match="Cellpose 4 weights"):
            load_model(str(path), "cpu")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(BadInput, match="auto, cpu, or cuda"):
        load_model("compact", "tpu")


@pytest.mark.slow
def test_weights_of_cellpose_itself_are_taken_by_path(tmp_path: Path) -> None:
    path = tmp_path / "cpsam-untrained.pt"
    torch.save(CPSAM().state_dict(), path)  # 1.2 GB
    network = load_model(str(path), "cpu")
    load_model.cache_clear()  # it is large
    assert network.mpp == FOREIGN_MPP
    assert network.weights_sha256 == weights_digest(str(path))
    labels, logit = network.find(labelled_tile(UNSEEN_SEEDS[0], 128, FOREIGN_MPP)[0])
    assert labels.shape == logit.shape == (128, 128)
