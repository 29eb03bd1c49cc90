"""Evaluation: what it writes, and that the figures mean what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from shards.errors import BadInput
from shards.stream import read_stream
from tests.shards.tiny import write_tiny_dataset
from trainer.baselines import ridge_embeddings
from trainer.checkpoint import checkpoints, read_meta
from trainer.config import read_config
from trainer.evaluate import Evaluation, evaluate, main
from trainer.retrieval import Retrieval, ranks
from trainer.train import train

from .conftest import write_config


@pytest.fixture(scope="module")
def checkpoint(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_config(folder, tiny_dataset, "run", 60)
    train(read_config(folder / "run.toml"))
    return checkpoints(folder / "run" / "checkpoints")[-1]


def _line(evaluation: Evaluation, method: str, scope: str, direction: str) -> Retrieval:
    (found,) = [
        line
        for line in evaluation.retrieval
        if (line.method, line.scope, line.direction) == (method, scope, direction)
    ]
    return found


def test_figures_and_files(checkpoint: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    assert main([str(checkpoint), str(tiny_dataset), "--out", str(tmp_path)]) == 0
    evaluation = Evaluation.model_validate_json((tmp_path / "evaluation.json").read_bytes())
    assert evaluation.n_samples_by_donor == {"D3": 70}
    assert (evaluation.n_batches, evaluation.n_left_over) == (1, 6)
    assert evaluation.checkpoint == read_meta(checkpoint).fingerprint
    assert list(evaluation.genes_unknown_to_model.values()) == [0]
    methods = {line.method for line in evaluation.retrieval}
    assert methods == {"model", "shuffled_pairs", "ridge", "chance"}
    assert len(evaluation.retrieval) == 4 * 2 * 2
    for direction in ("image_to_genes", "genes_to_image"):
        model = _line(evaluation, "model", "all", direction)
        assert model.n_candidates == model.n_queries == 70
        chance = _line(evaluation, "chance", "all", direction)
        assert chance.r_at_5 == 5 / 70
        # Four types of equal size are told apart at best: 5 of about 17.
        assert model.r_at_10 > 2 * chance.r_at_10
        assert _line(evaluation, "ridge", "all", direction).r_at_10 > 2 * chance.r_at_10

    batches = pq.read_table(tmp_path / "batches.parquet").to_pydict()
    stream = read_stream([tiny_dataset], "test")
    assert batches["batch"] == [0] * 64
    assert batches["position"] == list(range(64))
    assert len(set(batches["key"])) == 64
    assert set(batches["key"]) < set(stream.table(["key"])["key"].to_pylist())


def test_the_same_again_gives_the_same_bytes(
    checkpoint: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    for out in ("one", "two"):
        evaluate(checkpoint, tiny_dataset, tmp_path / out)
    for name in ("evaluation.json", "batches.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_dataset_without_train_donors_has_no_ridge_and_says_so(
    checkpoint: Path, tmp_path: Path
) -> None:
    root = write_tiny_dataset(tmp_path / "data", {"D7": "test"}, n_per_donor=70, seed=4)
    evaluation = evaluate(checkpoint, root, tmp_path / "out")
    assert {line.method for line in evaluation.retrieval} == {"model", "shuffled_pairs", "chance"}
    assert evaluation.not_evaluated == ("ridge: the dataset has no train split to fit it on",)


def test_too_small_a_split_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_tiny_dataset(tmp_path / "data", {"D7": "test"}, n_per_donor=10)
    with pytest.raises(BadInput, match="64 samples in the test split"):
        evaluate(checkpoint, root, tmp_path / "out")
    assert main([str(tmp_path), str(root), "--out", str(tmp_path / "out")]) == 2
    assert "a checkpoint" in capsys.readouterr().err


def test_the_ridge_finds_what_stain_and_size_tell(tiny_dataset: Path) -> None:
    train_stream, test_stream = (read_stream([tiny_dataset], s) for s in ("train", "test"))
    predicted, true = ridge_embeddings(train_stream, test_stream)
    assert predicted.shape == true.shape == (70, 40)
    np.testing.assert_allclose(np.linalg.norm(predicted, axis=1), 1, rtol=1e-5)
    label = np.array(test_stream.table(["label"])["label"].to_pylist())
    same = label[:, None] == label[None, :]
    score = predicted @ true.T
    assert score[same].mean() > score[~same].mean() + 0.5
    assert np.median(ranks(predicted, true)) < 15


def test_evaluation_json_is_plain(checkpoint: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    evaluate(checkpoint, tiny_dataset, tmp_path, split="val")
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["split"] == "val"
    assert written["retrieval"][0]["method"] == "model"
