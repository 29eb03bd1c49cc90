"""Every part of the model and of the loop at once, and each beside the plain way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shards.errors import BadInput
from tests.shards.tiny import tiny_panel, write_tiny_dataset
from trainer.checkpoint import checkpoints, read_meta, read_model_state, read_part, read_vocabulary
from trainer.evaluate import evaluate
from trainer.train import train

from .conftest import PLAIN, TinyConfig
from .test_exact import rows_of

EVERYTHING: dict[str, dict[str, Any]] = {
    "model": {
        **PLAIN,
        "genes": "rank",
        "projection": "residual",
        "rank": {
            "width": 16,
            "depth": 1,
            "heads": 2,
            "feedforward": 32,
            "context": 20,
            "dropout": 0.1,
            "means": "none",
        },
        "graph": {"neighbors": 2, "hidden": 8, "layers": 2, "heads": 2, "bias": -1.0},
    },
    "loss": {
        "kind": "soft_targets",
        "image_expression": 0.1,
        "masked_genes": 0.1,
        "masked_share": 0.2,
    },
    "optim": {"ema": 0.9, "image_lr_scale": 0.1, "lr_min": 1e-6, "precision": "bfloat16"},
    "data_loading": {
        "micro_batch": 20,
        "workers": 1,
        "reading": "block",
        "balanced": True,
        "cap": {"run": 60},
        "weight": {"donor": {"D1": 2}},
        "verify": "sha256",
        "rotate_deg": 10.0,
        "blur_px": 1.0,
    },
    "run": {"validate_every": 3, "checkpoint_activations": True},
}


def test_everything_at_once_trains_resumes_to_the_last_bit_and_is_evaluated(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    straight, cut = (tiny_config(out=out, steps=6, **EVERYTHING) for out in ("straight", "cut"))
    assert train(straight)
    left = [4]

    def after_four() -> bool:
        left[0] -= 1
        return left[0] == 0

    assert not train(cut, stop=after_four)
    assert train(cut, resume=True)
    assert rows_of(cut.run.out) == rows_of(straight.run.out)
    # D1 twice and D2 once, of 60 each.
    assert rows_of(cut.run.out)[3]["samples"] == "180"
    (one, other) = (checkpoints(c.run.out / "checkpoints")[-1] for c in (straight, cut))
    averaged = read_model_state(one)
    for name, values in read_model_state(other).items():
        assert torch.equal(values, averaged[name])
    newest = read_part(one, "model")
    assert any(not torch.equal(values, averaged[name]) for name, values in newest.items())
    found = evaluate(one, straight.data[0], tmp_path / "evaluation", device="cpu")
    assert found.step == 6
    assert {line.method for line in found.retrieval} >= {"model", "ridge", "chance"}


def test_rows_at_a_time_change_nothing_but_sums(tiny_config: TinyConfig) -> None:
    plain = {"keep_counts": 1.0}
    whole = tiny_config(out="whole", steps=4, model=PLAIN, data_loading=plain)
    parts = tiny_config(
        out="parts", steps=4, model=PLAIN, data_loading={**plain, "micro_batch": 11}
    )
    train(whole)
    train(parts)
    for a, b in zip(rows_of(whole.run.out), rows_of(parts.run.out), strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=1e-4)
        assert float(b["grad_norm"]) == pytest.approx(float(a["grad_norm"]), rel=1e-3)


def test_the_best_by_validation_is_kept_beside_the_newest(tiny_config: TinyConfig) -> None:
    config = tiny_config(steps=20, run={"validate_every": 2, "keep_checkpoints": 1})
    train(config)
    scores = {int(r["step"]): float(r["val_r5"]) for r in rows_of(config.run.out) if r["val_r5"]}
    kept = [read_meta(c) for c in checkpoints(config.run.out / "checkpoints")]
    assert kept[-1].step == 20
    assert max(meta.val_r5 or 0.0 for meta in kept) == max(scores.values())
    assert len(kept) <= 2


def test_weights_of_an_earlier_run_start_a_new_one_on_more_genes(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = tiny_config(steps=4, loss={"image_expression": 0.1})
    train(config)
    before = checkpoints(config.run.out / "checkpoints")[-1]
    wider = write_tiny_dataset(tmp_path / "wider", n_per_donor=70, panel=tiny_panel(55))
    more = tiny_config(
        out="more", steps=1, optim={"lr": 1e-9, "warmup_steps": 0}, loss={"image_expression": 0.1}
    )
    more = more.model_copy(update={"data": (wider,)})
    assert train(more, init_from=before)
    after = checkpoints(more.run.out / "checkpoints")[-1]
    assert read_vocabulary(after).genes[:40] == read_vocabulary(before).genes
    assert len(read_vocabulary(after).genes) == 55
    old, new = read_part(before, "model"), read_part(after, "model")
    weight = "gene.measured.weight"
    torch.testing.assert_close(new[weight][:, :40], old[weight], atol=1e-6, rtol=0)
    assert new[weight].shape[1] == 55
    assert rows_of(more.run.out)[0]["samples"] == "48"
    other = tiny_config(out="other", model={"embed_dim": 8}, loss={"image_expression": 0.1})
    with pytest.raises(BadInput, match="a model like the new one"):
        train(other, init_from=before)
    with pytest.raises(BadInput, match="a checkpoint"):
        train(tiny_config(out="nothing"), init_from=tmp_path)


def test_a_profile_tells_where_time_goes(
    tiny_config: TinyConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config(steps=100), profile_steps=5)
    told = capsys.readouterr().out
    for part in ("waiting for data", "towers, forward", "loss and backward", "a step"):
        assert part in told
    assert "step 6," in told
    assert "step 7," not in told
