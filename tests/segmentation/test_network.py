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
from segmentation.foreign import FOREIGN_MPP
from segmentation.network import CompactUNet, NucleusNetwork, load_model, read_metadata
from segmentation.stain import Normalisation
from shards.errors import BadInput

DENSITY = Normalisation(kind="optical_density")
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


def test_windows_run_together_give_the_same_bits_as_alone() -> None:
    network = load_model("compact", "cpu")
    rgb_BYXC = np.stack([labelled_tile(seed, 128, network.mpp)[0] for seed in UNSEEN_SEEDS[:3]])
    together = network.predict(rgb_BYXC, DENSITY)
    assert together.shape == (3, 3, 128, 128)
    for i in range(3):
        np.testing.assert_array_equal(network.predict(rgb_BYXC[i : i + 1], DENSITY)[0], together[i])


def test_normalisation_of_batches_is_part_of_the_convolutions_and_changes_little() -> None:
    torch.manual_seed(0)
    net = CompactUNet((4, 8))
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight)
    x_BCHW = torch.rand(2, 3, 32, 32)
    before = net.eval()(x_BCHW)[0]
    assert torch.allclose(net.fused()(x_BCHW)[0], before, atol=1e-5)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())


class Greedy(torch.nn.Module):
    """A network that finds too little memory for more than `most` windows."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.asked: list[int] = []

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor]:
        self.asked.append(len(x_BCHW))
        if len(x_BCHW) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (x_BCHW * 2,)


def greedy_network(net: Greedy, batch: int) -> NucleusNetwork:
    network = NucleusNetwork(
        net, torch.device("cpu"), mpp=0.5, window_px=32, overlap_px=0, any_window=True,
        normalisation="optical_density", weights_sha256="",
    )  # fmt: skip
    network.batch = batch
    return network


def test_too_little_memory_halves_the_batch_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    net = Greedy(2)
    network = greedy_network(net, 8)
    rgb_BYXC = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    output = network.predict(rgb_BYXC, DENSITY)
    np.testing.assert_allclose(output, 2 * DENSITY(rgb_BYXC).transpose(0, 3, 1, 2), rtol=1e-3)
    # The last batch is filled up: always the same work.
    assert net.asked == [8, 4, 2, 2, 2]
    told = [record.getMessage() for record in caplog.records]
    assert [text for text in told if "too little memory" in text] == [
        "too little memory on the GPU: 4 windows at once now",
        "too little memory on the GPU: 2 windows at once now",
    ]
    with pytest.raises(torch.OutOfMemoryError):
        greedy_network(Greedy(0), 4).predict(rgb_BYXC, DENSITY)


def test_clear_glass_has_no_nuclei() -> None:
    labels, _ = load_model("compact", "cpu").find(np.full((128, 160, 3), 244, np.uint8))
    assert labels.max() == 0


@pytest.mark.parametrize("name", ["cpsam_v2", "no/such/file.pt"])
def test_weights_that_are_not_there_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path))
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
