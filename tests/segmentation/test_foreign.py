"""Cellpose 4 networks other than ours: the same numbers as elsewhere, and what is refused."""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from cellpose.models import MODEL_NAMES
from cellpose.vit import CPSAM
from timm.layers import LayerNorm
from timm.models.eva import Eva, checkpoint_filter_fn
from torch.nn import functional

from segmentation.config import CELLPOSE_NAMES, weights_digest, weights_path
from segmentation.foreign import DinoNetwork, foreign_network
from segmentation.weights_file import read_state
from shards.errors import BadInput

WHERE = Path("weights")
WIDTH, N_LAYERS, N_HEADS = 64, 2, 4

State = dict[str, torch.Tensor]


def tiny_dino(seed: int = 0) -> DinoNetwork:
    """A small network all of whose numbers are random, but for the mask of the keys' bias."""
    generator = torch.Generator().manual_seed(seed)
    net = DinoNetwork(WIDTH, N_LAYERS, N_HEADS).eval()
    keep = ("W2", "periods")
    for key, value in net.state_dict().items():
        if key.endswith("bias_mask"):
            value[WIDTH : 2 * WIDTH] = 0
        elif not key.endswith(keep):
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return net


def image(n_y: int, n_x: int) -> torch.Tensor:
    return torch.rand(2, 3, n_y, n_x, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def through_timm(state: State, image_BCHW: torch.Tensor) -> torch.Tensor:
    """The same network around timm's DINOv3, which others wrote."""
    encoder = Eva(
        patch_size=16, dynamic_img_size=True, num_classes=0, embed_dim=WIDTH, depth=N_LAYERS,
        num_heads=N_HEADS, qkv_bias=True, init_values=1.0, rope_type="dinov3",
        rope_temperature=100, rope_rotate_half=True, use_rot_pos_emb=True, use_abs_pos_emb=False,
        num_reg_tokens=4, use_fc_norm=False, norm_layer=partial(LayerNorm, eps=1e-5),
    )  # fmt: skip
    prefix = "encoder."
    theirs = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    encoder.load_state_dict(checkpoint_filter_fn(theirs, encoder), strict=True)
    encoder.patch_embed.proj.stride, encoder.patch_embed.proj.padding = (8, 8), (4, 4)
    tokens_BND = encoder.eval().forward_features(image_BCHW)[:, 5:]
    values_BNC = functional.linear(tokens_BND, state["out.weight"], state["out.bias"])
    n_y, n_x = image_BCHW.shape[2] // 8, image_BCHW.shape[3] // 8
    values_BCHW = values_BNC.transpose(1, 2).unflatten(2, (n_y, n_x))
    # W2 is the identity here, which makes it this.
    return functional.pixel_shuffle(values_BCHW, 8)


@pytest.mark.parametrize(("n_y", "n_x"), [(64, 64), (96, 48)])
def test_dino_gives_what_timm_gives(n_y: int, n_x: int) -> None:
    net, pixels = tiny_dino(), image(n_y, n_x)
    with torch.no_grad():
        found, style = net(pixels)
    expected = through_timm(net.state_dict(), pixels)
    assert found.shape == (2, 3, n_y, n_x)
    assert style.shape == (2, 256)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("key", ["encoder.rope_embed.periods", "qkv.bias_mask"])
def test_dino_computes_with_the_buffers_that_are_saved(key: str) -> None:
    net, pixels = tiny_dino(), image(32, 32)
    before = net(pixels)[0].clone()
    state = net.state_dict()
    net.load_state_dict({k: v + 0.5 if k.endswith(key) else v for k, v in state.items()})
    assert (net(pixels)[0] - before).abs().max() > 1e-3


@torch.no_grad()
def test_values_of_a_token_lie_as_its_pixels() -> None:
    net = tiny_dino()
    net.out.weight.zero_()
    net.out.bias.copy_(torch.arange(192.0))
    token = torch.arange(192.0).reshape(3, 8, 8)  # output, y, x
    found, _ = net(image(16, 24))
    assert torch.equal(found[1], token.repeat(1, 2, 3))


@torch.no_grad()
def test_dino_runs_in_bfloat16() -> None:
    net, pixels = tiny_dino(), image(32, 32)
    exact = net(pixels)[0]
    rough = net.to(torch.bfloat16)(pixels.to(torch.bfloat16))[0]
    assert rough.dtype is torch.bfloat16
    assert (rough - exact).abs().max() < 0.1 * exact.std()


# ------------------------------------------------ full size, in shapes alone: no memory is taken


def zeros(shapes: dict[str, tuple[int, ...]]) -> State:
    return {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}


def sam_state() -> State:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in CPSAM().state_dict().items()}
    return zeros(shapes)


def dino_state(width: int = 768, n_layers: int = 12) -> State:
    """What CPDINO of Cellpose 4.2.1.1 saves, as it was listed with the package dinov3 at hand."""
    block = {
        "norm1.weight": (width,), "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
        "attn.qkv.bias_mask": (3 * width,), "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,), "ls1.gamma": (width,),
        "norm2.weight": (width,), "norm2.bias": (width,),
        "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,), "ls2.gamma": (width,),
    }  # fmt: skip
    blocks = {f"blocks.{i}.{key}": shape for i in range(n_layers) for key, shape in block.items()}
    encoder = blocks | {
        "cls_token": (1, 1, width), "storage_tokens": (1, 4, width), "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,),
        "rope_embed.periods": (16,), "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip
    return zeros(
        {"diam_labels": (1,), "diam_mean": (1,), "W2": (192, 3, 8, 8)}
        | {"out.weight": (192, width), "out.bias": (192,)}
        | {f"encoder.{key}": shape for key, shape in encoder.items()}
    )


@pytest.mark.parametrize(
    ("state", "window_px"),
    [(sam_state, 256), (dino_state, 384), (partial(dino_state, 1024, 24), 384)],
)
def test_networks_are_told_by_their_tensors(state: Callable[[], State], window_px: int) -> None:
    network = foreign_network(WHERE, state())
    assert (network.window_px, network.overlap_px) == (window_px, 64)
    assert network.mpp == pytest.approx(0.2667, abs=1e-4)
    assert not network.net.training
    assert not any(p.requires_grad or p.is_meta for p in network.net.parameters())


def test_keys_of_parallel_training_and_other_types_are_taken() -> None:
    state = {f"module.{k}": value.to(torch.float16) for k, value in dino_state().items()}
    tensors = foreign_network(WHERE, state).net.state_dict().values()
    assert all(t.dtype is torch.float32 for t in tensors)


def test_diameters_of_training_may_be_missing() -> None:
    # Cellpose-SAM was trained before they were saved.
    state = {key: value for key, value in sam_state().items() if not key.startswith("diam_")}
    assert foreign_network(WHERE, state).net.diam_mean.item() == 30


LAST = "encoder.blocks.11.ls2.gamma"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({LAST: None}, rf"1 missing \(first {LAST}\)"),
        ({"head.weight": torch.zeros(2)}, r"1 unknown \(first head.weight\)"),
        ({"out.bias": torch.zeros(5 * 64)}, r"out.bias \(320,\), not \(192,\)"),
        ({LAST: torch.zeros(768, dtype=torch.int64)}, "1 no plain floating-point numbers"),
        ({"out.bias": torch.zeros(0)}, r"out.bias \(0,\), not \(192,\)"),
        ({LAST: torch.tensor([0.0, torch.nan] * 384)}, rf"1 not finite \(first {LAST}\)"),
        ({LAST: torch.tensor([0.0, -torch.inf] * 384)}, rf"1 not finite \(first {LAST}\)"),
        ({"encoder.patch_embed.proj.weight": torch.zeros(384, 3, 16, 16)}, "384 rows"),
        ({"encoder.patch_embed.proj.weight": torch.tensor(1.0)}, "0 rows"),
        ({"encoder.cls_token": None}, "Cellpose 4 weights of a sam_vitl"),
        ({"W2": None}, "no W2"),
    ],
)
def test_other_tensors_are_refused(change: dict[str, torch.Tensor | None], words: str) -> None:
    state = {key: v for key, v in (dino_state() | change).items() if v is not None}
    with pytest.raises(BadInput, match=words):
        foreign_network(WHERE, state)


def test_a_network_on_sam_without_a_tensor_is_refused() -> None:
    state = sam_state()
    del state["encoder.blocks.3.attn.rel_pos_h"]
    with pytest.raises(BadInput, match=r"1 missing \(first encoder.blocks.3.attn.rel_pos_h\)"):
        foreign_network(WHERE, state)


def test_weights_of_cellpose_3_are_refused_by_name() -> None:
    keys = ("diam_mean", "diam_labels", "downsample.down.res_down_0.conv.conv_0.0.weight")
    with pytest.raises(BadInput, match="weights of Cellpose 3, which Cellpose 4 cannot use"):
        foreign_network(WHERE, {key: torch.zeros(1) for key in keys})


@pytest.mark.slow
@torch.no_grad()
def test_a_network_on_sam_computes_as_cellpose_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = CPSAM().eval()  # 1.2 GB
    for block in theirs.encoder.blocks:
        for rel_pos in (block.attn.rel_pos_h, block.attn.rel_pos_w):
            rel_pos.normal_(std=0.1)
    path = tmp_path / "cpsam"
    theirs.save_model(path)
    pixels = torch.rand(1, 3, 256, 256)
    expected = theirs(pixels)[0]
    del theirs
    found = foreign_network(path, read_state(path)).net(pixels)[0]
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# ---------------------------------------------------------------------------- names and files


def test_names_are_those_of_cellpose() -> None:
    assert list(CELLPOSE_NAMES) == MODEL_NAMES


@pytest.mark.parametrize("name", CELLPOSE_NAMES)
def test_names_are_files_in_the_folder_of_cellpose(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CELLPOSE_LOCAL_MODELS_PATH", raising=False)
    home = tmp_path / ".cellpose" / "models" / name
    with pytest.raises(BadInput, match=rf"(?s)file {home},.*cache_model_path\('{name}'\)"):
        weights_digest(name)
    home.parent.mkdir(parents=True)
    home.write_bytes(b"home")
    assert weights_path(name) == home
    assert weights_digest(name) == hashlib.sha256(b"home").hexdigest()
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path))
    with pytest.raises(BadInput, match=rf"file {tmp_path / name},"):
        weights_path(name)
    (tmp_path / name).write_bytes(b"chosen")
    assert weights_digest(name) == hashlib.sha256(b"chosen").hexdigest()


def test_other_names_are_told_what_there_is() -> None:
    with pytest.raises(BadInput, match="compact, cpsam_v2, cpdino, cpdino-vitb, cpsam, or"):
        weights_path("cyto3")


STATE = {"a": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(300, dtype=torch.bfloat16)}


def saved(path: Path, kind: str) -> Path:
    if kind == "safetensors":
        safetensors.torch.save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_states_are_read_from_every_format(kind: str, tmp_path: Path) -> None:
    found = read_state(saved(tmp_path / "weights", kind))
    assert found.keys() == STATE.keys()
    for key, value in STATE.items():
        assert found[key].dtype is value.dtype
        assert torch.equal(found[key], value)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_that_is_cut_off_is_told(kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "weights", kind)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"(?s)damaged or cut off.*copy or download it again"):
        read_state(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html>\n<html><body>Not found", "text, as a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "text, as a web page"),
        (b"PK\x03\x04" + bytes(600), "damaged or cut off"),
        (bytes(range(256)), "bytes that are no weights"),
        (pickle.dumps({"W2": Path("a")}, protocol=2), r"needs a pickle, .*refused"),
        (pickle.dumps({"W2": Path("a")}, protocol=4), r"needs a pickle, .*refused"),
    ],
)
def test_files_of_no_weights_are_told_by_their_kind(
    content: bytes, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=words):
        read_state(path)


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"W2": torch.zeros(1), "made": Path("a")}, r"needs a pickle, .*refused"),
        ({"state_dict": STATE}, "other things than tensors, such as 'state_dict'"),
        ({**STATE, "epoch": 3}, "other things than tensors, such as 'epoch'"),
        ([torch.zeros(1)], "a list, not a state dict"),
    ],
)
def test_checkpoints_are_not_taken_for_states(saved: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    torch.save(saved, path)
    with pytest.raises(BadInput, match=rf"(?s){words}.*save the network's state_dict\(\) alone"):
        read_state(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_changed_bytes_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    whole = saved(tmp_path / "weights", kind).read_bytes()
    draw = random.Random(0)
    changed_path, n_refused = tmp_path / "changed", 0
    for _ in range(400):
        changed = bytearray(whole)
        for _ in range(3):
            changed[draw.randrange(min(len(changed), 700))] = draw.randrange(256)
        changed_path.write_bytes(changed)
        try:
            read_state(changed_path)
        except BadInput:
            n_refused += 1
    assert n_refused > 50
